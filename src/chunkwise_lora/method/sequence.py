"""Plans one sequence, independently of how an engine cuts its tokens into passes.

An engine may cut a prompt into several passes, compute a sequence again from its first token, or take the KV of a
prompt's beginning from a prefix cache. The plan does not depend on this: every token is fed to the scheduler once, in
order, and the plan of a token does not change afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from chunkwise_lora.method.complexity import LearnedComplexity
from chunkwise_lora.method.config import ChunkWiseConfig
from chunkwise_lora.method.fixed_scheduler import FixedScheduler
from chunkwise_lora.method.kv_policy import KVDecision
from chunkwise_lora.method.plan import ScheduledChunk
from chunkwise_lora.method.scheduler import RuntimeScheduler
from chunkwise_lora.method.segments import limited, ranks_of
from chunkwise_lora.method.trace import SequenceTrace


@dataclass(frozen=True, eq=False)
class AdapterInfo:
    """What planning needs to know about a loaded adapter."""

    key: str
    """Identifies the adapter among those that are loaded."""
    name: str
    """What users call it. Two adapters may share a name."""
    rung_ranks: np.ndarray
    """(rungs,) the mean rank of each rung."""
    rung_bytes: np.ndarray
    """(rungs,) bytes of factors that a pass reads at each rung."""
    learned: LearnedComplexity | None = None
    """What calibration learned about the adapter; None if the ladder holds nothing learned."""

    def __deepcopy__(self, memo: dict[int, object]) -> AdapterInfo:
        """Return the same object, which never changes."""
        return self

    def has_rungs_of(self, other: AdapterInfo) -> bool:
        """Return whether a plan for the other adapter is valid for this one: both have the same rung ranks."""
        return self is other or np.array_equal(self.rung_ranks, other.rung_ranks)


NO_ADAPTER = AdapterInfo("", "", np.zeros(1), np.zeros(1, np.int64), LearnedComplexity.neutral())
"""The base model without an adapter, as one rung of rank 0."""


class SequencePlanner:
    """Plans the tokens of one sequence and keeps the plan.

    Args:
        adapter: The adapter that the sequence runs with.
        config: The settings that its plan follows.
        vocab_size: Entries of the model's vocabulary, for the entropy signal.
        prompt: Token ids that are known from the start. The first pass may begin after some of them, if their KV is
            cached.
        prompt_length: Positions below this are planned without entropies; by default the length of `prompt`.
        highest_rung: No token gets a higher rung, because an engine does not hold it. None: there is no limit.
    """

    def __init__(
        self,
        adapter: AdapterInfo,
        config: ChunkWiseConfig,
        vocab_size: int,
        prompt: Sequence[int] = (),
        prompt_length: int | None = None,
        highest_rung: int | None = None,
    ) -> None:
        self.adapter = adapter
        self.config = config
        self.highest_rung = highest_rung
        self.prompt_length = len(prompt) if prompt_length is None else prompt_length
        self._vocab_size = vocab_size
        self._known = list(prompt)
        self._scheduler: RuntimeScheduler | FixedScheduler = self._new_scheduler()
        self._tokens: list[int] = []
        self._scheduled = 0  # tokens that the scheduler has got
        self._entropies: dict[int, float] = {}
        self._weights = np.empty((0, len(adapter.rung_ranks)), np.float32)
        self._decisions: list[KVDecision] = []
        self._rank_sum = 0.0
        self.constant_weights: np.ndarray | None = None
        """(rungs,) weights of every token, if the plan does not depend on the tokens; None otherwise."""
        if config.levels == 1:
            self.constant_weights = limited(self._new_scheduler().step([0]).weights[0], highest_rung)
            self._constant_rank = float(ranks_of(self.constant_weights[None], adapter.rung_ranks)[0])
        self._waits = self.constant_weights is not None and not config.kv_cache.acts
        """Whether the scheduler runs only when `chunks` is read, because all that it can decide is known."""

    @property
    def tokens(self) -> list[int]:
        """Token ids that were planned."""
        return self._tokens

    @property
    def weights(self) -> np.ndarray:
        """(tokens, rungs) weights over the rungs of all planned tokens."""
        return self._weights_of(0, len(self._tokens))

    @property
    def chunks(self) -> list[ScheduledChunk]:
        """All chunks so far. The last one is open."""
        self._schedule()
        return self._scheduler.chunks

    @property
    def last_weights(self) -> np.ndarray:
        """(rungs,) weights of the last planned token, or zeros before the first token."""
        count = len(self._tokens)
        return self._weights_of(count - 1, count)[0] if count else np.zeros(self._weights.shape[1], np.float32)

    @property
    def full_rank(self) -> float:
        """The rank of the adapter's highest rung."""
        return float(self.adapter.rung_ranks[-1])

    @property
    def available_rank(self) -> float:
        """The rank of the highest rung that a token may get."""
        rungs = self.adapter.rung_ranks
        return float(rungs[-1] if self.highest_rung is None else rungs[min(self.highest_rung, len(rungs) - 1)])

    @property
    def mean_rank(self) -> float:
        """The mean rank of all planned tokens, or of every token if the plan is constant."""
        if self.constant_weights is not None:
            return self._constant_rank
        return self._rank_sum / max(len(self._tokens), 1)

    def follow(self, scheduler: FixedScheduler) -> None:
        """Take the plan of `scheduler` instead of planning by the config. Call this before the first token."""
        self._scheduler = scheduler
        self.constant_weights, self._waits = None, False

    def learn(self, position: int, entropy: float) -> None:
        """Store the entropy, in nats, of the distribution that predicts the token at `position`. Entropies of prompt
        tokens are ignored."""
        if position >= self.prompt_length:
            self._entropies.setdefault(position, entropy)

    def plan(self, start: int, tokens: Sequence[int]) -> np.ndarray:
        """Plan the tokens from position `start` on, and return their weights (len(tokens), rungs)."""
        if start > len(self._tokens):  # their KV was cached, or they ran before this plan began
            self._feed(self._known[len(self._tokens) : start])
        planned = self._tokens[start : start + len(tokens)]
        if planned != tokens[: len(planned)]:  # the engine dropped tokens that it had sampled, and sampled others
            changed = next(i for i, (a, b) in enumerate(zip(planned, tokens, strict=False)) if a != b)
            self.rewind(start + changed)
            planned = planned[:changed]
        self._feed(tokens[len(planned) :])
        return self._weights_of(start, start + len(tokens))

    def _weights_of(self, start: int, end: int) -> np.ndarray:
        if self._waits:
            assert self.constant_weights is not None
            return self.constant_weights[None].repeat(end - start, axis=0)
        return self._weights[start:end]

    def rewind(self, position: int) -> None:
        """Forget the tokens from `position` on. The tokens before it are planned again, with their KV decisions."""
        tokens, self._tokens, self._scheduled = self._tokens[:position], [], 0
        self._rank_sum = 0.0
        self._entropies = {at: value for at, value in self._entropies.items() if at <= position}
        self._scheduler = self._new_scheduler()
        self._feed(tokens)

    def fork(self) -> SequencePlanner:
        """Return an independent copy. Objects that never change are shared."""
        shared = (self.adapter.learned, self.config)
        return copy.deepcopy(self, {id(item): item for item in shared})

    def take_decisions(self) -> list[KVDecision]:
        """Return the KV decisions made since the last call, in order."""
        decisions, self._decisions = self._decisions, []
        return decisions

    def trace(self) -> SequenceTrace:
        """Return what happened so far."""
        ranks = self.adapter.rung_ranks
        return SequenceTrace(
            adapter=None if self.adapter is NO_ADAPTER else self.adapter.name,
            tokens=tuple(self._tokens),
            ranks=tuple(ranks_of(self.weights, ranks).tolist()),
            full_rank=self.full_rank,
            chunks=tuple(self.chunks),
        )

    def _new_scheduler(self) -> RuntimeScheduler:
        ranks = self.adapter.rung_ranks.tolist()
        return RuntimeScheduler(self.config, ranks, self._vocab_size, self.adapter.learned)

    def _feed(self, tokens: Sequence[int]) -> None:
        self._tokens += tokens
        if not self._waits:
            self._schedule()

    def _schedule(self) -> None:
        """Give the scheduler the tokens that it has not got."""
        start, end = self._scheduled, len(self._tokens)
        if start == end:
            return
        tokens = self._tokens[start:end]
        plan = self._scheduler.step(tokens, [self._entropies.get(position) for position in range(start, end)])
        self._scheduled = end
        self._decisions += plan.decisions
        if self._waits:
            return
        if end > len(self._weights):
            grown = np.empty((max(end, 2 * len(self._weights)), self._weights.shape[1]), np.float32)
            grown[:start] = self._weights[:start]
            self._weights = grown
        self._weights[start:end] = weights = limited(plan.weights, self.highest_rung)
        self._rank_sum += float(ranks_of(weights, self.adapter.rung_ranks).sum())
