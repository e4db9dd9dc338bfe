"""Gradient descent that brings sampled rungs closer to full rank. The basis and distillation are learned this way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from chunkwise_lora.calibration.log_probabilities import ChunkWiseModel, at_full_rank, kl_divergence
from chunkwise_lora.calibration.rung_sampler import RungSampler
from chunkwise_lora.calibration.text import TokenBlocks
from chunkwise_lora.calibration.unfinished import Unfinished

WARM_UP_STEPS = 10
"""Steps in which the learning rate rises to its highest value; after them it falls linearly to 0."""


@dataclass(frozen=True)
class RungTraining:
    """The text and the rungs of one gradient descent."""

    batches: Sequence[TokenBlocks]
    """One batch per step."""
    steps: int
    """Number of batches; the learning rate reaches 0 after them."""
    sampler: RungSampler
    """Samples the rungs that are brought closer to full rank."""
    seed: int = 0
    """Seed of the sampled rungs."""
    unfinished: Unfinished = field(default_factory=Unfinished)
    """Keeps the state of the descent."""


def match_full_rank(
    model: ChunkWiseModel,
    training: RungTraining,
    optimizer: torch.optim.Optimizer,
    switch_rungs: Callable[[Tensor | None], None],
    adapter: str,
) -> None:
    """Minimise the KL divergence of sampled rungs from full rank, averaged over scored tokens.

    Args:
        model: A model with the ladder attached.
        training: The text and the rungs.
        optimizer: Holds the learned parameters.
        switch_rungs: Makes the model run on the given rungs (sequences, tokens) with the learned parameters, or, for
            None, at full rank as it was before.
        adapter: Name of the ladder.
    """
    generator = torch.Generator().manual_seed(training.seed)
    warm_up, steps = min(WARM_UP_STEPS, training.steps), training.steps
    rates = [group["lr"] for group in optimizer.param_groups]
    with training.unfinished.descent(optimizer, generator) as descent:
        for step in range(descent.restore(), steps):
            batch = training.batches[step]
            switch_rungs(None)
            with torch.no_grad():
                full = at_full_rank(model, batch.tokens, adapter, batch.scored)
            with torch.enable_grad():
                switch_rungs(training.sampler(batch.tokens, generator))
                loss = kl_divergence(full, at_full_rank(model, batch.tokens, adapter, batch.scored)).mean()
            optimizer.zero_grad()
            loss.backward()
            for group, highest in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = highest * min((step + 1) / warm_up, 1 - step / steps)
            optimizer.step()
            descent.finished(step + 1)
