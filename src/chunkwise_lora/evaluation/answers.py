"""Evaluation of generated answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from chunkwise_lora.calibration.log_probabilities import kl_divergence
from chunkwise_lora.evaluation.continuation import Continuation, PromptBatch, Tokens
from chunkwise_lora.evaluation.data import Example, encode
from chunkwise_lora.evaluation.methods import FULL, Generator, PlainMethod, full_rank_of
from chunkwise_lora.evaluation.metrics import Metric
from chunkwise_lora.evaluation.prompts import batches_of, first_lines, set_padding
from chunkwise_lora.evaluation.results import Prediction, Result
from chunkwise_lora.evaluation.settings import EvaluationSettings
from chunkwise_lora.evaluation.statistics import bootstrap, relative_increase
from chunkwise_lora.ladder.contents import Expectation


@dataclass
class _Tally:
    """The measurements of one method, one entry per example."""

    answers: list[list[int]] = field(default_factory=list)
    """Token ids, with the token that ends the answer."""
    ranks: list[float] = field(default_factory=list)
    """Mean rank of prompt and answer."""
    kl: list[float] = field(default_factory=list)
    """Mean over the tokens of full rank's answer, in nats."""
    losses: list[float] = field(default_factory=list)
    """Loss of the whole reference, in nats; empty if it is not needed."""
    kv_bytes: int = 0
    """Bytes of all batches' caches in use, after the answers of full rank."""
    kv_bytes_full: int = 0
    """The bytes that the same tokens take in full precision."""

    def __iadd__(self, other: _Tally) -> Self:
        """Add the measurements of other examples."""
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))
        return self


def evaluate_answers(
    methods: Sequence[Generator],
    examples: Sequence[Example],
    tokenizer: Any,
    metric: Metric,
    settings: EvaluationSettings,
    expectations: Mapping[str, Expectation] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> list[Result]:
    """Compare the greedy answers of methods, and their distributions on the answers of full rank.

    An answer ends with its first line. Every method first reads the answer of full rank. If it would choose the same
    tokens, this is its own answer; otherwise it generates one.

    Args:
        methods: The methods; one of them must be the full rank.
        examples: Prompts and references.
        tokenizer: The base model's tokenizer.
        metric: Scores the answers.
        settings: The size of batches, the largest number of tokens of an answer, and the processes that share the work.
        expectations: By name of a method, what calibration expects of it. Its loss on the references is then measured.
        advance: Called once per method and batch of this process.

    Raises:
        ChunkWiseError: The tokenizer has no end-of-sequence token.
    """
    set_padding(tokenizer)
    expectations = expectations or {}
    judged = {FULL, *expectations} if expectations else set()
    full_rank = full_rank_of(methods)
    order = by_topic(examples)

    def measured(indices: Sequence[int]) -> dict[str, _Tally]:
        part = _Part([examples[i] for i in indices], tokenizer, full_rank, settings.new_tokens)
        found = {}
        for method in methods:
            found[method.name] = part.measure(method)
            if method.name in judged:
                found[method.name].losses += part.losses(method)
            advance()
        return found

    processes = settings.processes
    mine = processes.share_of(batches_of(order, settings.batch))
    tallies = {method.name: _Tally() for method in methods}
    for part in processes.gathered([measured(indices) for indices in mine]):
        for name, tally in part.items():
            tallies[name] += tally
    places = np.argsort(order)
    answers = {
        name: first_lines([tally.answers[place] for place in places], tokenizer) for name, tally in tallies.items()
    }
    scores = {name: metric(of_method, examples) for name, of_method in answers.items()}
    return [
        Result(
            method.label,
            float(np.mean(tally.ranks)),
            scores[method.name].points(),
            scores[method.name].over(scores[FULL]),
            bootstrap(np.array(tally.kl)[:, None]),
            tally.kv_bytes / tally.kv_bytes_full,
            Prediction(
                expectations[method.name],
                bootstrap(np.array([tally.losses, tallies[FULL].losses]).T, relative_increase),
            )
            if method.name in expectations
            else None,
            answers[method.name],
        )
        for method, tally in zip(methods, tallies.values(), strict=True)
    ]


def by_topic(examples: Sequence[Example]) -> list[int]:
    """Indices of the examples in an order in which topics stay together, and neighbours have similar lengths."""
    topics: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        topics.setdefault(example.topic, []).append(index)
    by_length = sorted(topics.values(), key=lambda group: len(examples[group[0]].prompt))
    return [index for group in by_length for index in group]


def prompts_of(examples: Sequence[Example], tokenizer: Any) -> PromptBatch:
    """The prompts of examples as token ids."""
    ids = tokenizer([example.prompt for example in examples]).input_ids
    return PromptBatch(ids, [example.topic for example in examples])


@dataclass
class _Part:
    """Examples that run together."""

    examples: Sequence[Example]
    tokenizer: Any
    full_rank: PlainMethod
    new_tokens: int

    @cached_property
    def prompts(self) -> PromptBatch:
        return prompts_of(self.examples, self.tokenizer)

    @cached_property
    def full(self) -> tuple[list[list[int]], Tensor]:
        """The answers of full rank, and the log-probabilities (examples, tokens, vocabulary) of their tokens."""
        with self.prompts.begin(self.full_rank) as run:
            return run.generate(self.new_tokens, self._ends)

    def measure(self, method: Generator) -> _Tally:
        """What `method` answers, and how far it is from full rank; without losses."""
        answers, full = self.full
        if method is self.full_rank:
            return _Tally(answers, [self.full_rank.mean_rank] * len(answers), [0.0] * len(answers), [], 1, 1)
        own, generated = list(answers), []
        with self.prompts.begin(method) as run:
            log_p = run.read(Tokens.padded([answer[:-1] for answer in answers], "right"))
            ranks, kv_bytes = run.mean_ranks(), run.kv_bytes()
            chosen = [row[: len(answer)] for row, answer in zip(log_p.argmax(-1).tolist(), answers, strict=True)]
            differing = [row for row, answer in enumerate(answers) if chosen[row] != answer]
            if differing and not method.cache_changes:
                run.rewind(torch.tensor(differing))
                generated = self._generated(run)
        if differing and method.cache_changes:
            with self.prompts.rows(differing).begin(method) as run:
                generated = self._generated(run)
        for row, (answer, rank) in zip(differing, generated, strict=True):
            own[row], ranks[row] = answer, rank
        lengths = [max(1, len(answer) - self._ends(answer[-1])) for answer in answers]
        kl = [float(kl_divergence(full[row, :n], log_p[row, :n]).mean()) for row, n in enumerate(lengths)]
        return _Tally(own, ranks, kl, [], *kv_bytes)

    def losses(self, method: Generator) -> list[float]:
        """The loss of `method` on the first reference of each example, in nats."""
        references = [encode(self.tokenizer, one.prompt, one.references[0])[1] for one in self.examples]
        with self.prompts.begin(method) as run:
            log_p = run.read(Tokens.padded([tokens[:-1] for tokens in references], "right"))
        return [-float(log_p[row, range(len(tokens)), tokens].sum()) for row, tokens in enumerate(references)]

    def _generated(self, run: Continuation) -> list[tuple[list[int], float]]:
        """The answers that a method generates now, each with the mean rank of prompt and answer."""
        answers, _ = run.generate(self.new_tokens, self._ends)
        return list(zip(answers, run.mean_ranks(), strict=True))

    def _ends(self, token: int) -> bool:
        """Whether a token ends an answer: the end-of-sequence token, or one with a line break."""
        return token == self.tokenizer.eos_token_id or "\n" in self.tokenizer.decode([token])
