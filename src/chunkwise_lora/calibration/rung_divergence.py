"""What every rung of a ladder loses when all tokens run on it."""

from __future__ import annotations

import numpy as np

from chunkwise_lora.calibration.log_probabilities import DEFAULT, ChunkWiseModel, kl_divergence, log_probabilities
from chunkwise_lora.calibration.run import CalibrationRun, given_full_rank

MAX_TOKENS = 8192
"""Largest number of tokens that run once per rung. More would cost time, and the mean hardly changes."""


def rung_divergence(run: CalibrationRun, model: ChunkWiseModel) -> tuple[float, ...]:
    """Measure the KL divergence of every rung from full rank on the choice text, with every token on that rung.

    "Full rank" is that of the adapter as it was given. Unless the ladder was distilled, its own full rank is the same,
    and its divergence is 0 by definition.

    Args:
        run: The calibration.
        model: A model from `run.attach`.

    Returns:
        (rungs,) nats per scored token, for `RankLadder.rung_divergence`.
    """
    text = run.text.choice
    text = text.evenly(max(1, MAX_TOKENS // text.length))
    rungs = model.ladders[DEFAULT].rungs
    measured = range(rungs if run.config.distillations else rungs - 1)
    totals = np.zeros(rungs)
    for batch in run.batches(text, "divergence of every rung"):
        full = given_full_rank(model, batch.tokens)
        for rung in measured:
            kl = kl_divergence(full, log_probabilities(model, batch.tokens, rung))
            totals[rung] += float(kl[batch.scored].clamp_min(0).sum())
    return tuple((totals / int(text.scored.sum())).tolist())
