"""Plans forward passes over many sequences: one `SequencePlanner` per sequence, one `PassPlan` per pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from chunkwise_lora.method.segments import PassPlan, Segment, highest_rungs, ranks_of, segments_of, spread
from chunkwise_lora.method.sequence import NO_ADAPTER, AdapterInfo, SequencePlanner


@dataclass
class Usage:
    """How much of one adapter ran in a pass."""

    name: str
    """Name of the adapter, as users call it."""
    tokens: np.ndarray
    """(rungs,) number of tokens by their highest rung."""
    rung_ranks: np.ndarray
    """(rungs,) the mean rank of each rung."""
    rank: float
    """Sum of the tokens' ranks."""
    seconds: float = 0.0
    """Seconds spent on planning."""

    @classmethod
    def of(cls, adapter: AdapterInfo, weights: np.ndarray) -> Usage:
        """Return the usage of an adapter by tokens with `weights` (tokens, rungs)."""
        counts = np.bincount(highest_rungs(weights), minlength=weights.shape[1])
        return cls(adapter.name, counts, adapter.rung_ranks, float(ranks_of(weights, adapter.rung_ranks).sum()))


@dataclass(frozen=True)
class Span:
    """The tokens of one sequence in a pass: `count` from position `start` on."""

    sequence: Hashable
    """Key of the sequence."""
    start: int
    count: int
    columns: np.ndarray | None = None
    """(count,) column of each token in its row of the pass. None: the tokens fill the row without padding."""


class BatchPlanner:
    """Plans forward passes over many sequences. Sequences without an adapter need not be opened.

    Args:
        vocab_size: Entries of the model's vocabulary, for the entropy signal.
        feeds_all: Whether sequences with constant weights get their tokens, too, so that they have chunks and KV
            decisions.
        record: Called for every pass with the key and the usage of each adapter. None: usage is not recorded.
    """

    def __init__(
        self, vocab_size: int, feeds_all: bool = False, record: Callable[[str, Usage], None] | None = None
    ) -> None:
        self.vocab_size = vocab_size
        self.record = record
        self.seconds = 0.0
        """Seconds spent on planning, over all passes."""
        self._feeds_all = feeds_all
        self._sequences: dict[Hashable, SequencePlanner] = {}
        self._constant: _PlannedPass | None = None

    def __len__(self) -> int:
        """Return the number of open sequences."""
        return len(self._sequences)

    def __getitem__(self, sequence: Hashable) -> SequencePlanner:
        return self._sequences[sequence]

    def get(self, sequence: Hashable) -> SequencePlanner | None:
        """Return the planner of a sequence, or None if the sequence is not open."""
        return self._sequences.get(sequence)

    def open(self, sequence: Hashable, planner: SequencePlanner) -> None:
        """Start to plan a sequence by `planner`, which replaces an earlier planner of the same sequence."""
        self._constant = None
        self._sequences[sequence] = planner

    def close(self, sequences: Iterable[Hashable]) -> None:
        """Remove sequences that have ended. Sequences that are not open are ignored."""
        for sequence in sequences:
            if self._sequences.pop(sequence, None) is not None:
                self._constant = None

    def reorder(self, sources: Mapping[Hashable, Hashable]) -> None:
        """Replace every sequence's planner by a copy of its source's planner, as a beam search demands.

        Args:
            sources: By sequence, the sequence to copy. Sequences that are not among the keys are closed.
        """
        if len(sources) != len(self._sequences) or any(sequence != source for sequence, source in sources.items()):
            self._constant = None
            self._sequences = {sequence: self._sequences[source].fork() for sequence, source in sources.items()}

    def plan(
        self, spans: Sequence[Span], read_ids: Callable[[], Sequence[Sequence[int]]], width: int | None = None
    ) -> PassPlan:
        """Plan a forward pass.

        Args:
            spans: The sequences of the pass, in order.
            read_ids: Returns the token ids of each span. It is called only if they are needed, because an engine may
                have to wait for the device.
            width: Columns of each sequence's row, padding included. None: all spans follow one another in one row.
        """
        sequences = [self._sequences.get(span.sequence) for span in spans]
        is_constant = all(planner is None or planner.constant_weights is not None for planner in sequences)
        ids = read_ids() if self._feeds_all or not is_constant else None
        started = time.perf_counter()  # after read_ids, which may wait for a device
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
        seconds = time.perf_counter() - started
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
        by_adapter: dict[str, tuple[AdapterInfo, list[np.ndarray], list[np.ndarray]]] = {}
        end = 0
        for i, (span, sequence) in enumerate(zip(spans, sequences, strict=True)):
            start, end = end, end + (span.count if width is None else width)
            if sequence is None:
                continue
            constant = sequence.constant_weights
            if constant is not None and not self._feeds_all:  # its earlier tokens may have run without being read
                weights = np.repeat(constant[None], span.count, axis=0)
            else:
                assert ids is not None
                weights = sequence.plan(span.start, ids[i])
            if span.columns is not None:
                weights = spread(weights, span.columns, end - start, sequence.last_weights)
            if sequence.adapter is NO_ADAPTER:
                continue
            _, all_weights, rows = by_adapter.setdefault(sequence.adapter.key, (sequence.adapter, [], []))
            all_weights.append(weights)
            rows.append(np.arange(start, end))
        segments: list[Segment] = []
        usage: dict[str, Usage] = {}
        for key, (adapter, all_weights, rows) in by_adapter.items():
            weights = all_weights[0] if len(all_weights) == 1 else np.concatenate(all_weights)
            positions = None if len(weights) == end else np.concatenate(rows)
            segments += segments_of(key, weights, adapter.rung_ranks, positions)
            if self.record is not None:
                usage[key] = Usage.of(adapter, weights)
        batch, columns = (1, end) if width is None else (len(spans), width)
        return PassPlan(tuple(segments), batch, columns), usage


@dataclass(frozen=True)
class _PlannedPass:
    """A planned pass. If all its weights are constant, the next pass of the same shape uses it again."""

    shape: tuple[int | None, list[tuple[Hashable, int]]]
    plan: PassPlan
    usage: dict[str, Usage]
