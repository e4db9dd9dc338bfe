"""Decides which rungs of the adapters are on the device, so that their bytes stay within a budget. It knows no vLLM.

To make room, the adapter with the most bytes per recent request gives up its top rungs: those that nobody asks for come
first, and popular adapters keep more. An adapter leaves the device only when no other one has a rung to give up.

A request keeps the rungs that it started with until it ends, so the plan of a running request never changes.
"""

from __future__ import annotations

import heapq
import sys
from bisect import bisect_right
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

WHOLE = sys.maxsize
"""Stands for the highest rung of an adapter, whatever its number."""
ABSENT = -1
"""Stands for an adapter that is not on the device."""
HALF_LIFE = 32
"""Requests of all adapters after which a request counts half."""
STEP = 1 / 8
"""Smallest share of its bytes that an adapter gives up at once, because every change copies what is left."""
GAIN = 2.0
"""An adapter gets rungs of another one if it then still has fewer bytes per recent request, by this factor. It keeps
rungs from moving back and forth."""


@dataclass(frozen=True)
class Ask:
    """What a request needs of its adapter."""

    adapter: int
    rung_bytes: Sequence[int]
    """(rungs,) bytes of the adapter's factors at each rung, in ascending order."""
    highest: int
    """The highest rung that the request's plan can use."""
    insists: bool
    """Whether the request itself asks for this plan. Other adapters then give up what it needs, and it waits for those
    that requests run with."""


@dataclass
class _Holding:
    """What one adapter has on the device."""

    rung_bytes: tuple[int, ...]
    rung: int = ABSENT
    requests: float = 0.0
    """Recent requests, as of `asked_at`."""
    asked_at: int = 0
    limits: dict[Hashable, int] = field(default_factory=dict)
    """The highest rung of each running request."""

    @cached_property
    def lowest(self) -> int:
        """The first rung that is more than nothing."""
        return next((rung for rung, size in enumerate(self.rung_bytes) if size), 0)

    def bytes_at(self, rung: int) -> int:
        return 0 if rung == ABSENT else self.rung_bytes[rung]

    def recent(self, now: int) -> float:
        """Return the number of requests, each halved for every HALF_LIFE requests since."""
        return self.requests * 0.5 ** ((now - self.asked_at) / HALF_LIFE)

    def after_giving(self, rung: int) -> int:
        """Return the rung that is left of `rung` after giving up at least STEP of all bytes, or all that can be."""
        left = self.rung_bytes[rung] - STEP * self.rung_bytes[-1]
        return max(self.needed, bisect_right(self.rung_bytes, left, hi=rung) - 1)

    @property
    def needed(self) -> int:
        """The lowest rung to which it can be reduced."""
        return max(self.limits.values(), default=min(self.rung, self.lowest))


class AdapterBudget:
    """The rungs of all adapters on the device.

    Args:
        limit: Bytes that all adapters may take.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._holdings: dict[int, _Holding] = {}
        self._running: dict[Hashable, int] = {}
        """The adapter of each running request."""
        self._changed: set[int] = set()
        self._now = 0

    def __contains__(self, request: Hashable) -> bool:
        """Return whether a request is running."""
        return request in self._running

    @property
    def nbytes(self) -> int:
        """Bytes of all rungs on the device."""
        return sum(holding.bytes_at(holding.rung) for holding in self._holdings.values())

    @property
    def running(self) -> set[int]:
        """The adapters of all running requests."""
        return set(self._running.values())

    def rung(self, adapter: int) -> int:
        """Return the highest rung of an adapter on the device, or ABSENT."""
        holding = self._holdings.get(adapter)
        return ABSENT if holding is None else holding.rung

    def start(self, request: Hashable, ask: Ask) -> int | None:
        """Start a request, and make room for its adapter.

        Returns:
            The highest rung that the request may use until it ends. None: it has to wait for another request to end,
            and nothing has changed.
        """
        holding = self._holding_of(ask)
        highest = min(ask.highest, len(holding.rung_bytes) - 1)
        moved = self._room(ask, holding, highest)
        if moved is None:
            return None
        self._holdings[ask.adapter] = holding
        for adapter, rung in moved.items():
            self._set(adapter, rung)
        holding.requests, holding.asked_at = holding.recent(self._now) + 1, self._now
        self._now += 1
        self._running[request] = ask.adapter
        holding.limits[request] = min(holding.rung, highest)
        return holding.limits[request]

    def end(self, requests: Iterable[Hashable]) -> None:
        """Note that requests have ended. Requests that are not running are ignored."""
        for request in requests:
            if (adapter := self._running.pop(request, None)) is not None:
                del self._holdings[adapter].limits[request]

    def remove(self, adapter: int) -> None:
        """Take an adapter off the device because a user unloads it, unless requests run with it."""
        if adapter in self._holdings and not self._holdings[adapter].limits:
            self._set(adapter, ABSENT)

    def changes(self) -> dict[int, int]:
        """Return the rung of every adapter whose rung has changed since the last call: WHOLE for its highest one."""
        changed = {adapter: self._holdings[adapter] for adapter in sorted(self._changed)}
        self._changed.clear()
        return {adapter: self.name_of(adapter, holding.rung) for adapter, holding in changed.items()}

    def name_of(self, adapter: int, rung: int) -> int:
        """Return WHOLE for the highest rung of an adapter, and the number of another one."""
        return WHOLE if rung == len(self._holdings[adapter].rung_bytes) - 1 else rung

    def _holding_of(self, ask: Ask) -> _Holding:
        """Return the holding of a request's adapter. It starts anew if the adapter was replaced by another one."""
        holding, sizes = self._holdings.get(ask.adapter), tuple(ask.rung_bytes)
        if holding is not None and (holding.rung_bytes == sizes or holding.limits):
            return holding
        return _Holding(sizes)

    def _room(self, ask: Ask, holding: _Holding, highest: int) -> dict[int, int] | None:
        """Return new rungs by adapter, so that the asked one has as many rungs up to `highest` as it may have.

        None: there is not enough room, because of what running requests use.
        """
        rung, needed = holding.rung, min(holding.lowest, highest)
        if ask.insists:  # all that fits
            needed = bisect_right(holding.rung_bytes, self.limit, hi=highest + 1) - 1
        others = {adapter: other for adapter, other in self._holdings.items() if adapter != ask.adapter}
        rungs = {adapter: other.rung for adapter, other in others.items()}
        free = self.limit - holding.bytes_at(rung) - sum(other.bytes_at(other.rung) for other in others.values())
        offers = [(-self._per_request(other, other.rung), adapter) for adapter, other in others.items()]
        heapq.heapify(offers)
        moved: dict[int, int] = {}
        while rung < highest:
            rises_to = max(rung + 1, needed)
            cost = holding.bytes_at(rises_to) - holding.bytes_at(rung)
            fair = GAIN * holding.bytes_at(rises_to) / (holding.recent(self._now) + 1)
            while free < cost and offers and (rises_to == needed or -offers[0][0] > fair):
                _, adapter = heapq.heappop(offers)
                other = others[adapter]
                if rungs[adapter] > other.needed:
                    free += other.bytes_at(rungs[adapter])
                    rungs[adapter] = other.after_giving(rungs[adapter])
                    free -= other.bytes_at(rungs[adapter])
                    heapq.heappush(offers, (-self._per_request(other, rungs[adapter]), adapter))
            if rises_to == needed:
                idle = [adapter for adapter, other in others.items() if not other.limits]
                for adapter in sorted(idle, key=lambda adapter: others[adapter].recent(self._now)):
                    if free < cost:
                        free += others[adapter].bytes_at(rungs[adapter])
                        rungs[adapter] = ABSENT
            if free < cost:
                break
            free, rung, moved = free - cost, rises_to, dict(rungs)
        return None if rung < needed else {**moved, ask.adapter: rung}

    def _per_request(self, holding: _Holding, rung: int) -> float:
        """Return an adapter's bytes per recent request if it has `rung`."""
        return holding.bytes_at(rung) / max(holding.recent(self._now), 1e-9)

    def _set(self, adapter: int, rung: int) -> None:
        if self._holdings[adapter].rung != rung:
            self._holdings[adapter].rung = rung
            self._changed.add(adapter)
