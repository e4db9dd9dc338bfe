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
from chunkwise_lora.backends.triton import DTYPES, may_run
from chunkwise_lora.backends.triton.schedule import Schedule
from chunkwise_lora.backends.triton.table import AdapterTable
from chunkwise_lora.ladder import LadderModule
from chunkwise_lora.method.segments import PassPlan

FIRST_RANK, FIRST_RUNGS, FIRST_SLOTS = 16, 32, 8
"""Sizes of new tables. They double if an adapter needs more, because the kernels are compiled for each size. An engine
with limits fixes the number of slots, and may reserve a larger rank."""

FEWEST_TOKENS = 16
"""Without limits, schedules have room for this number of tokens, or a power of two of it."""


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
        self.is_fixed = False
        """Whether it always runs with this schedule, whatever that holds."""
        self.held: PassPlan | None = None
        """The plan that the schedule of a fixed pass holds, at this version."""


class TritonBackend(Backend[TritonLayer, TritonPass]):
    """Holds a table per layer, and a schedule per pass that is in use."""

    name = "triton"

    def __init__(self, device: torch.device, dtype: torch.dtype, limits: Limits | None = None) -> None:
        super().__init__(device, dtype, limits)
        self.slots: dict[str, int] = {}
        """The slot of each adapter in all tables."""
        self.layers: dict[str, TritonLayer] = {}
        """By name."""
        self._limits = limits
        self._rungs = FIRST_RUNGS
        self._room = FIRST_SLOTS if limits is None else limits.adapters
        """Number of slots."""
        self._first_rank = _doubled(FIRST_RANK, 0 if limits is None else limits.rank)
        self._version = 0
        """Counts the changes of the tables. Schedules of older versions are not used any more."""
        self.layout = 0
        """Counts the changes after which fixed passes are no longer valid: new layers, and tables that have grown."""
        self._unused: list[Filled] = []
        """Schedules of this version that no pass uses."""
        self._lock = Lock()

    @classmethod
    def supports(cls, device: torch.device, dtype: torch.dtype, limits: Limits | None) -> bool:
        """Return whether `may_run` allows it, and the kernels know the element type."""
        return may_run(device, limits) and dtype in DTYPES

    @property
    def adapters(self) -> frozenset[str]:
        """Keys of the loaded adapters."""
        return frozenset(self.slots)

    def add_layer(self, name: str, in_features: int, columns: Sequence[Columns]) -> TritonLayer:
        """Register a layer."""
        table = AdapterTable(
            in_features,
            columns,
            slots=self._room,
            max_rank=self._first_rank,
            rungs=self._rungs,
            device=self.device,
            dtype=self.dtype,
        )
        layer = self.layers[name] = TritonLayer(name, columns, table)
        self.layout += 1
        return layer

    def load(self, adapter: str, modules: Mapping[str, Sequence[LadderModule | None]]) -> None:
        """Copy an adapter to the device."""
        self.unload(adapter)
        self._make_room(modules)
        slot = self.slots[adapter] = min({*range(self._room)} - {*self.slots.values()})
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

    def fixed_pass(self, tokens: int) -> TritonPass:
        """Return a pass for plans of up to this number of tokens, which a CUDA graph may capture. It holds no plan yet.

        Every layer runs, also those without an adapter. Layers get x and y of exactly `tokens` rows; those after the
        tokens of the plan are padding. Call `refill` before each use. The pass is valid as long as `layout` does not
        change.
        """
        prepared = TritonPass(PassPlan((), 1, tokens))
        prepared.schedule, prepared.is_fixed = Schedule(tokens, self._room, self._rungs, self.device), True
        self.refill(prepared, prepared.plan)
        return prepared

    def refill(self, prepared: TritonPass, plan: PassPlan) -> None:
        """Let a fixed pass run `plan` from now on. It queues copies and does not wait for the device."""
        assert prepared.schedule is not None
        if prepared.held is not plan or prepared.version != self._version:
            prepared.schedule.update(*self._slots_and_weights(plan), tokens=prepared.plan.tokens)
            prepared.held, prepared.version = plan, self._version

    def apply(self, layer: TritonLayer, y: Tensor, x: Tensor, prepared: TritonPass) -> Tensor:
        """Add all segments and modules in two launches, or in PyTorch if gradients are recorded."""
        if y.requires_grad or (x.requires_grad and torch.is_grad_enabled()):
            return self._with_gradients(layer, y, x, prepared.plan)
        if (
            prepared.version != self._version and not prepared.is_fixed
        ):  # adapters have been loaded or unloaded since it was prepared
            self._schedule(prepared)
        schedule = prepared.schedule
        if schedule is None or (schedule.idle and not prepared.is_fixed):
            return y
        shape, table = y.shape, layer.table
        y, x = y.reshape(-1, shape[-1]), x.reshape(-1, x.shape[-1])
        if x.dtype == y.dtype == table.dtype and x.stride(1) == y.stride(1) == 1:
            table.add(y, x, schedule)
        else:  # a layer in another dtype, such as a router in float32
            added = torch.zeros(y.shape, dtype=table.dtype, device=y.device)
            table.add(added, x.to(table.dtype).contiguous(), schedule)
            y += added
        return y.view(shape)

    def _with_gradients(self, layer: TritonLayer, y: Tensor, x: Tensor, plan: PassPlan) -> Tensor:
        """Return y plus the adapter product by products that autograd knows."""
        shape, table = y.shape, layer.table
        y, x = y.reshape(-1, shape[-1]).clone(), x.reshape(-1, x.shape[-1])
        for segment in plan.segments:
            slot = self.slots.get(segment.adapter)
            if slot is None:
                continue
            rows = torch.arange(len(x)) if segment.rows is None else torch.from_numpy(segment.rows)
            weights = torch.zeros(len(rows), self._rungs)
            if segment.weights is None:
                weights[:, segment.rung] = 1
            else:
                weights[:, : segment.weights.shape[1]] = torch.from_numpy(segment.weights)
            rows, weights = rows.to(y.device), weights.to(y.device)
            for pair, ranks, columns in zip(table.factors[slot], table.ranks[slot], layer.columns, strict=True):
                if pair is not None:
                    down, up = (factor.to(x.dtype) for factor in pair)
                    gates = weights @ (ranks[:, None] > torch.arange(len(down), device=y.device)).float()
                    added = ((x[rows] @ down.T) * gates).to(x.dtype) @ up
                    target = y[:, columns.offset : columns.offset + columns.width]
                    target.index_add_(0, rows, added.to(y.dtype))
        return y.view(shape)

    def _schedule(self, prepared: TritonPass) -> None:
        """Give a pass a schedule that holds its plan."""
        prepared.version = self._version
        if not prepared.plan.segments:
            return
        with self._lock:
            unused, tokens = self._unused, prepared.plan.tokens
            fitting = sorted(
                (one for one in unused if one.schedule.max_tokens >= tokens), key=lambda one: one.schedule.max_tokens
            )
            filled = next((one for one in fitting if one.plan is prepared.plan), fitting[0] if fitting else None)
            if filled is not None:
                unused.remove(filled)
        if filled is None:
            most = _doubled(FEWEST_TOKENS, tokens) if self._limits is None else self._limits.tokens
            filled = Filled(Schedule(most, self._room, self._rungs, self.device))
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
        if self._limits is None:
            self._room = _doubled(self._room, len(self.slots) + 1)
        most = dict.fromkeys(modules, 0)
        for name, layer_modules in modules.items():
            for module in filter(None, layer_modules):
                most[name] = max(most[name], module.rank)
                self._rungs = _doubled(self._rungs, len(module.ranks))
        for name, layer in self.layers.items():
            table = layer.table
            sizes = _doubled(table.max_rank, most.get(name, 0)), self._rungs, self._room
            if sizes != (table.max_rank, table.rungs, table.slots):
                table.grow(*sizes)
                self.layout += 1


def _doubled(size: int, needed: int) -> int:
    while size < needed:
        size *= 2
    return size
