"""All adapters of a layer in two launches, by the Triton kernels. Importing it needs Triton."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from chunkwise_lora.backends.base import Backend, Columns, Layer, Limits, PreparedPass
from chunkwise_lora.backends.triton.schedule import Schedule
from chunkwise_lora.backends.triton.table import AdapterTable
from chunkwise_lora.ladder import LadderModule
from chunkwise_lora.method.segments import PassPlan

logger = logging.getLogger(__name__)

FIRST_RANK, FIRST_RUNGS = 16, 32
"""What tables have room for at first. It doubles for adapters that need more, since the kernels then compile anew."""


class TritonLayer(Layer):
    """A layer with the table of its adapters. An adapter has the same slot in the tables of all layers."""

    def __init__(self, name: str, columns: Sequence[Columns], table: AdapterTable) -> None:
        super().__init__(name, table.in_features, columns)
        self.table = table


class TritonBackend(Backend[TritonLayer, PreparedPass]):
    """A table per layer, and one schedule for all of them, which `prepare` refills: one pass runs at a time."""

    name = "triton"

    def __init__(self, device: torch.device, dtype: torch.dtype, limits: Limits | None = None) -> None:
        super().__init__(device, dtype, limits)
        assert limits is not None  # `supports` says so
        self.slots: dict[str, int] = {}
        """By adapter."""
        self.layers: dict[str, TritonLayer] = {}
        """By name."""
        self._schedule = Schedule(limits.tokens, limits.adapters, FIRST_RUNGS, device)
        self._scheduled: PassPlan | None = None
        """The plan that the schedule holds."""

    @classmethod
    def supports(cls, device: torch.device, dtype: torch.dtype, limits: Limits | None) -> bool:
        """On a CUDA device, where the engine knows the limits of a pass. CHUNKWISE_TRITON=0 switches it off."""
        return device.type == "cuda" and limits is not None and os.environ.get("CHUNKWISE_TRITON") != "0"

    @property
    def adapters(self) -> frozenset[str]:
        """Keys of the loaded adapters."""
        return frozenset(self.slots)

    def add_layer(self, name: str, in_features: int, columns: Sequence[Columns]) -> TritonLayer:
        """Make a layer known."""
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
        """Bring an adapter to the device."""
        self.unload(adapter)
        self._make_room(modules)
        slot = self.slots[adapter] = min({*range(self._schedule.slots)} - {*self.slots.values()})
        for name, of_layer in modules.items():
            self.layers[name].table.set(slot, of_layer)

    def unload(self, adapter: str) -> None:
        """Free an adapter."""
        self._scheduled = None
        if adapter in self.slots:
            slot = self.slots.pop(adapter)
            for layer in self.layers.values():
                layer.table.remove(slot)

    def prepare(self, plan: PassPlan) -> PreparedPass:
        """Refill the schedule, unless it holds this very plan, as it does where plans are constant."""
        if plan.segments and plan is not self._scheduled:
            self._schedule.update(*self._of_tokens(plan))
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
        else:  # an exception, such as a router that computes in float32
            added = torch.zeros(y.shape, dtype=table.dtype, device=y.device)
            table.add(added, x.to(table.dtype).contiguous(), self._schedule)
            y += added
        return y.view(shape)

    def _of_tokens(self, plan: PassPlan) -> tuple[np.ndarray, np.ndarray]:
        """(tokens,) slots and (tokens, rungs) weights of a plan."""
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
        for name, of_layer in modules.items():
            for one in filter(None, of_layer):
                most[name] = max(most[name], one.rank)
                rungs = _doubled(rungs, len(one.ranks))
        if rungs > old:
            self._schedule = Schedule(self._schedule.max_tokens, self._schedule.slots, rungs, self.device)
        for name, layer in self.layers.items():
            layer.table.grow(_doubled(layer.table.max_rank, most.get(name, 0)), rungs)


def _doubled(size: int, needed: int) -> int:
    while size < needed:
        size *= 2
    return size
