"""The check of a calibrated policy on text that calibration has not used for anything else."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from chunkwise_lora.calibration.log_probabilities import (
    ChunkWiseModel,
    kl_divergence,
    log_probabilities_as_generated,
    scored_losses,
)
from chunkwise_lora.calibration.noise import standard_error
from chunkwise_lora.calibration.run import CalibrationRun, given_full_rank
from chunkwise_lora.ladder.contents import Expectation
from chunkwise_lora.method.config import ChunkWiseConfig


@dataclass(frozen=True)
class Check:
    """What the policy costs on the check text, run as in generation.

    "Full rank" is that of the adapter as it was given.
    """

    tokens: int
    """Number of scored predictions; the values per token below are averages over them, unless they say otherwise."""
    mean_rank: float
    """Mean rank of all tokens, scored or not."""
    kl: float
    """KL divergence from full rank, in nats per token."""
    loss_full: float
    """Loss at full rank, in nats per token."""
    loss_increase: float
    """Increase of the loss over full rank, as a share of `loss_full`."""
    loss_increase_error: float
    """Half of the width of the 95% interval of `loss_increase`."""
    perplexity_increase: float
    """Increase of the perplexity over full rank, as a share of the perplexity at full rank."""
    kv_share: float
    """Bytes of the KV cache, divided by those of a full-precision cache."""

    def expectation(self, asked_share: float | None, full_rank: float) -> Expectation:
        """What the ladder says about its policy. `asked_share` is the mean rank that was asked for, if one was."""
        return Expectation(
            asked_rank=None if asked_share is None else asked_share * full_rank,
            mean_rank=self.mean_rank,
            loss_increase=self.loss_increase,
            loss_increase_error=self.loss_increase_error,
        )


def check_policy(run: CalibrationRun, model: ChunkWiseModel, config: ChunkWiseConfig) -> Check:
    """Run the check text under the policy `config`, and compare it with full rank.

    Args:
        run: The calibration.
        model: A model from `run.attach`.
        config: The calibrated policy.
    """
    full_losses, increases, kl, ranks, kv_shares = [], [], [], [], []
    for batch in run.batches_by_step(run.text.check, "checking on unseen text"):
        full = given_full_rank(model, batch)
        done = log_probabilities_as_generated(model, batch.tokens, config, scored=batch.scored)
        full_losses.append(scored_losses(full, batch))
        increases.append(scored_losses(done.log_p, batch) - full_losses[-1])
        kl.append(kl_divergence(full, done.log_p))
        ranks.append(done.ranks)
        kv_shares.append(done.kv_share)
    loss, increase = float(torch.cat(full_losses).mean()), torch.cat(increases)
    return Check(
        tokens=increase.numel(),
        mean_rank=float(np.concatenate(ranks).mean()),
        kl=float(torch.cat(kl).mean()),
        loss_full=loss,
        loss_increase=float(increase.mean()) / loss,
        loss_increase_error=1.96 * standard_error(increase) / loss,
        perplexity_increase=math.expm1(float(increase.mean())),
        kv_share=float(np.mean(kv_shares)),
    )
