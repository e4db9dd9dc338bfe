"""The adapter product on a GPU: two launches of Triton kernels per layer. Importing this module needs Triton."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from chunkwise_lora.backends.base import Backend, Columns, Layer, Limits, PreparedPass
from chunkwise_lora.backends.triton import may_run
from chunkwise_lora.backends.triton.schedule import Schedule
from chunkwise_lora.backends.triton.table import AdapterTable
from chunkwise_lora.ladder import LadderModule
from chunkwise_lora.method.segments import PassPlan

FIRST_RANK, FIRST_RUNGS = 16, 32
"""Sizes of new tables. They double if an adapter needs more, because the kernels are compiled for each size."""


class TritonLayer(Layer):
    """A layer with the table of its adapters. An adapter has the same slot in the tables of all layers."""

    def __init__(self, name: str, columns: Sequence[Columns], table: AdapterTable) -> None:
        super().__init__(name, table.in_features, columns)
        self.table = table


class TritonBackend(Backend[TritonLayer, PreparedPass]):
    """Holds a table per layer and one schedule, which `prepare` fills, so only one pass can run at a time."""

    name = "triton"

    def __init__(self, device: torch.device, dtype: torch.dtype, limits: Limits | None = None) -> None:
        super().__init__(device, dtype, limits)
        assert limits is not None  # checked by `supports`
        self.slots: dict[str, int] = {}
        """The slot of each adapter in all tables."""
        self.layers: dict[str, TritonLayer] = {}
        """By name."""
        self._schedule = Schedule(limits.tokens, limits.adapters, FIRST_RUNGS, device)
        self._scheduled: PassPlan | None = None
        """The plan that the schedule holds."""

    @classmethod
    def supports(cls, device: torch.device, dtype: torch.dtype, limits: Limits | None) -> bool:
        """Return whether `may_run` allows it."""
        return may_run(device, limits)

    @property
    def adapters(self) -> frozenset[str]:
        """Keys of the loaded adapters."""
        return frozenset(self.slots)

    def add_layer(self, name: str, in_features: int, columns: Sequence[Columns]) -> TritonLayer:
        """Register a layer."""
        table = AdapterTable(
            in_features,
            columns,
            slots=self._schedule.slots,
            max_rank=FIRST_RANK,
            rungs=self._schedule.rungs,
            device=self.device,
            dtype=self.dtype,
        )
        layer = self.layers[name] = TritonLayer(name, columns, table)
        return layer

    def load(self, adapter: str, modules: Mapping[str, Sequence[LadderModule | None]]) -> None:
        """Copy an adapter to the device."""
        self.unload(adapter)
        self._make_room(modules)
        slot = self.slots[adapter] = min({*range(self._schedule.slots)} - {*self.slots.values()})
        for name, layer_modules in modules.items():
            self.layers[name].table.set(slot, layer_modules)

    def unload(self, adapter: str) -> None:
        """Free an adapter."""
        self._scheduled = None
        if adapter in self.slots:
            slot = self.slots.pop(adapter)
            for layer in self.layers.values():
                layer.table.remove(slot)

    def prepare(self, plan: PassPlan) -> PreparedPass:
        """Fill the schedule with the plan, unless it holds this plan already because plans are constant."""
        if plan.segments and plan is not self._scheduled:
            self._schedule.update(*self._slots_and_weights(plan))
            self._scheduled = plan
        return PreparedPass(plan)

    def apply(self, layer: TritonLayer, y: Tensor, x: Tensor, prepared: PreparedPass) -> Tensor:
        """Add all segments and modules in two launches."""
        if not prepared.plan.segments or self._schedule.idle:
            return y
        if y.requires_grad:
            y = y.clone()
        shape, table = y.shape, layer.table
        y, x = y.reshape(-1, shape[-1]), x.reshape(-1, x.shape[-1])
        if x.dtype == y.dtype == table.dtype and x.stride(1) == y.stride(1) == 1:
            table.add(y, x, self._schedule)
        else:  # a layer in another dtype, such as a router in float32
            added = torch.zeros(y.shape, dtype=table.dtype, device=y.device)
            table.add(added, x.to(table.dtype).contiguous(), self._schedule)
            y += added
        return y.view(shape)

    def _slots_and_weights(self, plan: PassPlan) -> tuple[np.ndarray, np.ndarray]:
        """Return (tokens,) slots and (tokens, rungs) weights of a plan."""
        slots = np.full(plan.tokens, -1)
        weights = np.zeros((plan.tokens, self._schedule.rungs), np.float32)
        for segment in plan.segments:
            rows = slice(None) if segment.rows is None else segment.rows
            slots[rows] = self.slots.get(segment.adapter, -1)
            if segment.weights is None:
                weights[rows, segment.rung] = 1
            else:
                weights[rows, : segment.weights.shape[1]] = segment.weights
        return slots, weights

    def _make_room(self, modules: Mapping[str, Sequence[LadderModule | None]]) -> None:
        most = dict.fromkeys(modules, 0)
        rungs = old = self._schedule.rungs
        for name, layer_modules in modules.items():
            for module in filter(None, layer_modules):
                most[name] = max(most[name], module.rank)
                rungs = _doubled(rungs, len(module.ranks))
        if rungs > old:
            self._schedule = Schedule(self._schedule.max_tokens, self._schedule.slots, rungs, self.device)
        for name, layer in self.layers.items():
            layer.table.grow(_doubled(layer.table.max_rank, most.get(name, 0)), rungs)


def _doubled(size: int, needed: int) -> int:
    while size < needed:
        size *= 2
    return size
