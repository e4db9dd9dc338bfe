"""The divergence of every rung of a ladder from full rank, with all tokens on that rung."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from chunkwise_lora.calibration.log_probabilities import DEFAULT, ChunkWiseModel, kl_divergence, log_probabilities
from chunkwise_lora.calibration.text import TokenBlocks


def rung_divergence(
    model: ChunkWiseModel, batches: Iterable[TokenBlocks], reference: str = DEFAULT, same_full_rank: bool = True
) -> tuple[float, ...]:
    """Measure the KL divergence of every rung from full rank, with every token on that rung.

    Args:
        model: A model with the ladder loaded under `DEFAULT`.
        batches: The text, in batches of one pass each.
        reference: Name of the loaded ladder whose full rank is the reference; by default the ladder itself.
        same_full_rank: Whether the ladder and the reference compute the same function at full rank. If they do, the
            divergence of full rank is 0 and is not measured.

    Returns:
        (rungs,) nats per scored token, for `RankLadder.rung_divergence`.
    """
    rungs = model.ladders[DEFAULT].rungs
    totals, scored = np.zeros(rungs), 0
    for batch in batches:
        full = log_probabilities(model, batch.tokens, adapter=reference, scored=batch.scored)
        scored += len(full)
        for rung in range(rungs - 1 if same_full_rank else rungs):
            kl = kl_divergence(full, log_probabilities(model, batch.tokens, rung, scored=batch.scored))
            totals[rung] += float(kl.clamp_min(0).sum())
    return tuple((totals / scored).tolist())
