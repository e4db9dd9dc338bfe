"""From the plans of many sequences to the segments of one forward pass.

The weights of a plan, (tokens, rungs), say how much of each rung every token gets. A forward pass holds the tokens of
many sequences, each with its own adapter. A `Segment` gathers the tokens that one adapter runs for, and a `PassPlan`
is all that a pass runs. Both are decided once per pass, for all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

GROUPING_GAIN = 24.0
"""Tokens are grouped by rung when that saves this many directions per token: moving a token's activations into a
group and back costs about as much as that many of its directions."""


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
    """What one forward pass runs of adapters. No token is in two segments."""

    segments: tuple[Segment, ...]
    batch: int
    """Sequences of the pass, or 1 where their tokens stand in one row."""
    width: int
    """Tokens per sequence, padding included."""
    _views: dict[tuple[int, int], PassPlan] = field(default_factory=dict, repr=False)
    """Plans of layers that see other tokens, by batch and width."""

    @property
    def tokens(self) -> int:
        """Tokens of the pass, padding included."""
        return self.batch * self.width

    @cached_property
    def is_uniform(self) -> bool:
        """Whether every token gets the same rung of the same adapter, or none: then their order does not matter."""
        return all(segment.weights is None and segment.rows is None for segment in self.segments)

    @cached_property
    def adapters(self) -> tuple[str, ...]:
        """The adapter of each segment."""
        return tuple(segment.adapter for segment in self.segments)

    def tail(self, columns: int) -> PassPlan:
        """The plan of a layer that sees only the last `columns` tokens of each sequence, as an output head may."""
        return self._view(self.batch, columns)

    def with_tokens(self, tokens: int) -> PassPlan:
        """The same plan for any number of tokens in any order, which only a uniform plan has."""
        return self._view(1, tokens)

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


def segments_of(adapter: str, weights: np.ndarray, rung_ranks: np.ndarray, rows: np.ndarray | None) -> list[Segment]:
    """Choose how an adapter runs: one slice of its factors, one gated product, or tokens grouped by rung.

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
    """(tokens,) the highest rung with a weight in (tokens, rungs); 0 for a token without any."""
    active = weights != 0
    return np.where(active.any(axis=1), weights.shape[1] - 1 - np.argmax(active[:, ::-1], axis=1), 0)


def ranks_of(weights: np.ndarray, rung_ranks: np.ndarray) -> np.ndarray:
    """(tokens,) each token's rank: the mean of `rung_ranks` (rungs,) under its weights (tokens, rungs), at any
    scale."""
    total = weights.sum(axis=1)
    return (weights @ rung_ranks) / np.where(total == 0, 1, total)


def spread(weights: np.ndarray, columns: Sequence[int] | np.ndarray, width: int, padding: np.ndarray) -> np.ndarray:
    """(width, rungs) weights (tokens, rungs) at their `columns`; the other columns, which are padding, get `padding`.

    Padding runs like a real token, so that it does not keep a pass from being uniform.
    """
    if len(columns) == width:
        return weights
    filled = np.repeat(padding[None], width, axis=0)
    filled[columns] = weights
    return filled
