"""The adapter product on a GPU: two launches of Triton kernels per layer. Importing this module needs Triton."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock

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


@dataclass(eq=False)
class Filled:
    """A schedule and the plan that it holds."""

    schedule: Schedule
    plan: PassPlan | None = None


class TritonPass(PreparedPass):
    """A plan in a schedule of its own. The schedule serves another pass once this one is no longer in use."""

    def __init__(self, plan: PassPlan) -> None:
        super().__init__(plan)
        self.schedule: Schedule | None = None
        """None if the plan has no segments."""
        self.version = 0
        """The version of the tables that the schedule was filled for."""


class TritonBackend(Backend[TritonLayer, TritonPass]):
    """Holds a table per layer, and a schedule per pass that is in use."""

    name = "triton"

    def __init__(self, device: torch.device, dtype: torch.dtype, limits: Limits | None = None) -> None:
        super().__init__(device, dtype, limits)
        assert limits is not None  # checked by `supports`
        self.slots: dict[str, int] = {}
        """The slot of each adapter in all tables."""
        self.layers: dict[str, TritonLayer] = {}
        """By name."""
        self._limits = limits
        self._rungs = FIRST_RUNGS
        self._version = 0
        """Counts the changes of the tables. Schedules of older versions are not used any more."""
        self._unused: list[Filled] = []
        """Schedules of this version that no pass uses."""
        self._lock = Lock()

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
            slots=self._limits.adapters,
            max_rank=FIRST_RANK,
            rungs=self._rungs,
            device=self.device,
            dtype=self.dtype,
        )
        layer = self.layers[name] = TritonLayer(name, columns, table)
        return layer

    def load(self, adapter: str, modules: Mapping[str, Sequence[LadderModule | None]]) -> None:
        """Copy an adapter to the device."""
        self.unload(adapter)
        self._make_room(modules)
        slot = self.slots[adapter] = min({*range(self._limits.adapters)} - {*self.slots.values()})
        for name, layer_modules in modules.items():
            self.layers[name].table.set(slot, layer_modules)

    def unload(self, adapter: str) -> None:
        """Free an adapter. Prepared passes run without it."""
        self._version, self._unused = self._version + 1, []
        if adapter in self.slots:
            slot = self.slots.pop(adapter)
            for layer in self.layers.values():
                layer.table.remove(slot)

    def prepare(self, plan: PassPlan) -> TritonPass:
        """Fill a schedule with the plan, unless an unused one holds this plan already because plans are constant."""
        prepared = TritonPass(plan)
        self._schedule(prepared)
        return prepared

    def apply(self, layer: TritonLayer, y: Tensor, x: Tensor, prepared: TritonPass) -> Tensor:
        """Add all segments and modules in two launches."""
        if prepared.version != self._version:  # adapters have been loaded or unloaded since it was prepared
            self._schedule(prepared)
        schedule = prepared.schedule
        if schedule is None or schedule.idle:
            return y
        if y.requires_grad:
            y = y.clone()
        shape, table = y.shape, layer.table
        y, x = y.reshape(-1, shape[-1]), x.reshape(-1, x.shape[-1])
        if x.dtype == y.dtype == table.dtype and x.stride(1) == y.stride(1) == 1:
            table.add(y, x, schedule)
        else:  # a layer in another dtype, such as a router in float32
            added = torch.zeros(y.shape, dtype=table.dtype, device=y.device)
            table.add(added, x.to(table.dtype).contiguous(), schedule)
            y += added
        return y.view(shape)

    def _schedule(self, prepared: TritonPass) -> None:
        """Give a pass a schedule that holds its plan."""
        prepared.version = self._version
        if not prepared.plan.segments:
            return
        with self._lock:
            unused = self._unused
            filled = next((one for one in unused if one.plan is prepared.plan), unused[0] if unused else None)
            if filled is not None:
                unused.remove(filled)
        if filled is None:
            filled = Filled(Schedule(self._limits.tokens, self._limits.adapters, self._rungs, self.device))
        if filled.plan is not prepared.plan:
            filled.schedule.update(*self._slots_and_weights(prepared.plan))
            filled.plan = prepared.plan
        prepared.schedule = filled.schedule
        weakref.finalize(prepared, unused.append, filled)

    def _slots_and_weights(self, plan: PassPlan) -> tuple[np.ndarray, np.ndarray]:
        """Return (tokens,) slots and (tokens, rungs) weights of a plan."""
        slots = np.full(plan.tokens, -1)
        weights = np.zeros((plan.tokens, self._rungs), np.float32)
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
        for name, layer_modules in modules.items():
            for module in filter(None, layer_modules):
                most[name] = max(most[name], module.rank)
                self._rungs = _doubled(self._rungs, len(module.ranks))
        for name, layer in self.layers.items():
            layer.table.grow(_doubled(layer.table.max_rank, most.get(name, 0)), self._rungs)


def _doubled(size: int, needed: int) -> int:
    while size < needed:
        size *= 2
    return size
