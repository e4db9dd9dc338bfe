"""Perplexity on text and divergence from full rank, as generation would run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from chunkwise_lora.calibration.log_probabilities import kl_divergence, next_token_losses
from chunkwise_lora.evaluation.baselines import FULL, Contender
from chunkwise_lora.evaluation.statistics import Estimate, bootstrap, per_token, segments


@dataclass(frozen=True)
class TextResult:
    """One contender on one text."""

    name: str
    mean_rank: float
    perplexity: Estimate
    """Per token."""
    perplexity_per_word: float
    increase: Estimate
    """Of the perplexity over full rank, as a share, paired."""
    kl: Estimate
    """Nats per token from full rank."""
    kv_share: float
    ms_per_token: float | None
    """Wall time of a greedy generation, per token: the median of `ROUNDS` rounds in which all take turns."""


ROUNDS = 5
TIMED_PROMPT, TIMED_TOKENS = 64, 32
"""Tokens of the generations that are timed."""


@dataclass(frozen=True)
class Sample:
    """Where a plan's rank went in one window."""

    tokens: list[int]
    ranks: list[float]


def windows_of(tokens: Sequence[int], length: int, stride: int) -> Tensor:
    """(windows, length) windows that begin every `stride` tokens; what does not fill one at the end is left out."""
    ids = torch.as_tensor(tokens)
    return ids.unfold(0, length, stride) if len(ids) >= length else ids[None]


def evaluate_text(
    contenders: Sequence[Contender],
    windows: Tensor,
    stride: int,
    words: Callable[[list[int]], int],
    *,
    batch: int = 16,
    advance: Callable[[], None] = lambda: None,
) -> tuple[list[TextResult], Sample | None]:
    """Score every contender on `windows` (windows, tokens); one of them must be the full rank.

    Every window begins with an empty context, and its last `stride` tokens are scored, all but the first where windows
    do not overlap. Ours runs token by token with plan, cross-fades and KV policy in force; for those without
    any of these, one pass gives the same. `advance` is called once per contender and batch of windows.
    """
    scored_from = max(0, windows.shape[1] - 1 - stride)
    tallies: dict[str, list[tuple[np.ndarray, np.ndarray, float, float]]] = {one.name: [] for one in contenders}
    sample, count = None, 0
    full_rank = next(one for one in contenders if one.name == FULL)
    for group in windows.split(batch):
        full = full_rank.score(group).log_p
        for contender in contenders:
            scored = contender.score(group)
            kl = kl_divergence(full, scored.log_p)[:, scored_from:]
            loss = next_token_losses(scored.log_p, group)[:, scored_from:]
            tallies[contender.name].append((loss.numpy(), kl.numpy(), scored.mean_rank, scored.kv_share))
            if scored.ranks is not None:
                sample = Sample(group[0].tolist(), scored.ranks[0].tolist())
            advance()
        count += sum(words(window[scored_from + 1 :].tolist()) for window in group)
    speeds = _ms_per_token(contenders, windows[:1, :TIMED_PROMPT])
    full_loss = np.concatenate([loss for loss, *_ in tallies[FULL]])
    results = []
    for name, tally in tallies.items():
        of_loss, of_kl = (np.concatenate([one[i] for one in tally]) for i in (0, 1))
        sizes = [len(one[0]) for one in tally]
        results.append(
            TextResult(
                name,
                float(np.average([one[2] for one in tally], weights=sizes)),
                bootstrap(segments(of_loss), lambda means: np.exp(per_token(means))),
                float(np.exp(of_loss.sum() / count)),
                bootstrap(segments(of_loss - full_loss), lambda means: np.expm1(per_token(means))),
                bootstrap(segments(of_kl), per_token),
                float(np.average([one[3] for one in tally], weights=sizes)),
                speeds.get(name),
            )
        )
    return results, sample


def _ms_per_token(contenders: Sequence[Contender], prompt: Tensor) -> dict[str, float]:
    """By name, for those that can generate."""
    able = [one for one in contenders if one.options is not None]
    length = {"min_new_tokens": TIMED_TOKENS, "max_new_tokens": TIMED_TOKENS}
    seconds: dict[str, list[float]] = {one.name: [] for one in able}
    for _ in range(ROUNDS):
        for contender in able:
            begin = time.perf_counter()
            contender.generate({"input_ids": prompt}, **length, pad_token_id=0)
            seconds[contender.name].append(time.perf_counter() - begin)
    return {name: 1e3 * statistics.median(times) / TIMED_TOKENS for name, times in seconds.items()}
