"""Exploration: every token runs on a random rung; the KL divergence from full rank is its cost."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from chunkwise_lora.calibration.cost_model import Observations
from chunkwise_lora.calibration.log_probabilities import ChunkWiseModel, entropy, kl_divergence, log_probabilities
from chunkwise_lora.calibration.run import CalibrationRun, given_full_rank
from chunkwise_lora.calibration.text import TokenBlocks
from chunkwise_lora.method.complexity import TokenComplexityEstimator
from chunkwise_lora.method.config import ComplexityConfig


def explore(
    run: CalibrationRun,
    model: ChunkWiseModel,
    text: TokenBlocks,
    allowed: Sequence[int],
    generator: np.random.Generator,
) -> Observations:
    """Measure the cost of every token of `text` on random rungs, while all other tokens run on random rungs, too.

    Args:
        run: The calibration.
        model: A model from `run.attach`.
        text: Text to run, once per `config.explorations`.
        allowed: Rungs to draw from.
        generator: Draws the rungs.

    Returns:
        One observation per token and pass. The cost is NaN for tokens that are not scored.
    """
    parts = []
    for batch in run.batches(text, "cost per token and rung"):
        tokens = batch.tokens
        full = given_full_rank(model, batch)
        signals = _signals(tokens, _of_all_tokens(entropy(full), batch), run.vocab_size)
        previous = torch.nn.functional.pad(tokens[:, :-1], (1, 0), value=-1)
        for _ in range(run.config.explorations):
            rungs = generator.choice(np.array(allowed), tuple(tokens.shape))
            costs = kl_divergence(full, log_probabilities(model, tokens, rungs, scored=batch.scored)).clamp_min(0)
            of_tokens = (tokens, previous, signals, torch.from_numpy(rungs), _of_all_tokens(costs, batch))
            parts.append([tensor.flatten(0, 1) for tensor in of_tokens])
    return Observations(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _of_all_tokens(values: Tensor, blocks: TokenBlocks) -> Tensor:
    """(blocks, length) the values (scored,) of the scored tokens, and NaN for the other tokens, on the CPU."""
    return torch.full(blocks.tokens.shape, math.nan).masked_scatter(blocks.scored, values.cpu())


def _signals(tokens: Tensor, entropies: Tensor, vocab_size: int) -> Tensor:
    """The complexity signals of token ids (sequences, tokens), NaN where unknown.

    `entropies` (sequences, tokens) are those of the predictions after each token, in nats, and NaN where unknown.

    Returns:
        (sequences, tokens, 4) float32.
    """
    rows = []
    before = torch.nn.functional.pad(entropies[:, :-1], (1, 0), value=math.nan)
    for row, of_row in zip(tokens.tolist(), before.tolist(), strict=True):
        estimator = TokenComplexityEstimator(ComplexityConfig(), vocab_size)
        signals = [
            estimator.signals(token, None if math.isnan(known) else known)
            for token, known in zip(row, of_row, strict=True)
        ]
        rows.append([[math.nan if value is None else value for value in of_token] for of_token in signals])
    return torch.tensor(rows)
