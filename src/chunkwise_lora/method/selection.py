"""Component 3: which rung of the ladder, at which scale? (paper, rank and scale selector)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chunkwise_lora.method.chunking import Chunk
from chunkwise_lora.method.config import SelectionConfig


@dataclass(frozen=True)
class Selection:
    """A rung of the ladder (0 is the lowest) and the factor on the adapter's output."""

    rung: int
    scale: float


class RankScaleSelector:
    """Maps a chunk's level to the rung whose share of the full rank is nearest to the configured one.

    `rung_ranks` are the mean ranks of the ladder's rungs, lowest first.
    """

    def __init__(self, config: SelectionConfig, rung_ranks: Sequence[float]) -> None:
        full = rung_ranks[-1]
        self._by_level = tuple(
            Selection(min(range(len(rung_ranks)), key=lambda rung: abs(rung_ranks[rung] - share * full)), scale)
            for share, scale in zip(config.rank_shares, config.scales, strict=True)
        )

    def select(self, chunk: Chunk) -> Selection:
        """Rung and scale of `chunk`."""
        return self._by_level[chunk.level]
