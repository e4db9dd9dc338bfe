"""Settings that are chosen on held-back text: the mean rank for a loss budget, chunk length, scale and INT8."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from chunkwise_lora.calibration.fitted_ladder import FittedLadder
from chunkwise_lora.calibration.log_probabilities import (
    ChunkWiseModel,
    kl_divergence,
    log_probabilities_as_generated,
    log_probabilities_in_one_pass,
    scored_losses,
)
from chunkwise_lora.calibration.noise import standard_error
from chunkwise_lora.calibration.run import CalibrationRun, given_full_rank
from chunkwise_lora.method.config import ChunkWiseConfig, KVCacheConfig, LevelKVPolicy

SHARES = tuple(step / 16 for step in range(1, 16))
"""Mean ranks that are tried for a loss budget, as shares of the full rank."""
MIN_LENGTHS = (1, 2, 4)
"""Shortest chunk lengths that are tried, in tokens, the simplest first."""
SCALES = (1.0, 0.95, 0.9)
"""Factors on the adapter's output that are tried, the simplest first."""
SEARCH_TOLERANCE = 1e-3
"""Share of the cost of a simpler setting that a setting must save. The saving must also be above 0 by
`STANDARD_ERRORS`."""
CHOICE_GAIN = 0.1
"""Share of the divergence that a rung for each token must save over one rung for all tokens, to be worth planning. The
saving must also be above 0 by `STANDARD_ERRORS`."""
STANDARD_ERRORS = 2.0
"""What is measured may be wrong by this many standard errors: with few scored tokens, small differences are noise."""
INT8_TOLERANCE = 1e-3
"""INT8 keys and values are kept if the KL divergence from full precision is at most this share of the loss."""

Value = TypeVar("Value", int, float)


def share_for_loss_budget(run: CalibrationRun, fitted: FittedLadder, budget: float) -> float:
    """The lowest of `SHARES` whose policy keeps a loss budget on the choice text, or 1.

    The loss increase of one share is noisy, because losses vary much more from token to token than divergences. So one
    factor from divergence to loss is fitted to all shares together, and it predicts the loss increase of each share.
    The factor is taken at the upper end of its interval: with little text, more rank is spent.

    Args:
        run: The calibration.
        fitted: Gives the policy of each share.
        budget: Largest loss increase, as a share of the loss at full rank.
    """
    losses: list[Tensor] = []
    divergences: list[list[Tensor]] = [[] for _ in SHARES]
    increases: list[list[Tensor]] = [[] for _ in SHARES]
    configs = [fitted.config(fitted.rung_policy(share)) for share in SHARES]
    with run.attach(fitted.ladder) as model:
        for batch in run.batches(run.text.choice, "finding the mean rank"):
            full = given_full_rank(model, batch)
            losses.append(scored_losses(full, batch))
            for i, config in enumerate(configs):
                log_p = log_probabilities_in_one_pass(model, batch.tokens, config, scored=batch.scored).log_p
                divergences[i].append(kl_divergence(full, log_p)[batch.has_next])
                increases[i].append(scored_losses(log_p, batch) - losses[-1])
    kl = torch.stack([torch.cat(one).mean() for one in divergences])
    of_tokens = kl @ torch.stack([torch.cat(one) for one in increases]) / (kl @ kl).clamp_min(1e-12)
    # The mean of `of_tokens` is the factor of the least squares.
    loss_per_kl = float(of_tokens.mean()) + STANDARD_ERRORS * standard_error(of_tokens)
    predicted = loss_per_kl * kl / torch.cat(losses).mean()
    return min((share for share, one in zip(SHARES, predicted, strict=True) if one <= budget), default=1.0)


@dataclass(frozen=True)
class TokenChoice:
    """A rung for each token, compared with the same rung for all tokens, on the choice text."""

    pays: bool
    """Whether the policy gives each token its own rung."""
    planned: float
    """KL divergence from full rank, in nats per token, with a rung for each token."""
    alike: float
    """The same with one rung for all tokens, less what the difference in mean rank is worth."""


def choose_tokens(
    run: CalibrationRun, model: ChunkWiseModel, planned: ChunkWiseConfig, alike: ChunkWiseConfig, multiplier: float
) -> tuple[ChunkWiseConfig, TokenChoice]:
    """Choose between a rung for each token and the same rung for all tokens.

    A rung for each token must reduce the divergence on the choice text by enough, because one rung is simpler and
    faster.

    Args:
        run: The calibration.
        model: A model from `run.attach`.
        planned: The policy with a rung for each token.
        alike: The policy with one rung for all tokens.
        multiplier: The Lagrange multiplier that `planned` was chosen with, in nats per unit of rank.
    """
    divergences: list[list[Tensor]] = [[], []]
    ranks = np.zeros(2)
    for batch in run.batches(run.text.choice, "rungs for tokens"):
        full = given_full_rank(model, batch)
        for i, config in enumerate((planned, alike)):
            done = log_probabilities_in_one_pass(model, batch.tokens, config, scored=batch.scored)
            divergences[i].append(kl_divergence(full, done.log_p).clamp_min(0))
            ranks[i] += done.ranks.sum() / run.text.choice.tokens.numel()
    of_planned, of_alike = (torch.cat(one) for one in divergences)
    saved = of_alike - of_planned + multiplier * float(ranks[1] - ranks[0])
    least = max(CHOICE_GAIN * float(of_alike.mean()), STANDARD_ERRORS * standard_error(saved))
    choice = TokenChoice(float(saved.mean()) > least, float(of_planned.mean()), float((of_planned + saved).mean()))
    return (planned if choice.pays else alike), choice


def choose_chunks_and_scale(
    run: CalibrationRun, model: ChunkWiseModel, config: ChunkWiseConfig, multiplier: float
) -> tuple[ChunkWiseConfig, dict[str, float]]:
    """Choose the shortest chunk length, then the scale, that cost least on the choice text.

    One rung for all tokens is the same with every chunk length, so no other is tried.

    The cost is the loss per scored token plus `multiplier` times the mean rank, in nats.

    Args:
        run: The calibration.
        model: A model from `run.attach`.
        config: The policy so far.
        multiplier: The Lagrange multiplier that the policy was chosen with, in nats per unit of rank.

    Returns:
        The policy with both settings, and the cost of every setting that was tried.
    """
    tried: dict[str, float] = {}
    if config.levels > 1:
        chunking = config.chunking
        with_length = {
            n: config.model_copy(update={"chunking": chunking.model_copy(update={"min_length": n})})
            for n in MIN_LENGTHS
        }
        config, costs = _simplest_good(run, model, with_length, multiplier)
        tried |= {f"chunks of at least {length}": cost for length, cost in costs.items()}
    selection = config.selection
    with_scale = {
        scale: config.model_copy(
            update={"selection": selection.model_copy(update={"scales": (scale,) * config.levels})}
        )
        for scale in SCALES
    }
    config, of_scales = _simplest_good(run, model, with_scale, multiplier)
    return config, tried | {f"scale {scale:g}": cost for scale, cost in of_scales.items()}


def choose_int8(run: CalibrationRun, model: ChunkWiseModel, config: ChunkWiseConfig) -> ChunkWiseConfig:
    """`config` with INT8 keys and values if they hardly change the predictions on the choice text; otherwise `config`.

    The KL divergence is compared, because the loss of few tokens changes by chance more than INT8 changes it.

    Args:
        run: The calibration.
        model: A model from `run.attach`.
        config: The policy so far, with a full-precision KV cache.
    """
    levels = (LevelKVPolicy(precision="int8"),) * config.levels
    with_int8 = config.model_copy(update={"kv_cache": KVCacheConfig(levels=levels)})
    divergence = loss = 0.0
    for batch in run.batches_by_step(run.text.choice, "trying INT8 keys and values"):
        before, after = (
            log_probabilities_as_generated(model, batch.tokens, one, scored=batch.scored).log_p
            for one in (config, with_int8)
        )
        loss += float(scored_losses(before, batch).sum())
        divergence += float(kl_divergence(before, after)[batch.has_next].sum())
    return with_int8 if divergence <= INT8_TOLERANCE * loss else config


def _simplest_good(
    run: CalibrationRun, model: ChunkWiseModel, configs: Mapping[Value, ChunkWiseConfig], multiplier: float
) -> tuple[ChunkWiseConfig, dict[Value, float]]:
    """The best of several policies on the choice text, or a simpler (earlier) one that costs about as much.

    Returns:
        The policy, and the cost of each, in nats per token.
    """
    text = run.text.choice
    parts: dict[Value, list[Tensor]] = {value: [] for value in configs}
    ranks = dict.fromkeys(configs, 0.0)
    for batch in run.batches(text, "chunk lengths and scales"):
        for value, config in configs.items():
            done = log_probabilities_in_one_pass(model, batch.tokens, config, scored=batch.scored)
            parts[value].append(scored_losses(done.log_p, batch))
            ranks[value] += float(done.ranks.sum()) / text.tokens.numel()
    costs = {value: torch.cat(losses) + multiplier * ranks[value] for value, losses in parts.items()}
    best = next(iter(costs))
    for value in list(costs)[1:]:
        saved = costs[best] - costs[value]
        least = max(SEARCH_TOLERANCE * float(costs[value].mean()), STANDARD_ERRORS * standard_error(saved))
        if float(saved.mean()) > least:
            best = value
    return configs[best], {value: float(cost.mean()) for value, cost in costs.items()}
