"""The sequences in one llama.cpp context: what each of them runs with, its plan, and its place in the passes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from llama_cpp import llama_cpp

from chunkwise_lora.engines.llama_cpp import kv
from chunkwise_lora.engines.llama_cpp.fallback import OwnLora
from chunkwise_lora.engines.llama_cpp.graph import Graph
from chunkwise_lora.errors import EngineError
from chunkwise_lora.method.batch import BatchPlanner, Span
from chunkwise_lora.method.config import ChunkWiseConfig
from chunkwise_lora.method.sequence import NO_ADAPTER, AdapterInfo, SequencePlanner
from chunkwise_lora.method.trace import Trace


@dataclass(frozen=True, eq=False)
class Request:
    """What a sequence runs with."""

    adapter: AdapterInfo
    config: ChunkWiseConfig
    asked: ChunkWiseConfig | None = None
    """The config that the caller gave, if any."""


@dataclass
class Running:
    """A sequence whose tokens are in the context."""

    sequence: int
    """Its number in llama.cpp."""
    request: Request
    planner: SequencePlanner
    dropped: list[tuple[int, int]] = field(default_factory=list)
    """Positions whose keys and values have left the cache, as (start, end)."""


class StateError(EngineError, KeyError):
    """A saved state that cannot be restored. For a cache of states, it is as if it were not there."""

    __str__ = Exception.__str__


class Session:
    """The texts in a context: one, which is sequence 0, or several in a batch or for embeddings.

    Args:
        llm: The `llama_cpp.Llama` whose context it is.
        graph: Runs the adapters.
        request: Returns the request of a text that begins without one.
    """

    def __init__(self, llm: Any, graph: Graph | OwnLora, request: Callable[[], Request]) -> None:
        self._llm = llm
        self._graph = graph
        self._request = request
        self._vocab_size = llm.n_vocab()
        self._decode = llm._ctx.decode
        self._last: Trace | None = None
        self._reset()

    def _reset(self) -> None:
        self.planner = BatchPlanner(self._vocab_size, feeds_all=True)
        self._running: dict[Hashable, Running] = {}
        self._passes = 0
        self._bytes_read = 0

    def begin(self, request: Request, prompt: Sequence[int]) -> None:
        """Begin a text with the tokens `prompt`, which are planned without entropies. It replaces all others."""
        self._reset()
        self._open(0, request, prompt)

    def begin_batch(self, texts: Sequence[tuple[int, Request, Sequence[int]]]) -> None:
        """Begin several texts in an empty context: the sequence, the request and the prompt of each."""
        self._reset()
        self._llm._ctx.kv_cache_clear()
        self._llm.n_tokens = 0
        for sequence, request, prompt in texts:
            self._open(sequence, request, prompt)

    @property
    def first(self) -> Running | None:
        """Sequence 0, if it is running."""
        return self._running.get(0)

    def begins(self, position: int, sequence: int = 0) -> bool:
        """Return whether tokens at `position` of a sequence begin a text that was not opened yet."""
        running = self._running.get(sequence)
        return running is None or (position == 0 and bool(running.planner.tokens))

    def end(self) -> None:
        """Forget all texts, except for the trace of the last request."""
        self._last = self.trace()
        self._reset()

    def saved(self) -> Running | None:
        """Return a copy of sequence 0, to save it with the context; None if there is none."""
        running = self.first
        return running and replace(running, planner=running.planner.fork(), dropped=list(running.dropped))

    def restore(self, running: Running | None, adapters: Mapping[str, AdapterInfo]) -> None:
        """Continue a sequence that `saved` returned.

        Args:
            running: The sequence.
            adapters: The loaded adapters, by key.

        Raises:
            StateError: Its adapter is not loaded.
        """
        if running is None:
            self._reset()
            return
        saved = running.request.adapter
        adapter = NO_ADAPTER if saved.key == NO_ADAPTER.key else adapters.get(saved.key)
        if adapter is None:
            raise StateError(f"the state was saved with adapter {saved.name!r}, which is not loaded; load it")
        self._reset()
        planner = running.planner.fork()
        planner.adapter = adapter
        self._add(Running(0, Request(adapter, running.request.config), planner, list(running.dropped)))

    def _open(self, sequence: int, request: Request, prompt: Sequence[int]) -> None:
        planner = SequencePlanner(request.adapter, request.config, self._vocab_size, prompt)
        self._add(Running(sequence, request, planner))

    def _add(self, running: Running) -> None:
        self._running[running.sequence] = running
        self.planner.open(running.sequence, running.planner)

    def reusable(self, request: Request, tokens: Sequence[int], kept: int) -> int:
        """Return how many of the first `kept` tokens in the context a new request with prompt `tokens` may use again.

        Their keys and values must be those that the request would compute itself: the same tokens, planned in the same
        way, none of them dropped. So an answer does not depend on what ran before.
        """
        running = self.first
        if running is None or running.request.adapter.key != request.adapter.key:
            return 0
        before = running.planner
        kept = min(kept, len(tokens), len(before.tokens), *(start for start, _ in running.dropped))
        planner = SequencePlanner(request.adapter, request.config, self._vocab_size, tokens)
        weights = planner.plan(0, tokens[:kept])
        if any(decision.action == "drop" for decision in planner.take_decisions()):
            return 0
        same = (weights == before.weights[:kept]).all(1) & (np.equal(tokens[:kept], before.tokens[:kept]))
        return kept if same.all() else int(same.argmin())

    def decode(self, batch: Any) -> None:
        """Run a pass over a `LlamaBatch`, planned. It takes the place of `LlamaContext.decode`.

        Raises:
            EngineError: A token is not in the vocabulary, the context is full, a sequence was not opened, or llama.cpp
                runs the model in a way that this engine does not know.
        """
        raw = batch.batch
        tokens = raw.token[: raw.n_tokens]
        if tokens and not (min(tokens) >= 0 and max(tokens) < self._vocab_size):
            raise EngineError(f"token ids must be from 0 to {self._vocab_size - 1}; the text was tokenized otherwise")
        spans, ends = self._spans(raw, tokens)
        parts = [tokens[end - span.count : end] for span, end in zip(spans, ends, strict=True)]
        plan = self.planner.plan(spans, lambda: parts)
        self._graph.begin(tokens, plan)
        self._decode(batch)
        self._graph.finish()
        self._passes += 1
        infos = {running.request.adapter.key: running.request.adapter for running in self._running.values()}
        self._bytes_read += sum(int(infos[segment.adapter].rung_bytes[segment.rung]) for segment in plan.segments)
        for span, end in zip(spans, ends, strict=True):
            self._after(self._running[span.sequence], span, raw, end - 1)

    def _spans(self, raw: Any, tokens: list[int]) -> tuple[list[Span], list[int]]:
        """Return the runs of tokens of one sequence in a batch, and the row behind each of them."""
        count = len(tokens)
        positions, owners = raw.pos[:count], [raw.seq_id[row][0] for row in range(count)]
        cuts = [
            row for row in range(1, count) if owners[row] != owners[row - 1] or positions[row] != positions[row - 1] + 1
        ]
        starts, ends = [0, *cuts], [*cuts, count]
        spans = []
        for start, end in zip(starts, ends, strict=True):
            sequence, position = owners[start], positions[start]
            if self.begins(position, sequence):
                self._open(sequence, self._request(), tokens[start:end])
            running = self._running[sequence]
            if running.dropped and position < len(running.planner.tokens):
                raise EngineError("the text goes back, but some of its keys and values were dropped; begin it again")
            if position + end - start > self._llm.n_ctx():
                raise EngineError(
                    f"the context is full: it has room for {self._llm.n_ctx()} tokens; give a larger n_ctx"
                )
            spans.append(Span(sequence, position, end - start))
        return spans, ends

    def _after(self, running: Running, span: Span, raw: Any, last: int) -> None:
        """Give the next token's entropy to the plan, and drop what the plan drops."""
        if running.request.config.reads_entropy and raw.logits[last]:
            logits = llama_cpp.llama_get_logits_ith(self._llm.ctx, last)
            if logits:
                running.planner.learn(span.start + span.count, self._graph.entropy(logits, self._vocab_size))
        running.dropped += kv.carry_out(self._llm, running.sequence, running.planner.take_decisions())

    def trace(self) -> Trace | None:
        """Return what happened to the texts; None before the first one."""
        if not self._running:
            return self._last
        sequences = tuple(running.planner.trace() for running in self._running.values())
        notes = dict.fromkeys(self._graph.notes)
        for running in self._running.values():
            notes |= dict.fromkeys(kv.left_undone(self._llm, running.request.config.kv_cache))
        return Trace(
            sequences=sequences,
            passes=self._passes,
            adapter_bytes_read=self._bytes_read,
            kv_bytes=sum(kv.used_bytes(self._llm, running.sequence) for running in self._running.values()),
            kv_bytes_reserved=kv.reserved_bytes(self._llm),
            kv_bytes_full=sum(len(sequence.tokens) for sequence in sequences) * kv.full_bytes_per_token(self._llm),
            kv_notes=tuple(notes),
            notes=(),
            scheduler_seconds=self.planner.seconds,
        )
