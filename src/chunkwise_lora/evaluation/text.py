"""Evaluation of text: perplexity, and divergence from full rank."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from chunkwise_lora.calibration.log_probabilities import kl_divergence, next_token_losses
from chunkwise_lora.evaluation.methods import FULL, Method, full_rank_of, warm_up
from chunkwise_lora.evaluation.statistics import Estimate, bootstrap, per_token, segments

TIMED_ROUNDS = 5
"""Rounds of timed generation; in each, every method runs once."""
TIMED_PROMPT, TIMED_TOKENS = 64, 32
"""Prompt tokens and new tokens of a timed generation."""


@dataclass(frozen=True)
class TextResult:
    """The result of one method on one text."""

    name: str
    mean_rank: float
    """Mean rank of all tokens."""
    perplexity: Estimate
    """Perplexity per token."""
    perplexity_per_word: float
    increase: Estimate
    """Increase of the perplexity over full rank, as a share, with a paired interval."""
    kl: Estimate
    """KL divergence from full rank, in nats per token."""
    kv_share: float
    """Bytes of the KV cache, divided by those of a full-precision cache."""
    ms_per_token: float | None
    """Wall time of a greedy generation, in milliseconds per token: the median of `TIMED_ROUNDS` interleaved rounds.
    None if the method cannot generate."""


@dataclass(frozen=True)
class Sample:
    """The ranks that a plan gave the tokens of one window."""

    tokens: list[int]
    """Token ids."""
    ranks: list[float]
    """One per token."""


def windows_of(tokens: Sequence[int], length: int, stride: int) -> Tensor:
    """Cut a text into windows of `length` tokens, one every `stride` tokens.

    Tokens at the end that do not fill a window are left out. A text shorter than `length` gives one short window.

    Returns:
        (windows, length) token ids.
    """
    ids = torch.as_tensor(tokens)
    return ids.unfold(0, length, stride) if len(ids) >= length else ids[None]


@dataclass
class _Tally:
    """The measurements of one method so far, one entry per batch of windows."""

    losses: list[np.ndarray] = field(default_factory=list)
    """(windows, scored tokens) nats."""
    kl: list[np.ndarray] = field(default_factory=list)
    """(windows, scored tokens) nats."""
    ranks: list[float] = field(default_factory=list)
    kv_shares: list[float] = field(default_factory=list)


def evaluate_text(
    methods: Sequence[Method],
    windows: Tensor,
    stride: int,
    words: Callable[[list[int]], int],
    *,
    batch: int = 16,
    advance: Callable[[], None] = lambda: None,
) -> tuple[list[TextResult], Sample | None]:
    """Run every method on windows of text and compare it with full rank.

    Every window starts with an empty context, and its last `stride` tokens are scored. If windows do not overlap, all
    tokens except the first are scored. ChunkWise runs token by token with its plan, cross-fades and KV policy in force.
    Methods without these run in one pass, which gives the same result.

    Args:
        methods: The methods; one of them must be the full rank.
        windows: (windows, tokens) token ids.
        stride: Tokens from the start of one window to the start of the next.
        words: Returns the number of words of a text, given as token ids.
        batch: Windows that run together.
        advance: Called once per method and batch.

    Returns:
        One result per method, and the ranks of one window if a method chooses ranks token by token.
    """
    scored_from = max(0, windows.shape[1] - 1 - stride)
    tallies = {method.name: _Tally() for method in methods}
    sample, word_count = None, 0
    full_rank = full_rank_of(methods)
    for group in windows.split(batch):
        full = full_rank.score(group).log_p
        for method in methods:
            scored, tally = method.score(group), tallies[method.name]
            tally.losses.append(next_token_losses(scored.log_p, group)[:, scored_from:].numpy())
            tally.kl.append(kl_divergence(full, scored.log_p)[:, scored_from:].numpy())
            tally.ranks.append(scored.mean_rank)
            tally.kv_shares.append(scored.kv_share)
            if scored.ranks is not None:
                sample = Sample(group[0].tolist(), scored.ranks[0].tolist())
            advance()
        word_count += sum(words(window[scored_from + 1 :].tolist()) for window in group)
    speeds = _ms_per_token(methods, windows[:1, :TIMED_PROMPT])
    full_losses = np.concatenate(tallies[FULL].losses)
    return [_result(name, tally, full_losses, word_count, speeds.get(name)) for name, tally in tallies.items()], sample


def _result(name: str, tally: _Tally, full_losses: np.ndarray, words: int, ms_per_token: float | None) -> TextResult:
    losses, kl = np.concatenate(tally.losses), np.concatenate(tally.kl)
    sizes = [len(one) for one in tally.losses]
    return TextResult(
        name,
        float(np.average(tally.ranks, weights=sizes)),
        bootstrap(segments(losses), lambda means: np.exp(per_token(means))),
        float(np.exp(losses.sum() / words)),
        bootstrap(segments(losses - full_losses), lambda means: np.expm1(per_token(means))),
        bootstrap(segments(kl), per_token),
        float(np.average(tally.kv_shares, weights=sizes)),
        ms_per_token,
    )


def _ms_per_token(methods: Sequence[Method], prompt: Tensor) -> dict[str, float]:
    """Milliseconds per token of the methods that can generate, by name."""
    able = [method for method in methods if method.options is not None]
    inputs = {"input_ids": prompt}
    warm_up(able, inputs, pad_token_id=0)
    seconds: dict[str, list[float]] = {method.name: [] for method in able}
    for _ in range(TIMED_ROUNDS):
        for method in able:
            begin = time.perf_counter()
            method.generate(inputs, min_new_tokens=TIMED_TOKENS, max_new_tokens=TIMED_TOKENS, pad_token_id=0)
            seconds[method.name].append(time.perf_counter() - begin)
    return {name: 1e3 * statistics.median(times) / TIMED_TOKENS for name, times in seconds.items()}
