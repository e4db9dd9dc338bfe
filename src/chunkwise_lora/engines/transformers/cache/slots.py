"""Which token lies in which slot of a cache. All layers of a cache hold the same tokens in the same slots."""

from __future__ import annotations

import numpy as np

from chunkwise_lora.method.kv_policy import KVDecision

NO_TOKEN = -1
"""Marks a slot that holds nothing for a sequence."""

WASTE = 16
"""Unused slots are removed if there are at least this number, and at least an eighth of all slots. Tokens in INT8 leave
the hot pool in the same numbers."""


class SlotTable:
    """The tokens of every sequence and their slots.

    A *column* is a place in the input that all sequences of a batch share, padding included. At first, hot slots are
    columns. After KV decisions they are not, so masks must then be over slots.
    """

    def __init__(self) -> None:
        self.real = np.empty((0, 0), bool)
        """(batch, columns) the columns that hold tokens, not padding."""
        self.cold = np.empty((0, 0), np.int64)
        """(batch, cold slots) the token in each cold slot, `NO_TOKEN` where it is unused."""
        self.hot = np.empty((0, 0), np.int64)
        """(batch, hot slots) the token in each hot slot."""
        self.due = np.empty((0, 0), np.int64)
        """(batch, columns) for each token, the smallest length of the sequence at which a KV decision may have dropped
        it or its query; 0 if none has."""
        self.waiting = np.empty((0, 0), bool)
        """(batch, hot slots) the tokens that are rounded to INT8 and wait in the hot pool until many can leave it."""
        self.in_columns = True
        """Whether hot slots still are columns."""

    @property
    def columns(self) -> int:
        """Columns added so far."""
        return self.real.shape[1]

    @property
    def lengths(self) -> np.ndarray:
        """(batch,) the number of tokens of each sequence."""
        return self.real.sum(1)

    def visible(self, new: np.ndarray) -> np.ndarray:
        """Return (batch, slots + tokens) bool: the slots in use, cold slots first, then `new` (batch, tokens)."""
        if not len(self.real):
            return new
        return np.concatenate([self.cold != NO_TOKEN, self.hot != NO_TOKEN, new], axis=1)

    def add(self, tokens: np.ndarray) -> None:
        """Add columns with tokens (batch, n) to the hot slots, `NO_TOKEN` for padding."""
        if not len(self.real):
            self.real, self.waiting = np.empty((2, len(tokens), 0), bool)
            self.hot, self.cold, self.due = np.empty((3, len(tokens), 0), np.int64)
        self.real = np.concatenate([self.real, tokens != NO_TOKEN], axis=1)
        self.hot = np.concatenate([self.hot, tokens], axis=1)
        self.due = np.concatenate([self.due, np.zeros_like(tokens)], axis=1)
        self.waiting = np.concatenate([self.waiting, np.zeros(tokens.shape, bool)], axis=1)

    def settle(self, row: int, decision: KVDecision) -> None:
        """Record a decision of one sequence that drops tokens or queries."""
        due = self.due[row, decision.start : decision.end]
        # A chunk closes with the next token. Chunks are dropped at some token of the pass.
        np.maximum(due, self.real[row].sum() if decision.action == "drop" else decision.end + 1, out=due)

    def is_settled(self, row: int, decision: KVDecision) -> bool:
        """Return whether a decision for a closed chunk was recorded before. After `crop`, plans decide it again."""
        due = self.due[row, decision.start : decision.end]
        return decision.action != "drop" and len(due) > 0 and bool((due > 0).all())

    def select(self, order: np.ndarray) -> None:
        """Keep only the sequences `order`, in that order."""
        if len(self.real):
            self.real, self.cold, self.hot, self.due, self.waiting = (
                table[order] for table in (self.real, self.cold, self.hot, self.due, self.waiting)
            )

    def drop(self, dropped: np.ndarray) -> None:
        """Free the hot slots `dropped` (batch, hot slots)."""
        self.hot[dropped] = NO_TOKEN
        self.waiting &= ~dropped

    def leaving(self, waiting: np.ndarray) -> np.ndarray:
        """Return (batch, hot slots) bool: which of the `waiting` tokens leave the hot pool now.

        In a batch, the pool is as wide as its longest sequence needs. So a sequence gives up only the tokens that make
        the pool narrower: the same tokens in the cold pool, in INT8, then take less memory in every batch.
        """
        used = (self.hot != NO_TOKEN).sum(1)
        width = int((used - waiting.sum(1)).max(initial=0))
        if self.hot.shape[1] - width < waste_of(self.hot.shape[1]):
            return np.zeros_like(waiting)
        return waiting & (waiting.cumsum(1) <= (used - width)[:, None])

    def to_cold(self, leaving: np.ndarray) -> np.ndarray:
        """Move the tokens `leaving` (batch, hot slots) to the cold pool. Returns (batch, n) their hot slots."""
        slots = packed(leaving)
        self.cold = np.concatenate([self.cold, picked(self.hot, slots)], axis=1)
        self.drop(leaving)
        return slots

    def sweep(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Remove unused slots if there are many. Returns the cold and hot slots that stay, None for all of a pool."""
        cold, hot = kept(self.cold), kept(self.hot)
        self._keep(cold, hot)
        return cold, hot

    def _keep(self, cold: np.ndarray | None, hot: np.ndarray | None) -> None:
        if cold is not None:
            self.cold = picked(self.cold, cold)
        if hot is not None:
            self.hot, self.waiting = picked(self.hot, hot), picked(self.waiting, hot, False)

    def exact_columns(self, columns: int) -> int:
        """Return the largest number of columns, up to `columns`, to which `crop` leaves every token that it should."""
        exact = np.ones(columns + 1, bool)
        for real, due in zip(self.real, self.due, strict=True):
            latest = np.concatenate([[0], np.maximum.accumulate(due)])
            lengths = np.concatenate([[0], np.cumsum(real[:columns])])
            exact &= latest[lengths] <= lengths
        return int(np.flatnonzero(exact)[-1])

    def crop(self, columns: int) -> tuple[np.ndarray, np.ndarray]:
        """Forget the tokens after the first `columns`. Returns the cold and hot slots that stay, each (batch, n)."""
        self.real, self.due = self.real[:, :columns], self.due[:, :columns]
        lengths = self.lengths[:, None]
        self.due[np.arange(columns) >= lengths] = 0
        if self.in_columns:
            stay = np.repeat(np.arange(columns)[None], len(self.real), axis=0)
        else:
            stay = packed((self.hot != NO_TOKEN) & (self.hot < lengths))
        cold = packed((self.cold != NO_TOKEN) & (self.cold < lengths))
        self._keep(cold, stay)
        return cold, stay


def kept(tokens: np.ndarray) -> np.ndarray | None:
    """Return (batch, n) the slots in use, packed to the left, or None if too few are unused to remove them."""
    used = tokens != NO_TOKEN
    waste = tokens.shape[1] - int(used.sum(1).max(initial=0))
    return packed(used) if waste >= waste_of(tokens.shape[1]) else None


def waste_of(slots: int) -> int:
    """Return how many of this number of slots must be unused, so that they are removed."""
    return max(WASTE, slots // 8)


def within(tokens: np.ndarray, decision: KVDecision) -> np.ndarray:
    """Return (n,) the slots of one sequence, tokens (slots,), that hold the tokens of a decision."""
    return np.flatnonzero((tokens >= decision.start) & (tokens < decision.end))


def packed(chosen: np.ndarray) -> np.ndarray:
    """Return (batch, n) the slots that `chosen` (batch, slots) marks, packed to the left, then `NO_TOKEN`."""
    packed = np.full((len(chosen), int(chosen.sum(1).max(initial=0))), NO_TOKEN)
    for row, flags in enumerate(chosen):
        slots = np.flatnonzero(flags)
        packed[row, : len(slots)] = slots
    return packed


def picked(table: np.ndarray, slots: np.ndarray, nothing: int = NO_TOKEN) -> np.ndarray:
    """Return (batch, n) the entries of `table` (batch, slots) in packed slots (batch, n), else `nothing`."""
    if not table.shape[1]:
        return np.full(slots.shape, nothing, table.dtype)
    taken = np.take_along_axis(table, np.maximum(slots, 0), axis=1)
    taken[slots == NO_TOKEN] = nothing
    return taken
