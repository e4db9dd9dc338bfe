"""Planning of forward passes over many sequences: one `SequencePlanner` per sequence, one `PassPlan` per pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from chunkwise_lora.method.segments import PassPlan, Segment, highest_rungs, ranks_of, segments_of, spread
from chunkwise_lora.method.sequence import NO_ADAPTER, AdapterInfo, SequencePlanner


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
