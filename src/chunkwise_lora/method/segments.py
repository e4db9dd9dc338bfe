"""Turns the plans of many sequences into the segments of one forward pass.

The weights of a plan, (tokens, rungs), say how much of each rung every token gets. A forward pass holds the tokens of
many sequences, each with its own adapter. A `Segment` holds the tokens that one adapter runs for, and a `PassPlan`
holds all segments of a pass. Both are decided once per pass, for all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

GROUPING_GAIN = 24.0
"""Tokens are grouped by rung if that saves more than this number of directions per token. Copying a token's activations
into a group and back takes about as long as computing this number of directions."""


@dataclass(frozen=True, eq=False)
class Segment:
    """The tokens of a pass that one adapter runs for."""

    adapter: str
    """Key of the adapter."""
    rung: int
    """The highest rung that any of the tokens needs."""
    weights: np.ndarray | None = None
    """(tokens, rungs) float32 weights over the rungs. None: every token gets `rung` with weight 1."""
    rows: np.ndarray | None = None
    """(tokens,) int64 positions of the tokens among all tokens of the pass. None: the segment is the whole pass."""


@dataclass(frozen=True, eq=False)
class PassPlan:
    """The segments of one forward pass. No token is in two segments."""

    segments: tuple[Segment, ...]
    batch: int
    """Rows of the pass: the number of sequences, or 1 if the tokens of all sequences are in one row."""
    width: int
    """Tokens per row, padding included."""
    _views: dict[tuple[int, int], PassPlan] = field(default_factory=dict, repr=False)
    """Plans for layers that see other tokens, by batch and width."""

    @property
    def tokens(self) -> int:
        """Tokens of the pass, padding included."""
        return self.batch * self.width

    @cached_property
    def is_uniform(self) -> bool:
        """Whether all tokens get the same rung of the same adapter, or no adapter. Then their order does not matter."""
        return all(segment.weights is None and segment.rows is None for segment in self.segments)

    @cached_property
    def adapters(self) -> tuple[str, ...]:
        """Key of each segment's adapter."""
        return tuple(segment.adapter for segment in self.segments)

    def tail(self, columns: int) -> PassPlan:
        """Return the plan for a layer that sees only the last `columns` tokens of each row, such as an output head."""
        return self._view(self.batch, columns)

    def with_tokens(self, tokens: int) -> PassPlan:
        """Return the plan for another number of tokens, in any order. The plan must be uniform."""
        return self._view(1, tokens)

    def at(self, positions: np.ndarray) -> PassPlan:
        """Return the plan for a layer that sees only the tokens at `positions` (n,), which are in ascending order."""
        segments = (_segment_at(segment, positions, self.tokens) for segment in self.segments)
        return PassPlan(tuple(segment for segment in segments if segment is not None), 1, len(positions))

    def repeated(self, columns: int) -> PassPlan:
        """Return the plan for `columns` tokens of each row. All tokens of a row must have the same gates."""
        key = -1, columns
        if key not in self._views:
            segments = tuple(_repeated(segment, columns) for segment in self.tail(1).segments)
            self._views[key] = PassPlan(segments, self.batch, columns)
        return self._views[key]

    def _view(self, batch: int, width: int) -> PassPlan:
        if (batch, width) not in self._views:
            segments = tuple(self._tail_of(segment, width) for segment in self.segments)
            self._views[batch, width] = PassPlan(segments, batch, width)
        return self._views[batch, width]

    def _tail_of(self, segment: Segment, columns: int) -> Segment:
        if segment.weights is None and segment.rows is None:
            return segment
        hidden = self.width - columns
        rows = np.arange(self.tokens) if segment.rows is None else segment.rows
        seen = rows % self.width >= hidden
        rows = rows[seen]
        weights = None if segment.weights is None else np.ascontiguousarray(segment.weights[seen])
        return Segment(
            segment.adapter, segment.rung, weights, rows // self.width * columns + rows % self.width - hidden
        )


def _segment_at(segment: Segment, positions: np.ndarray, tokens: int) -> Segment | None:
    """Return the part of a segment for the tokens at `positions`, in a pass of `tokens`. None: it has none of them."""
    rows = np.arange(tokens) if segment.rows is None else segment.rows
    seen = np.isin(rows, positions)
    if not seen.any():
        return None
    weights = None if segment.weights is None else np.ascontiguousarray(segment.weights[seen])
    is_whole = segment.rows is None and segment.weights is None
    return Segment(segment.adapter, segment.rung, weights, None if is_whole else np.searchsorted(positions, rows[seen]))


def _repeated(segment: Segment, columns: int) -> Segment:
    """Return a segment of one token per row, with each token repeated `columns` times."""
    weights = None if segment.weights is None else np.repeat(segment.weights, columns, axis=0)
    rows = None if segment.rows is None else (segment.rows[:, None] * columns + np.arange(columns)).ravel()
    return Segment(segment.adapter, segment.rung, weights, rows)


def segments_of(adapter: str, weights: np.ndarray, rung_ranks: np.ndarray, rows: np.ndarray | None) -> list[Segment]:
    """Choose how an adapter runs: as one slice of its factors, as one gated product, or in groups of tokens by rung.

    Args:
        adapter: Key of the adapter.
        weights: (tokens, rungs) weights over the rungs.
        rung_ranks: (rungs,) the mean rank of each rung.
        rows: (tokens,) positions of the tokens in the pass; None for the whole pass.
    """
    top = highest_rungs(weights)
    highest = int(top.max())
    if len(weights) > 1 and rung_ranks[highest] - rung_ranks[top].mean() > GROUPING_GAIN:
        groups = [np.flatnonzero(top == rung) for rung in np.unique(top)]
        return [
            _segment(adapter, weights[group], group if rows is None else rows[group], int(top[group[0]]))
            for group in groups
        ]
    return [_segment(adapter, weights, rows, highest)]


def _segment(adapter: str, weights: np.ndarray, rows: np.ndarray | None, rung: int) -> Segment:
    one_hot = np.zeros(weights.shape[1], np.float32)
    one_hot[rung] = 1
    return Segment(adapter, rung, None if (weights == one_hot).all() else np.ascontiguousarray(weights), rows)


def highest_rungs(weights: np.ndarray) -> np.ndarray:
    """Return (tokens,) the highest rung with a weight in `weights` (tokens, rungs); 0 for a token without weights."""
    active = weights != 0
    return np.where(active.any(axis=1), weights.shape[1] - 1 - np.argmax(active[:, ::-1], axis=1), 0)


def limited(weights: np.ndarray, highest: int | None) -> np.ndarray:
    """Return `weights` (tokens, rungs) with what is above rung `highest` moved to it. None: there is no limit."""
    if highest is None or highest >= weights.shape[-1] - 1:
        return weights
    lower = np.zeros_like(weights)
    lower[..., :highest] = weights[..., :highest]
    lower[..., highest] = weights[..., highest:].sum(axis=-1)
    return lower


def ranks_of(weights: np.ndarray, rung_ranks: np.ndarray) -> np.ndarray:
    """Return (tokens,) each token's rank: the mean of `rung_ranks` (rungs,), weighted by `weights` (tokens, rungs). The
    scale of a token's weights has no effect."""
    total = weights.sum(axis=1)
    return (weights @ rung_ranks) / np.where(total == 0, 1, total)


def spread(weights: np.ndarray, columns: Sequence[int] | np.ndarray, width: int, padding: np.ndarray) -> np.ndarray:
    """Return (width, rungs) weights of a row: `weights` (tokens, rungs) at `columns`, and `padding` (rungs,) elsewhere.

    Padding gets the weights of a real token, so that a pass with padding can be uniform.
    """
    if len(columns) == width:
        return weights
    filled = np.repeat(padding[None], width, axis=0)
    filled[columns] = weights
    return filled
