"""The runtime scheduler: components 1 to 5 for one sequence. It knows no engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from chunkwise_lora.errors import ConfigError
from chunkwise_lora.method.chunking import AdaptiveChunker, Chunk
from chunkwise_lora.method.complexity import LearnedComplexity, TokenComplexityEstimator
from chunkwise_lora.method.composition import BoundarySafeComposer
from chunkwise_lora.method.config import ChunkWiseConfig
from chunkwise_lora.method.kv_policy import KVCachePolicyController, KVDecision
from chunkwise_lora.method.selection import RankScaleSelector, Selection


@dataclass(frozen=True)
class Plan:
    """What an engine does for the next tokens of one sequence."""

    weights: np.ndarray
    """(tokens, rungs) float32: how much of each rung every token gets."""
    decisions: list[KVDecision]
    """KV decisions that fall due once these tokens are in the cache, in order."""


@dataclass(frozen=True)
class ScheduledChunk:
    """A chunk with all that was decided for it."""

    chunk: Chunk
    selection: Selection
    kv: KVDecision | None = None
    """None while the chunk is open, or where it holds only attention sinks."""


@dataclass
class FixedScheduler:
    """Stands in for a scheduler where every token's rung is decided beforehand: for measurements and rivals."""

    token_rungs: np.ndarray
    """(tokens,) the rung of every token."""
    rungs: int
    """Rungs of the ladder."""
    scale: float = 1.0
    """Of every token."""
    chunks: list[ScheduledChunk] = field(default_factory=list, init=False)
    position: int = field(default=0, init=False)

    def step(self, tokens: Sequence[int], entropies: Sequence[float | None] | None = None) -> Plan:
        """The plan of the next `tokens`."""
        start, self.position = self.position, self.position + len(tokens)
        weights = self.scale * np.eye(self.rungs, dtype=np.float32)[self.token_rungs[start : self.position]]
        return Plan(weights, [])


@dataclass
class RuntimeScheduler:
    """Turns token ids and entropies of one sequence into plans.

    Streaming and causal: the same tokens in any split give the same plan. `rung_ranks` are the mean ranks of
    the ladder's rungs, lowest first; `learned` is what calibration put into the ladder, if the config asks for it.

    Raises:
        ConfigError: The config asks for it and it is not there.
    """

    config: ChunkWiseConfig
    rung_ranks: Sequence[float]
    vocab_size: int
    learned: LearnedComplexity | None = None
    chunks: list[ScheduledChunk] = field(default_factory=list, init=False)
    """All chunks so far; the last one is open."""
    position: int = field(default=0, init=False)
    """Tokens seen."""

    def __post_init__(self) -> None:
        config = self.config
        if config.complexity.learned and self.learned is None:
            raise ConfigError(
                "complexity.learned is set, but the ladder holds nothing learned; run `chunkwise calibrate` for this "
                "adapter, or choose a preset"
            )
        learned = self.learned if config.complexity.learned else None
        self._estimator = TokenComplexityEstimator(config.complexity, self.vocab_size, learned)
        self._chunker = AdaptiveChunker(config.chunking)
        self._selector = RankScaleSelector(config.selection, self.rung_ranks)
        self._composer = BoundarySafeComposer(config.composition, len(self.rung_ranks))
        self._kv = KVCachePolicyController(config.kv_cache)

    def step(self, tokens: Sequence[int], entropies: Sequence[float | None] | None = None) -> Plan:
        """Plan the next `tokens`, before the engine runs them.

        `entropies` are those of the distributions that predicted the tokens, in nats, None where not known.
        """
        # With one level, no score can change the plan.
        scores = (
            self._estimator.update(tokens, entropies or [None] * len(tokens))
            if self.config.levels > 1
            else [0.0] * len(tokens)
        )
        weights = np.empty((len(tokens), len(self.rung_ranks)), np.float32)
        decisions: list[KVDecision] = []
        for row, chunk in enumerate(self._chunker.update(scores)):
            if not self.chunks or chunk is not self.chunks[-1].chunk:
                decisions += self._turn_to(chunk)
            decisions += self._kv.expire(self.position)
            weights[row] = self._composer.weights(self.chunks[-1].selection, self.position - chunk.start)
            self.position += 1
        return Plan(weights, decisions)

    def _turn_to(self, chunk: Chunk) -> list[KVDecision]:
        """Close the open chunk and open `chunk`."""
        decisions = []
        if self.chunks:
            closed = replace(self.chunks[-1].chunk, end=chunk.start)
            decision = self._kv.close(closed)
            self.chunks[-1] = replace(self.chunks[-1], chunk=closed, kv=decision)
            decisions = [decision] if decision else []
        self.chunks.append(ScheduledChunk(chunk, self._selector.select(chunk)))
        return decisions
