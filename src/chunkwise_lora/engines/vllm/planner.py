"""One scheduler per request: what every token of a forward pass gets of its adapter. Knows nothing of vLLM.

A server cuts a request's tokens into passes as it likes: prompts come in pieces, a request may be preempted and
computed again from its first token, and the KV of a prompt's beginning may be found in the prefix cache. A plan depends
on none of that: tokens are fed to the scheduler once, in order, and what was planned for a position stands.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from chunkwise_lora.backends.segments import Part, entropies_of, highest_rungs, ranks_of, segments_of
from chunkwise_lora.method.complexity import LearnedComplexity
from chunkwise_lora.method.config import ChunkWiseConfig
from chunkwise_lora.method.scheduler import RuntimeScheduler


@dataclass(frozen=True)
class AdapterPlan:
    """What planning needs to know of an adapter."""

    name: str
    rung_ranks: np.ndarray
    """(rungs,) each rung's mean rank."""
    learned: LearnedComplexity | None = None


@dataclass
class Tally:
    """What ran of one adapter."""

    tokens: np.ndarray
    """(rungs,) tokens by their highest rung."""
    rank: float
    """Sum of the tokens' ranks."""
    seconds: float = 0.0
    """Time spent in planning."""

    @classmethod
    def of(cls, weights: np.ndarray, rung_ranks: np.ndarray) -> Tally:
        """That of tokens with these weights (tokens, rungs)."""
        rungs = np.bincount(highest_rungs(weights), minlength=weights.shape[1])
        return cls(rungs, float(ranks_of(weights, rung_ranks).sum()))


class PlannedRequest:
    """The plan of one request so far."""

    def __init__(
        self,
        adapter_id: str,
        adapter: AdapterPlan,
        config: ChunkWiseConfig,
        prompt: Sequence[int],
        vocab_size: int,
        output: Sequence[int] = (),
    ) -> None:
        self.adapter_id = adapter_id
        self.adapter = adapter
        self.reads_entropy = config.reads_entropy
        self._new_scheduler = lambda: RuntimeScheduler(config, adapter.rung_ranks.tolist(), vocab_size, adapter.learned)
        self._scheduler = self._new_scheduler()
        self._given = [*prompt, *output]
        self._prompt_length = len(prompt)
        self._tokens: list[int] = []
        self._entropies: dict[int, float] = {}
        self._weights = np.empty((0, len(adapter.rung_ranks)), np.float32)
        self.constant: np.ndarray | None = None
        """(1, rungs) the weights of every token, where no token can change them: then none need be fed."""
        if config.levels == 1:
            self.constant = self._scheduler.step([0]).weights

    @property
    def weights(self) -> np.ndarray:
        """(tokens, rungs) of all tokens that were fed."""
        return self._weights[: len(self._tokens)]

    def learn(self, position: int, entropy: float) -> None:
        """Note the entropy, in nats, of the distribution that gives the token at `position`; a prompt's count not."""
        if position >= self._prompt_length:
            self._entropies.setdefault(position, entropy)

    def plan(self, start: int, tokens: Sequence[int]) -> np.ndarray:
        """(len(tokens), rungs) the weights of the tokens from position `start` on."""
        if start > len(self._tokens):  # found in the prefix cache, or run before this plan began
            self._feed(self._given[len(self._tokens) : start])
        known = self._tokens[start : start + len(tokens)]
        if known != tokens[: len(known)]:  # vLLM dropped what it had sampled, and sampled something else
            changed = next(i for i, (a, b) in enumerate(zip(known, tokens, strict=False)) if a != b)
            self._rewind(start + changed)
            known = known[:changed]
        self._feed(tokens[len(known) :])
        return self._weights[start : start + len(tokens)]

    def _feed(self, tokens: Sequence[int]) -> None:
        start, end = len(self._tokens), len(self._tokens) + len(tokens)
        entropies = [self._entropies.get(position) for position in range(start, end)]
        weights = self._scheduler.step(tokens, entropies).weights
        self._tokens += tokens
        if end > len(self._weights):
            grown = np.empty((max(end, 2 * len(self._weights)), self._weights.shape[1]), np.float32)
            grown[:start] = self._weights[:start]
            self._weights = grown
        self._weights[start:end] = weights

    def _rewind(self, position: int) -> None:
        tokens, self._tokens = self._tokens[:position], []
        self._entropies = {at: value for at, value in self._entropies.items() if at <= position}
        self._scheduler = self._new_scheduler()
        self._feed(tokens)


@dataclass(frozen=True)
class Scheduled:
    """The tokens of one request in a forward pass: `count` from position `start` on."""

    request: str
    start: int
    count: int


@dataclass
class Planner:
    """Plans forward passes over many requests; those without an adapter are not known to it."""

    vocab_size: int
    tally: Callable[[str, Tally], None] = lambda adapter, tally: None
    """Told the name of an adapter and what a pass runs of it."""
    _requests: dict[str, PlannedRequest] = field(default_factory=dict, init=False)
    _sampled: list[tuple[list[tuple[str, int]], Tensor]] = field(default_factory=list, init=False)
    _constant: _ConstantPass | None = field(default=None, init=False)

    def __len__(self) -> int:
        """Requests that are being planned."""
        return len(self._requests)

    def follows(self, request: str, adapter: AdapterPlan) -> bool:
        """Whether the request is being planned for this adapter, or one with the same rungs."""
        known = self._requests.get(request)
        return known is not None and (
            known.adapter is adapter or np.array_equal(known.adapter.rung_ranks, adapter.rung_ranks)
        )

    def open(
        self,
        request: str,
        adapter_id: str,
        adapter: AdapterPlan,
        config: ChunkWiseConfig,
        prompt: Sequence[int],
        output: Sequence[int] = (),
    ) -> None:
        """Begin to plan a request, anew if its adapter has been replaced while it ran."""
        self._constant = None
        self._requests[request] = PlannedRequest(adapter_id, adapter, config, prompt, self.vocab_size, output)

    def forget(self, requests: Iterable[str]) -> None:
        """These requests have ended, in whatever way."""
        for request in requests:
            self._requests.pop(request, None)

    def plan(self, scheduled: Sequence[Scheduled], read_ids: Callable[[], list[int]]) -> list[Part]:
        """What the pass over `scheduled`, one request after the other, adds of each adapter.

        `read_ids` gives the ids of all tokens of the pass. It is called only if some plan depends on them, since they
        may have to be waited for.
        """
        self._learn()
        is_constant = self._is_constant(scheduled)
        ids = [] if is_constant else read_ids()
        begun = time.perf_counter()  # a device has been waited for
        shape = [(one.request, one.count) for one in scheduled]
        if self._constant is None or self._constant.shape != shape:
            parts, tallies = self._planned(scheduled, ids)
            self._constant = _ConstantPass(shape, parts, tallies) if is_constant else None
        else:
            parts, tallies = self._constant.parts, self._constant.tallies
        seconds = (time.perf_counter() - begun) / max(len(tallies), 1)
        for adapter, tally in tallies.items():
            tally.seconds = seconds
            self.tally(adapter, tally)
        return parts

    def sampled(self, requests: Sequence[str], ends: Sequence[int], logits: Tensor) -> None:
        """After a pass: `logits` (requests, vocabulary) give each request's token at position `ends`."""
        rows = [
            row
            for row, request in enumerate(requests)
            if (known := self._requests.get(request)) is not None and known.reads_entropy
        ]
        if rows:
            # Read when the next pass is planned, so that a device need not be waited for now.
            chosen = logits if len(rows) == len(logits) else logits[rows]
            self._sampled.append(([(requests[row], ends[row]) for row in rows], entropies_of(chosen)))

    def _learn(self) -> None:
        for positions, entropies in self._sampled:
            for (request, position), entropy in zip(positions, entropies.tolist(), strict=True):
                if (known := self._requests.get(request)) is not None:
                    known.learn(position, entropy)
        self._sampled.clear()

    def _is_constant(self, scheduled: Sequence[Scheduled]) -> bool:
        planned = (self._requests.get(one.request) for one in scheduled)
        return all(one is None or one.constant is not None for one in planned)

    def _planned(self, scheduled: Sequence[Scheduled], ids: list[int]) -> tuple[list[Part], dict[str, Tally]]:
        adapters: dict[str, tuple[AdapterPlan, list[np.ndarray], list[np.ndarray]]] = {}
        offset = 0
        for one in scheduled:
            end = offset + one.count
            request = self._requests.get(one.request)
            if request is not None:
                _, weights, rows = adapters.setdefault(request.adapter_id, (request.adapter, [], []))
                rows.append(np.arange(offset, end))
                weights.append(
                    request.plan(one.start, ids[offset:end])
                    if request.constant is None
                    else request.constant.repeat(one.count, axis=0)
                )
            offset = end
        parts, tallies = [], {}
        for adapter_id, (adapter, of_requests, rows) in adapters.items():
            planned, where = np.concatenate(of_requests), np.concatenate(rows)
            parts += segments_of(adapter_id, planned, adapter.rung_ranks, None if len(where) == offset else where)
            tallies[adapter.name] = Tally.of(planned, adapter.rung_ranks)
        return parts, tallies


@dataclass(frozen=True)
class _ConstantPass:
    """A pass in which no plan can change: the next one over the same requests runs alike."""

    shape: list[tuple[str, int]]
    """Each request with its number of tokens."""
    parts: list[Part]
    tallies: dict[str, Tally]
