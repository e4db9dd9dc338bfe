"""The plan of one sequence, whatever passes its tokens come in.

An engine cuts the tokens of a sequence into passes as it likes: a prompt comes in pieces, a sequence may be computed
again from its first token, and the KV of a prompt's beginning may come from a prefix cache. A plan depends on none of
that: every token is fed to the scheduler once, in order, and the plan of a position stays.
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


@dataclass(frozen=True, eq=False)
class AdapterInfo:
    """What planning needs to know of a loaded adapter."""

    key: str
    """Identifies the adapter among those that are loaded."""
    name: str
    """What users call it. Two adapters may share a name."""
    rung_ranks: np.ndarray
    """(rungs,) the mean rank of each rung."""
    rung_bytes: np.ndarray
    """(rungs,) bytes of factors that a pass reads at each rung."""
    learned: LearnedComplexity | None = None
    """What calibration put into the ladder."""

    def has_rungs_of(self, other: AdapterInfo) -> bool:
        """Whether plans for the other adapter hold for this one."""
        return self is other or np.array_equal(self.rung_ranks, other.rung_ranks)


NO_ADAPTER = AdapterInfo("", "", np.zeros(1), np.zeros(1, np.int64), LearnedComplexity.neutral())
"""Stands for the base model: one rung of rank 0."""


class SequencePlanner:
    """The plan of one sequence so far.

    Args:
        adapter: The adapter that the sequence runs with.
        config: The settings that its plan follows.
        vocab_size: Of the model, for the entropy signal.
        prompt: Token ids that are known from the start. The first pass may begin behind them, where their KV was
            cached.
        prompt_length: Positions below this are planned without entropies; by default the length of `prompt`.
    """

    def __init__(
        self,
        adapter: AdapterInfo,
        config: ChunkWiseConfig,
        vocab_size: int,
        prompt: Sequence[int] = (),
        prompt_length: int | None = None,
    ) -> None:
        self.adapter = adapter
        self.config = config
        self.prompt_length = len(prompt) if prompt_length is None else prompt_length
        self._vocab_size = vocab_size
        self._known = list(prompt)
        self._scheduler: RuntimeScheduler | FixedScheduler = self._new_scheduler()
        self._tokens: list[int] = []
        self._entropies: dict[int, float] = {}
        self._weights = np.empty((0, len(adapter.rung_ranks)), np.float32)
        self._decisions: list[KVDecision] = []
        self.constant_weights: np.ndarray | None = None
        """(rungs,) the weights of every token, where no token can change them; None where plans depend on tokens."""
        if config.levels == 1:
            self.constant_weights = self._new_scheduler().step([0]).weights[0]

    @property
    def tokens(self) -> list[int]:
        """Token ids that were planned."""
        return self._tokens

    @property
    def weights(self) -> np.ndarray:
        """(tokens, rungs) weights over the rungs of all planned tokens."""
        return self._weights[: len(self._tokens)]

    @property
    def chunks(self) -> list[ScheduledChunk]:
        """All chunks so far; the last one is open."""
        return self._scheduler.chunks

    @property
    def padding(self) -> np.ndarray:
        """(rungs,) weights for padding: those of the last planned token, zeros before the first."""
        return self._weights[len(self._tokens) - 1] if self._tokens else np.zeros(self._weights.shape[1], np.float32)

    def follow(self, scheduler: FixedScheduler) -> None:
        """Before the first token: take the plan of `scheduler` instead of the config's."""
        self._scheduler = scheduler
        self.constant_weights = None

    def learn(self, position: int, entropy: float) -> None:
        """Note the entropy, in nats, of the distribution that gives the token at `position`. In the prompt it is
        ignored."""
        if position >= self.prompt_length:
            self._entropies.setdefault(position, entropy)

    def plan(self, start: int, tokens: Sequence[int]) -> np.ndarray:
        """(len(tokens), rungs) the weights of the tokens from position `start` on."""
        if start > len(self._tokens):  # their KV was cached, or they ran before this plan began
            self._feed(self._known[len(self._tokens) : start])
        planned = self._tokens[start : start + len(tokens)]
        if planned != tokens[: len(planned)]:  # the engine dropped tokens that it had sampled, and sampled others
            changed = next(i for i, (a, b) in enumerate(zip(planned, tokens, strict=False)) if a != b)
            self._rewind(start + changed)
            planned = planned[:changed]
        self._feed(tokens[len(planned) :])
        return self._weights[start : start + len(tokens)]

    def fork(self) -> SequencePlanner:
        """A copy that goes on by itself; what never changes is shared."""
        shared = (self.adapter, self.adapter.learned, self.config)
        return copy.deepcopy(self, {id(one): one for one in shared})

    def take_decisions(self) -> list[KVDecision]:
        """The KV decisions that have fallen due since the last call, in order."""
        decisions, self._decisions = self._decisions, []
        return decisions

    def _new_scheduler(self) -> RuntimeScheduler:
        ranks = self.adapter.rung_ranks.tolist()
        return RuntimeScheduler(self.config, ranks, self._vocab_size, self.adapter.learned)

    def _feed(self, tokens: Sequence[int]) -> None:
        start, end = len(self._tokens), len(self._tokens) + len(tokens)
        plan = self._scheduler.step(tokens, [self._entropies.get(position) for position in range(start, end)])
        self._tokens += tokens
        self._decisions += plan.decisions
        if end > len(self._weights):
            grown = np.empty((max(end, 2 * len(self._weights)), self._weights.shape[1]), np.float32)
            grown[:start] = self._weights[:start]
            self._weights = grown
        self._weights[start:end] = plan.weights

    def _rewind(self, position: int) -> None:
        tokens, self._tokens = self._tokens[:position], []
        self._entropies = {at: value for at, value in self._entropies.items() if at <= position}
        self._scheduler = self._new_scheduler()
        self._feed(tokens)
