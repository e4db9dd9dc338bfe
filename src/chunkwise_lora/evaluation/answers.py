"""Evaluation of generated answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from chunkwise_lora.calibration.log_probabilities import kl_divergence
from chunkwise_lora.evaluation.data import Example
from chunkwise_lora.evaluation.methods import FULL, Method, full_rank_of, warm_up
from chunkwise_lora.evaluation.metrics import Metric, Scores
from chunkwise_lora.evaluation.prompts import batches_of, first_lines, prompt_inputs, set_padding
from chunkwise_lora.evaluation.statistics import Estimate, bootstrap


@dataclass(frozen=True)
class AnswersResult:
    """The result of one method on one task."""

    name: str
    mean_rank: float | None
    """Mean rank over prompts and answers; None if the method has no rank."""
    scores: dict[str, Estimate]
    """By name of the score: points, from 0 to 100."""
    over_full: dict[str, Estimate]
    """By name of the score: difference to full rank, in points, with a paired interval."""
    kl: Estimate
    """KL divergence from full rank, in nats per token of the answers that full rank generates."""
    kv_share: float
    """Bytes of the KV cache at the end, divided by those of a full-precision cache; mean over batches."""
    ms_per_token: float
    """Wall time of generation, prefill included, in milliseconds divided by the new tokens of all sequences."""
    answers: list[str]
    """One answer per example."""


def evaluate_answers(
    methods: Sequence[Method],
    examples: Sequence[Example],
    tokenizer: Any,
    metric: Metric,
    *,
    new_tokens: int,
    batch: int = 16,
    advance: Callable[[], None] = lambda: None,
) -> list[AnswersResult]:
    """Generate answers greedily with every method, and score them.

    Args:
        methods: Methods that can generate; one of them must be the full rank.
        examples: Prompts and references.
        tokenizer: The base model's tokenizer.
        metric: Scores the answers.
        new_tokens: Largest number of tokens of an answer.
        batch: Prompts that run together.
        advance: Called once per method and batch.

    Raises:
        ChunkWiseError: The tokenizer has no end-of-sequence token.
    """
    set_padding(tokenizer)
    batches = [prompt_inputs(part, tokenizer) for part in batches_of(examples, batch)]
    tallies = {method.name: _Tally() for method in methods}
    full_rank = full_rank_of(methods)
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if batches:
        warm_up(methods, batches[0], pad)
    for inputs in batches:
        references: list[Tensor] = []
        full: list[Tensor] = []
        for method in [full_rank, *(one for one in methods if one is not full_rank)]:
            tally = tallies[method.name]
            begin = time.perf_counter()
            done = method.generate(inputs, max_new_tokens=new_tokens, pad_token_id=pad, eos_token_id=eos)
            tally.seconds += time.perf_counter() - begin
            new = done.ids[:, inputs["input_ids"].shape[1] :]
            tally.new_tokens += int((new != pad).sum())
            tally.ranks += done.ranks
            tally.kv_shares.append(done.kv_share)
            tally.answers += first_lines(new, tokenizer)
            if method is full_rank:
                references = [
                    torch.cat([ids[mask.bool()], answer[answer != pad]])
                    for ids, mask, answer in zip(inputs["input_ids"], inputs["attention_mask"], new, strict=True)
                ]
            lengths = inputs["attention_mask"].sum(1).tolist()
            log_p = _answer_log_probabilities(method, references, lengths)
            full = full or log_p
            tally.kl += [float(kl_divergence(*pair).mean()) for pair in zip(full, log_p, strict=True)]
            advance()
    scores = {name: metric(tally.answers, examples) for name, tally in tallies.items()}
    return [_result(one, tallies[one.name], scores[one.name], scores[FULL]) for one in methods]


@dataclass
class _Tally:
    """The measurements of one method so far."""

    answers: list[str] = field(default_factory=list)
    ranks: list[float] = field(default_factory=list)
    """Mean rank of every sequence."""
    kv_shares: list[float] = field(default_factory=list)
    """One value per batch."""
    kl: list[float] = field(default_factory=list)
    """One value per example: the mean over the tokens of its answer, in nats."""
    seconds: float = 0.0
    new_tokens: int = 0


def _result(method: Method, tally: _Tally, scores: Scores, full: Scores) -> AnswersResult:
    return AnswersResult(
        method.name,
        float(np.mean(tally.ranks)) if tally.ranks else method.mean_rank,
        scores.points(),
        scores.over(full),
        bootstrap(np.array(tally.kl)[:, None]),
        float(np.mean(tally.kv_shares)),
        1e3 * tally.seconds / max(tally.new_tokens, 1),
        tally.answers,
    )


def _answer_log_probabilities(method: Method, sequences: Sequence[Tensor], prompts: Sequence[int]) -> list[Tensor]:
    """The log-probabilities of the answers' tokens.

    Args:
        method: The method to run.
        sequences: Token ids (tokens,) of each prompt and answer.
        prompts: Number of prompt tokens of each sequence.

    Returns:
        (answer tokens, vocabulary) per sequence.
    """
    # No mask is needed for padding on the right, because causal attention hides it from all tokens before it.
    log_p = method.score(pad_sequence(list(sequences), batch_first=True)).log_p
    return [
        rows[prompt - 1 : max(prompt, len(sequence) - 1)]
        for rows, prompt, sequence in zip(log_p, prompts, sequences, strict=True)
    ]
