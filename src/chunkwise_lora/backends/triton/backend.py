"""All adapters of a layer in two launches, by the Triton kernels. Knows nothing of vLLM; importing it needs Triton."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from chunkwise_lora.backends.base import Additions, Columns
from chunkwise_lora.backends.segments import Part
from chunkwise_lora.backends.triton.kernels import AdapterTable, Schedule
from chunkwise_lora.ladder import LadderModule

FIRST_RANK, FIRST_RUNGS = 16, 32
"""What tables have room for at first; it doubles for adapters that need more, since kernels then compile anew."""


class TritonAdditions(Additions):
    """A table per layer, whose slots are the same adapters in all, and one schedule, refilled when the plan changes."""

    def __init__(self, device: torch.device, dtype: torch.dtype, max_tokens: int, max_adapters: int) -> None:
        super().__init__()
        self.slots: dict[str, int] = {}
        """By adapter."""
        self.tables: dict[str, AdapterTable] = {}
        """By layer."""
        self._device, self._dtype = device, dtype
        self._schedule = Schedule(max_tokens, max_adapters, FIRST_RUNGS, device)
        self._scheduled: Sequence[Part] | None = None
        """The parts that the schedule holds."""

    @property
    def adapters(self) -> Mapping[str, object]:
        """The adapters that were put, by id."""
        return self.slots

    def layer(self, name: str, in_features: int, columns: Sequence[Columns]) -> None:
        """Make a layer known."""
        self.tables[name] = AdapterTable(
            in_features,
            [where.width for where in columns],
            slots=self._schedule.slots,
            max_rank=FIRST_RANK,
            rungs=self._schedule.rungs,
            device=self._device,
            dtype=self._dtype,
            offsets=[where.offset for where in columns],
        )

    def put(self, adapter: str, modules: Mapping[str, Sequence[LadderModule | None]]) -> None:
        """Bring an adapter to the device."""
        self.drop(adapter)
        self._make_room(modules)
        slot = self.slots[adapter] = min({*range(self._schedule.slots)} - {*self.slots.values()})
        for layer, of_layer in modules.items():
            self.tables[layer].set(slot, of_layer)

    def drop(self, adapter: str) -> None:
        """Free an adapter."""
        self._scheduled = None
        if adapter in self.slots:
            slot = self.slots.pop(adapter)
            for table in self.tables.values():
                table.remove(slot)

    def plan(self, parts: Sequence[Part]) -> None:
        """Refill the schedule, unless it holds these very parts, as it does where plans are constant."""
        super().plan(parts)
        if parts and (parts is not self._scheduled or self._schedule.tokens != self.tokens):
            self._schedule.update(*self._of_tokens())
            self._scheduled = parts

    def _add(self, layer: str, y: Tensor, x: Tensor) -> None:
        if self._schedule.idle:
            return
        table = self.tables[layer]
        if x.dtype == y.dtype == table.dtype and x.stride(1) == y.stride(1) == 1:
            table.add(y, x, self._schedule)
        else:  # an exception, such as a router that computes in float32
            added = torch.zeros(y.shape, dtype=table.dtype, device=y.device)
            table.add(added, x.to(table.dtype).contiguous(), self._schedule)
            y += added

    def _of_tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """(tokens,) slots and (tokens, rungs) weights of the parts."""
        slots = np.full(self.tokens, -1)
        weights = np.zeros((self.tokens, self._schedule.rungs), np.float32)
        for part in self.parts:
            rows = slice(None) if part.rows is None else part.rows.numpy()
            slots[rows] = self.slots.get(part.adapter, -1)
            if part.weights is None:
                weights[rows, part.rung] = 1
            else:
                weights[rows, : part.weights.shape[1]] = part.weights.numpy()
        return slots, weights

    def _make_room(self, modules: Mapping[str, Sequence[LadderModule | None]]) -> None:
        most = dict.fromkeys(modules, 0)
        rungs = old = self._schedule.rungs
        for layer, of_layer in modules.items():
            for one in filter(None, of_layer):
                most[layer] = max(most[layer], one.rank)
                rungs = _doubled(rungs, len(one.ranks))
        if rungs > old:
            self._schedule = Schedule(self._schedule.max_tokens, self._schedule.slots, rungs, self._device)
        for layer, table in self.tables.items():
            table.grow(_doubled(table.max_rank, most.get(layer, 0)), rungs)


def _doubled(size: int, needed: int) -> int:
    while size < needed:
        size *= 2
    return size
