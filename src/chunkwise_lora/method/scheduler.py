"""The runtime scheduler: the paper's five components for one sequence (arXiv 2601.21109). It needs no engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

from chunkwise_lora.errors import ConfigError
from chunkwise_lora.method.chunking import AdaptiveChunker, Chunk
from chunkwise_lora.method.complexity import LearnedComplexity, TokenComplexityEstimator
from chunkwise_lora.method.composition import BoundarySafeComposer
from chunkwise_lora.method.config import ChunkWiseConfig
from chunkwise_lora.method.kv_policy import KVCachePolicyController, KVDecision
from chunkwise_lora.method.plan import Plan, ScheduledChunk
from chunkwise_lora.method.selection import RankScaleSelector, Selection

NOTHING_LEARNED = (
    "the config sets complexity.learned, but the ladder holds nothing learned; run `chunkwise calibrate` for this "
    "adapter, or choose a preset"
)


@dataclass
class RuntimeScheduler:
    """Plans the tokens of one sequence.

    Each token runs through: complexity -> chunk -> rank and scale -> weights over the rungs. A closed chunk gets a KV
    decision.
    A plan is causal and does not depend on how the tokens are cut into calls of `step`.

    Raises:
        ConfigError: `config` asks for learned scores and `learned` is None.
    """

    config: ChunkWiseConfig
    rung_ranks: Sequence[float]
    """(rungs,) mean rank of each rung of the ladder, lowest first."""
    vocab_size: int
    """Entries of the model's vocabulary."""
    learned: LearnedComplexity | None = None
    """What calibration learned about the adapter. Used only if the config asks for it."""
    chunks: list[ScheduledChunk] = field(default_factory=list, init=False)
    """All chunks so far. The last one is open."""
    position: int = field(default=0, init=False)
    """Number of tokens planned so far."""

    def __post_init__(self) -> None:
        config = self.config
        if config.complexity.learned and self.learned is None:
            raise ConfigError(NOTHING_LEARNED)
        learned = self.learned if config.complexity.learned else None
        self._estimator = TokenComplexityEstimator(config.complexity, self.vocab_size, learned)
        self._chunker = AdaptiveChunker(config.chunking)
        self._selector = RankScaleSelector(config.selection, self.rung_ranks)
        self._composer = BoundarySafeComposer(config.composition, len(self.rung_ranks))
        self._kv = KVCachePolicyController(config.kv_cache)

    def step(self, tokens: Sequence[int], entropies: Sequence[float | None] | None = None) -> Plan:
        """Plan the next tokens, before the engine runs them.

        Args:
            tokens: (n,) token ids.
            entropies: (n,) entropy in nats of the distribution that predicted each token, None where not known.
        """
        scores = self._scores(tokens, entropies)
        parts: list[tuple[Selection, int, int]] = []
        decisions: list[KVDecision] = []
        for chunk, members in groupby(self._chunker.update(scores)):
            if not self.chunks or chunk is not self.chunks[-1].chunk:
                decisions += self._close_chunk(chunk.start)
                self.chunks.append(ScheduledChunk(chunk, self._selector.select(chunk)))
            offset, count = self.position - chunk.start, len(list(members))
            self.position += count
            decisions += self._kv.expire(self.position - 1)
            parts.append((self.chunks[-1].selection, offset, count))
        return Plan(self._composer.weights(parts), decisions)

    def _scores(self, tokens: Sequence[int], entropies: Sequence[float | None] | None) -> list[float]:
        if self.config.levels == 1:  # no score can change the plan
            return [0.0] * len(tokens)
        return self._estimator.update(tokens, entropies or [None] * len(tokens))

    def _close_chunk(self, end: int) -> list[KVDecision]:
        """Close the open chunk, if there is one, before the token at `end`; return its KV decision."""
        if not self.chunks:
            return []
        chunk, selection = self.chunks[-1].chunk, self.chunks[-1].selection
        closed = Chunk(chunk.start, chunk.level, chunk.complexity, end)
        decision = self._kv.close(closed)
        self.chunks[-1] = ScheduledChunk(closed, selection, decision)
        return [] if decision is None else [decision]
