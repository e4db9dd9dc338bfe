"""Component 2: where does one chunk end and the next begin? (arXiv 2601.21109, adaptive chunker)"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from chunkwise_lora.method.config import ChunkingConfig


@dataclass(frozen=True)
class Chunk:
    """Adjacent tokens of one sequence that share a rank, a scale and a KV policy."""

    start: int
    """Position of the first token."""
    level: int
    """Number of thresholds below the running mean when the chunk opened; 0 is easiest."""
    complexity: float
    """The running mean complexity when the chunk opened, in [0, 1]."""
    end: int | None = None
    """Position after the last token; None while the chunk is open."""


class AdaptiveChunker:
    """Cuts one sequence into chunks by its complexity scores, token by token.

    A chunk ends when it is `max_length` tokens long. It ends earlier, after at least `min_length` tokens, when the
    running mean of the scores has crossed a threshold by more than `hysteresis`. The running mean is exponential with
    a length of `memory` tokens.

    A chunk of the highest level opens only while at most `hard_share` of the tokens so far were at that level. So the
    first n tokens of a sequence hold at most `hard_share * n + max_length` tokens of that level.
    """

    def __init__(self, config: ChunkingConfig) -> None:
        self.config = config
        self._chunk: Chunk | None = None
        self._mean = 0.0
        self._position = 0
        self._hard_tokens = 0

    @property
    def chunk(self) -> Chunk | None:
        """The open chunk; None before the first token."""
        return self._chunk

    def update(self, scores: Sequence[float]) -> list[Chunk]:
        """Assign the next tokens, with (n,) scores in [0, 1], to chunks. Returns (n,) each token's chunk."""
        config, chunk, mean, position = self.config, self._chunk, self._mean, self._position
        hardest = len(config.thresholds)
        placed = []
        for score in scores:
            mean += (score - mean) / min(config.memory, position + 1)
            if chunk is None or (position - chunk.start >= config.min_length and self._is_cut(chunk, mean, position)):
                chunk = Chunk(position, self._affordable_level(mean, position), mean)
            self._hard_tokens += chunk.level == hardest
            position += 1
            placed.append(chunk)
        self._chunk, self._mean, self._position = chunk, mean, position
        return placed

    def _is_cut(self, chunk: Chunk, mean: float, position: int) -> bool:
        """Return whether a chunk that is long enough ends before the token at `position`."""
        if position - chunk.start >= self.config.max_length:
            return True
        margin = self.config.hysteresis
        thresholds = self.config.thresholds
        if chunk.level > 0 and mean < thresholds[chunk.level - 1] - margin:
            return True
        risen = chunk.level < len(thresholds) and mean > thresholds[chunk.level] + margin
        # If the budget does not allow the highest level, the next chunk would get the same level again.
        return risen and self._affordable_level(mean, position) > chunk.level

    def _affordable_level(self, mean: float, position: int) -> int:
        level = bisect_right(self.config.thresholds, mean)
        hardest = len(self.config.thresholds)
        over_budget = self._hard_tokens > self.config.hard_share * position
        return level - 1 if level == hardest > 0 and over_budget else level
