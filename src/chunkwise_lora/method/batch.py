"""Planning of forward passes over many sequences: a `RuntimeScheduler` per sequence, one `PassPlan` per pass.

An engine cuts the tokens of a sequence into passes as it likes: a prompt comes in pieces, a sequence may be computed
again from its first token, and the KV of a prompt's beginning may come from a prefix cache. A plan depends on none of
that: every token is fed to the scheduler once, in order, and the plan of a position stays.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from chunkwise_lora.method.complexity import LearnedComplexity
from chunkwise_lora.method.config import ChunkWiseConfig
from chunkwise_lora.method.kv_policy import KVDecision
from chunkwise_lora.method.scheduler import FixedScheduler, RuntimeScheduler, ScheduledChunk
from chunkwise_lora.method.segments import PassPlan, Segment, highest_rungs, ranks_of, segments_of, spread


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


@dataclass
class Usage:
    """What ran of one adapter in a pass."""

    name: str
    tokens: np.ndarray
    """(rungs,) tokens by their highest rung."""
    rank: float
    """Sum of the tokens' ranks."""
    seconds: float = 0.0
    """Time spent in planning."""

    @classmethod
    def of(cls, adapter: AdapterInfo, weights: np.ndarray) -> Usage:
        """That of tokens with these weights (tokens, rungs)."""
        rungs = np.bincount(highest_rungs(weights), minlength=weights.shape[1])
        return cls(adapter.name, rungs, float(ranks_of(weights, adapter.rung_ranks).sum()))


@dataclass(frozen=True)
class Span:
    """The tokens of one sequence in a pass: `count` from position `start` on."""

    sequence: Hashable
    start: int
    count: int
    columns: np.ndarray | None = None
    """(count,) where the tokens stand in their row of the pass; None where they fill it, without padding."""


class BatchPlanner:
    """Plans forward passes over many sequences. Sequences without an adapter need not be known to it.

    Args:
        vocab_size: Of the model, for the entropy signal.
        feeds_all: Whether sequences whose weights are constant are fed their tokens too, for their chunks and KV
            decisions.
        record: Is told, by adapter key, what every pass runs; None where nobody asks.
    """

    def __init__(
        self, vocab_size: int, feeds_all: bool = False, record: Callable[[str, Usage], None] | None = None
    ) -> None:
        self.vocab_size = vocab_size
        self.record = record
        self.seconds = 0.0
        """Time spent in planning."""
        self._feeds_all = feeds_all
        self._sequences: dict[Hashable, SequencePlanner] = {}
        self._constant: _PlannedPass | None = None

    def __len__(self) -> int:
        """Sequences that are being planned."""
        return len(self._sequences)

    def __getitem__(self, sequence: Hashable) -> SequencePlanner:
        return self._sequences[sequence]

    def get(self, sequence: Hashable) -> SequencePlanner | None:
        """The plan of a sequence, None where it is not being planned."""
        return self._sequences.get(sequence)

    def open(self, sequence: Hashable, planner: SequencePlanner) -> None:
        """Begin to plan a sequence, or begin anew."""
        self._constant = None
        self._sequences[sequence] = planner

    def close(self, sequences: Iterable[Hashable]) -> None:
        """Forget sequences that have ended, in whatever way."""
        for sequence in sequences:
            self._sequences.pop(sequence, None)

    def reorder(self, sources: Mapping[Hashable, Hashable]) -> None:
        """Let each sequence become a copy of another one, as a beam search chose."""
        if any(sequence != source for sequence, source in sources.items()):
            self._sequences = {one: self._sequences[source].fork() for one, source in sources.items()}

    def plan(
        self, spans: Sequence[Span], read_ids: Callable[[], Sequence[Sequence[int]]], width: int | None = None
    ) -> PassPlan:
        """What the pass over `spans` runs.

        Args:
            spans: The sequences of the pass, in order.
            read_ids: Gives the token ids of each span. It is called only if they are needed, since an engine may have
                to wait for them.
            width: Columns of each sequence's row, padding included; None where the spans stand one after the other.
        """
        sequences = [self._sequences.get(span.sequence) for span in spans]
        is_constant = all(one is None or one.constant_weights is not None for one in sequences)
        ids = read_ids() if self._feeds_all or not is_constant else None
        begun = time.perf_counter()  # not before: a device may have been waited for
        shape = (width, [(span.sequence, span.count) for span in spans])
        if self._constant is not None and self._constant.shape == shape:
            planned = self._constant
            if ids is not None:
                for span, tokens, sequence in zip(spans, ids, sequences, strict=True):
                    if sequence is not None:
                        sequence.plan(span.start, tokens)
        else:
            planned = _PlannedPass(shape, *self._planned(spans, sequences, ids, width))
            self._constant = planned if is_constant else None
        seconds = time.perf_counter() - begun
        self.seconds += seconds
        for key, usage in planned.usage.items():
            usage.seconds = seconds / len(planned.usage)
            if self.record is not None:
                self.record(key, usage)
        return planned.plan

    def _planned(
        self,
        spans: Sequence[Span],
        sequences: Sequence[SequencePlanner | None],
        ids: Sequence[Sequence[int]] | None,
        width: int | None,
    ) -> tuple[PassPlan, dict[str, Usage]]:
        of_adapters: dict[str, tuple[AdapterInfo, list[np.ndarray], list[np.ndarray]]] = {}
        end = 0
        for i, (span, sequence) in enumerate(zip(spans, sequences, strict=True)):
            start, end = end, end + (span.count if width is None else width)
            if sequence is None:
                continue
            if ids is not None:
                weights = sequence.plan(span.start, ids[i])
            else:
                assert sequence.constant_weights is not None
                weights = np.repeat(sequence.constant_weights[None], span.count, axis=0)
            if span.columns is not None:
                weights = spread(weights, span.columns, end - start, sequence.padding)
            if sequence.adapter is NO_ADAPTER:
                continue
            _, all_weights, rows = of_adapters.setdefault(sequence.adapter.key, (sequence.adapter, [], []))
            all_weights.append(weights)
            rows.append(np.arange(start, end))
        segments: list[Segment] = []
        usage: dict[str, Usage] = {}
        for key, (adapter, all_weights, rows) in of_adapters.items():
            weights = all_weights[0] if len(all_weights) == 1 else np.concatenate(all_weights)
            where = None if len(weights) == end else np.concatenate(rows)
            segments += segments_of(key, weights, adapter.rung_ranks, where)
            if self.record is not None:
                usage[key] = Usage.of(adapter, weights)
        batch, columns = (1, end) if width is None else (len(spans), width)
        return PassPlan(tuple(segments), batch, columns), usage


@dataclass(frozen=True)
class _PlannedPass:
    """A planned pass; where no plan can change, the next pass over the same sequences runs alike."""

    shape: tuple[int | None, list[tuple[Hashable, int]]]
    plan: PassPlan
    usage: dict[str, Usage]
