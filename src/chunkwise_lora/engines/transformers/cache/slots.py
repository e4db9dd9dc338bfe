"""Which token lies in which slot of the cache: (batch, slots) arrays of token positions."""

from __future__ import annotations

import numpy as np

from chunkwise_lora.method.kv_policy import KVDecision

NO_TOKEN = -1
"""Marks a slot that holds nothing for a sequence."""

WASTE = 16
"""Unused slots are removed if there are at least this number, and at least an eighth of all slots."""


def kept(tokens: np.ndarray) -> np.ndarray | None:
    """Return (batch, n) the slots in use, packed to the left, or None if too few are unused to remove them."""
    used = tokens != NO_TOKEN
    waste = tokens.shape[1] - int(used.sum(1).max(initial=0))
    return packed(used) if waste >= max(WASTE, tokens.shape[1] // 8) else None


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


def picked(tokens: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Return (batch, n) the tokens (batch, slots) in packed slots (batch, n)."""
    if not tokens.shape[1]:
        return np.full(slots.shape, NO_TOKEN)
    return np.where(slots == NO_TOKEN, NO_TOKEN, np.take_along_axis(tokens, np.maximum(slots, 0), axis=1))
