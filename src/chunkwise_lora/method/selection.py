"""Component 3: which rung of the ladder, at which scale? (arXiv 2601.21109, rank and scale selector)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chunkwise_lora.method.chunking import Chunk
from chunkwise_lora.method.config import SelectionConfig


@dataclass(frozen=True)
class Selection:
    """The rung and scale of a chunk."""

    rung: int
    """Index of the rung; 0 is the lowest."""
    scale: float
    """Factor on the adapter's output."""


class RankScaleSelector:
    """Gives each chunk the rung of its level.

    A level's rung is the one whose rank is nearest to the configured share of the full rank.

    Args:
        config: Share and scale of each level.
        rung_ranks: (rungs,) mean rank of each rung of the ladder, lowest first.
    """

    def __init__(self, config: SelectionConfig, rung_ranks: Sequence[float]) -> None:
        full = rung_ranks[-1]
        self._by_level = tuple(
            Selection(min(range(len(rung_ranks)), key=lambda rung: abs(rung_ranks[rung] - share * full)), scale)
            for share, scale in zip(config.rank_shares, config.scales, strict=True)
        )

    @property
    def highest_rung(self) -> int:
        """The highest rung that any chunk can get."""
        return max(selection.rung for selection in self._by_level)

    def select(self, chunk: Chunk) -> Selection:
        """Return the rung and scale of a chunk."""
        return self._by_level[chunk.level]
