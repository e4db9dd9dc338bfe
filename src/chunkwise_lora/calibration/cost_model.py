"""The cost model: it predicts what a rung costs a token, from what is known before the token runs.

The cost of rung k at token t is the KL divergence from full rank, in nats. Its model is
`exp(offset_k + slope_k * s_t)`, where s_t is the log cost of a `LearnedComplexity`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from chunkwise_lora.method.complexity import SIGNALS, LearnedComplexity

LEARNING_RATE = 2e-2
"""Adam's learning rate at the first step; it falls linearly to 0."""
BATCH = 2048
"""Observations per step."""
MIN_EPOCHS, MIN_STEPS = 6, 400
"""Fewest passes over the observations, and fewest steps; the fit takes as many passes as both need."""
RIDGE = 80.0
"""Strength of the L2 penalty on the parameters of token ids. It keeps ids with few observations near the average."""


@dataclass(frozen=True)
class Observations:
    """What tokens cost on a rung, and what was known about them before. n is the number of observations."""

    tokens: Tensor
    """(n,) int64 token ids."""
    previous: Tensor
    """(n,) int64 ids of the tokens before; -1 at the beginning of a sequence."""
    signals: Tensor
    """(n, 4) float32 values of `SIGNALS`; NaN where unknown."""
    rungs: Tensor
    """(n,) int64 rungs."""
    costs: Tensor
    """(n,) float32 nats; NaN where the prediction is not scored."""

    def __len__(self) -> int:
        return len(self.tokens)

    def scored(self) -> Observations:
        """The observations that have a cost."""
        scored = ~self.costs.isnan()
        return Observations(*(getattr(self, field.name)[scored] for field in fields(self)))


@dataclass(frozen=True)
class CostModel:
    """Predicts the cost of every rung from a token's score."""

    learned: LearnedComplexity
    """Gives a token its score."""
    offsets: np.ndarray
    """(rungs,) log of the cost, in nats, of a token with score 0."""
    slopes: np.ndarray
    """(rungs,) how much the log of the cost rises with the score."""

    def scores(self, observations: Observations) -> np.ndarray:
        """(n,) the scores of all observed tokens. `LearnedComplexity.log_cost` gives the same score for one token."""
        known = (observations.signals.numpy() - self.learned.means) * self.learned.weights
        previous = np.append(self.learned.previous, 0)[observations.previous.numpy()]
        return self.learned.token[observations.tokens.numpy()] + previous + np.nan_to_num(known).sum(1)

    def costs(self, scores: np.ndarray) -> np.ndarray:
        """(n, rungs) predicted costs, in nats, of tokens with scores (n,)."""
        return np.exp(self.offsets + self.slopes * scores[:, None])

    def explained_deviance(self, observations: Observations) -> float:
        """The share of the Poisson deviance of the costs that the model explains beyond the mean cost of each rung.

        1 is a perfect prediction; 0 is as good as knowing only the rung.
        """
        predicted = self.costs(self.scores(observations))[np.arange(len(observations)), observations.rungs.numpy()]
        costs, by_rung = observations.costs.numpy(), _mean_costs(observations)[observations.rungs.numpy()]
        return 1 - _poisson_deviance(costs, predicted) / _poisson_deviance(costs, by_rung)


def fit_costs(
    observations: Observations,
    vocab_size: int,
    rungs: int,
    signals: Collection[str] = SIGNALS,
    *,
    ids: int = 2,
    seed: int = 0,
) -> CostModel:
    """Fit a `CostModel` by Poisson regression.

    Its loss is minimal at the mean cost, and it tolerates the long tail of the costs.

    Args:
        observations: Observed costs; every observation must have a cost.
        vocab_size: Number of token ids. Every id has its own parameters.
        rungs: Number of rungs of the ladder. Parameters of unobserved rungs are interpolated.
        signals: The `SIGNALS` that the score may use.
        ids: Which token ids the score uses. 0: none; 1: the token's own; 2: also the previous token's.
        seed: Seed of the order of the observations.
    """
    generator = torch.Generator().manual_seed(seed)
    used = torch.tensor([name in signals for name in SIGNALS])
    means = observations.signals.nanmean(0).nan_to_num(0)
    centred = (observations.signals - means).nan_to_num(0) * used
    scale = float(observations.costs.mean().clamp_min(1e-12))
    targets = observations.costs / scale
    tables = [torch.zeros(vocab_size + 1, requires_grad=True) for _ in range(2)]
    weights = torch.zeros(len(SIGNALS), requires_grad=True)
    mean_costs = torch.from_numpy(_mean_costs(observations, rungs)) / scale
    offsets = mean_costs.clamp_min(1e-9).log().float().requires_grad_()
    slopes = torch.ones(rungs, requires_grad=True)
    optimizer = torch.optim.Adam([*tables[:ids], weights, offsets, slopes], lr=LEARNING_RATE)
    epochs, batches = _epochs_and_batches(len(observations))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=epochs * batches)
    for _ in range(epochs):
        for chosen in torch.randperm(len(observations), generator=generator).chunk(batches):
            tokens, previous = observations.tokens[chosen], observations.previous[chosen]
            at = observations.rungs[chosen]
            # At the beginning of a sequence `previous` is -1. It reads the last row, which is dropped at the end.
            score = tables[0][tokens] + tables[1][previous] + centred[chosen] @ weights
            log_cost = (offsets[at] + slopes[at] * score).clamp(-12, 6)
            loss = (log_cost.exp() - targets[chosen] * log_cost).mean()
            loss = loss + RIDGE / len(observations) * sum(table.square().sum() for table in tables)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        tables = [table[:-1] for table in tables]
        observed = torch.bincount(observations.rungs, minlength=rungs).numpy() > 0
        return CostModel(
            LearnedComplexity(*(tensor.numpy().copy() for tensor in (*tables, weights * used, means))),
            _interpolated(offsets.numpy() + np.log(scale), observed),
            _interpolated(slopes.numpy(), observed),
        )


def steps_of_fit(observations: int) -> int:
    """Steps that `fit_costs` takes for a number of observations."""
    epochs, batches = _epochs_and_batches(observations)
    return epochs * batches


def _epochs_and_batches(observations: int) -> tuple[int, int]:
    """Passes over the observations, and steps of each pass."""
    batches = max(1, observations // BATCH)
    return max(MIN_EPOCHS, -(-MIN_STEPS // batches)), batches


def _mean_costs(observations: Observations, rungs: int | None = None) -> np.ndarray:
    """(rungs,) the mean cost of each rung, 0 where there is no observation."""
    at, length = observations.rungs.numpy(), rungs or int(observations.rungs.max()) + 1
    counts = np.bincount(at, minlength=length)
    return np.bincount(at, observations.costs.numpy(), minlength=length) / np.maximum(counts, 1)


def _poisson_deviance(costs: np.ndarray, predicted: np.ndarray) -> float:
    """Half of the Poisson deviance of costs (n,) from predictions (n,)."""
    costs, predicted = np.maximum(costs, 1e-12), np.maximum(predicted, 1e-12)
    return float((costs * np.log(costs / predicted) - costs + predicted).sum())


def _interpolated(values: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """(rungs,) `values` of observed rungs, and linear interpolation between them for the other rungs."""
    rungs = np.arange(len(values))
    return np.interp(rungs, rungs[observed], values[observed])
