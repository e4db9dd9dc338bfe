"""Fitting the policy to an adapter: what a rung costs a token, predicted from what is known of the token in time.

The cost of rung k at token t, the KL divergence from full rank, is modelled as `exp(offset_k + slope_k * s_t)`, where
s_t is a `LearnedComplexity`. One Lagrangian for the whole text then chooses every token's rung:
argmin_k cost_t(k) + lambda * rank_k. Since s_t alone tells tokens apart, that is a set of thresholds on the score.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from chunkwise_lora.method.complexity import SIGNALS, LearnedComplexity
from chunkwise_lora.method.config import ChunkingConfig, SelectionConfig

GRID = 256
"""Quantiles of the score between which a threshold may stand."""


@dataclass(frozen=True)
class Observations:
    """What tokens cost at some rung. All fields are (n,) unless said otherwise."""

    tokens: Tensor
    previous: Tensor
    """-1 where there is none."""
    signals: Tensor
    """(n, 4) float32 `SIGNALS`, NaN where not known."""
    rungs: Tensor
    costs: Tensor
    """Nats; NaN where what is predicted does not count."""

    def __len__(self) -> int:
        return len(self.tokens)

    def known(self) -> Observations:
        """Those with a cost."""
        known = ~self.costs.isnan()
        return Observations(*(getattr(self, field.name)[known] for field in fields(self)))


@dataclass(frozen=True)
class CostModel:
    """Predicts the cost of every rung from a token's `LearnedComplexity`."""

    learned: LearnedComplexity
    offsets: np.ndarray
    """(rungs,)"""
    slopes: np.ndarray
    """(rungs,)"""

    def scores(self, seen: Observations) -> np.ndarray:
        """(n,) the log costs of tokens, as `LearnedComplexity.log_cost` gives them one by one."""
        known = (seen.signals.numpy() - self.learned.means) * self.learned.weights
        previous = np.append(self.learned.previous, 0)[seen.previous.numpy()]
        return self.learned.token[seen.tokens.numpy()] + previous + np.nan_to_num(known).sum(1)

    def costs(self, scores: np.ndarray) -> np.ndarray:
        """(n, rungs) nats."""
        return np.exp(self.offsets + self.slopes * scores[:, None])

    def explains(self, seen: Observations) -> float:
        """Share of the Poisson deviance of the costs that knowing the tokens, not just their rungs, explains."""
        predicted = self.costs(self.scores(seen))[np.arange(len(seen)), seen.rungs.numpy()]
        return 1 - _deviance(seen.costs.numpy(), predicted) / _deviance(seen.costs.numpy(), _rung_means(seen))


@dataclass(frozen=True)
class Policy:
    """Which rung for which score, and what it was chosen by."""

    chunking: ChunkingConfig
    selection: SelectionConfig
    price: float
    """The Lagrangian: nats that one direction of a token's mean rank must save."""


def fit_costs(
    seen: Observations,
    vocab_size: int,
    rungs: int,
    signals: Collection[str] = SIGNALS,
    *,
    ids: int = 2,
    ridge: float = 80.0,
    least_steps: int = 400,
    seed: int = 0,
) -> CostModel:
    """Fit a `CostModel` by Poisson regression, which finds means and bears the long tail of costs.

    Args:
        seen: Observed costs, all known.
        vocab_size: Token ids below this get a number of their own.
        rungs: Rungs of the ladder; those that were not observed are interpolated.
        signals: Which of `SIGNALS` to use.
        ids: 0 uses no token ids, 1 the token's own, 2 also the one before.
        ridge: How many mean tokens' worth of evidence stand against an id being unlike the others.
        least_steps: Steps of gradient descent; more where six times over the observations takes more.
        seed: Of their order.
    """
    generator = torch.Generator().manual_seed(seed)
    used = torch.tensor([name in signals for name in SIGNALS])
    means = seen.signals.nanmean(0).nan_to_num(0)
    centred = (seen.signals - means).nan_to_num(0) * used
    scale = float(seen.costs.mean().clamp_min(1e-12))
    targets = seen.costs / scale
    tables = [torch.zeros(vocab_size + 1, requires_grad=True) for _ in range(2)]
    weights = torch.zeros(len(SIGNALS), requires_grad=True)
    means_of_rungs = torch.from_numpy(_means(seen, rungs)) / scale
    offsets = means_of_rungs.clamp_min(1e-9).log().float().requires_grad_()
    slopes = torch.ones(rungs, requires_grad=True)
    optimizer = torch.optim.Adam([*tables[:ids], weights, offsets, slopes], lr=2e-2)
    batches = max(1, len(seen) // 2048)
    epochs = max(6, -(-least_steps // batches))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=epochs * batches)
    for _ in range(epochs):
        for chosen in torch.randperm(len(seen), generator=generator).chunk(batches):
            # The last row of a table stands for no token: its number stays 0 through the ridge alone.
            score = tables[0][seen.tokens[chosen]] + tables[1][seen.previous[chosen]] + centred[chosen] @ weights
            log_cost = (offsets[seen.rungs[chosen]] + slopes[seen.rungs[chosen]] * score).clamp(-12, 6)
            loss = (log_cost.exp() - targets[chosen] * log_cost).mean()
            loss = loss + ridge / len(seen) * sum(table.square().sum() for table in tables)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        tables = [table[:-1] for table in tables]
        observed = torch.bincount(seen.rungs, minlength=rungs).numpy() > 0
        return CostModel(
            LearnedComplexity(*(tensor.numpy().copy() for tensor in (*tables, weights * used, means))),
            _interpolated(offsets.numpy() + np.log(scale), observed),
            _interpolated(slopes.numpy(), observed),
        )


def choose_rungs(
    model: CostModel, scores: np.ndarray, rung_ranks: Sequence[float], mean_rank: float, allowed: Collection[int]
) -> Policy:
    """The policy that spends `mean_rank` on tokens with these `scores` at least predicted cost.

    Chunks end wherever the rung changes: in the gate form a change costs nothing, and long chunks lose much of what
    choosing gains. Only `allowed` rungs are chosen.
    """
    quantiles = np.quantile(scores, (np.arange(GRID) + 0.5) / GRID)
    edges = np.quantile(scores, np.arange(1, GRID) / GRID)
    rungs = np.array(sorted(allowed))
    ranks = np.array(rung_ranks)[rungs]
    costs = model.costs(quantiles)[:, rungs]

    def chosen(price: float) -> np.ndarray:
        return np.maximum.accumulate((costs + price * ranks).argmin(1))

    price = price_for(lambda price: float(ranks[chosen(price)].mean()), mean_rank)
    of_grid = chosen(price)
    levels: dict[float, int] = {}  # the threshold below each level, and its rung
    for edge, before, after in zip(edges, of_grid, of_grid[1:], strict=False):
        if after != before:
            levels[float(0.5 * (1 + np.tanh(edge / 2)))] = int(after)
    shares = [float(ranks[i] / rung_ranks[-1]) for i in (of_grid[0], *levels.values())]
    return Policy(
        ChunkingConfig(min_length=1, thresholds=tuple(levels), hysteresis=0.0, memory=1.0, hard_share=1.0),
        SelectionConfig(rank_shares=tuple(shares), scales=(1.0,) * len(shares)),
        price,
    )


def price_for(spent: Callable[[float], float], mean_rank: float) -> float:
    """The lowest price of rank, at most 1,000, at which no more than `mean_rank` is `spent`, which falls with it."""
    low, high = 1e-9, 1e3
    for _ in range(80):
        price = (low * high) ** 0.5
        low, high = (price, high) if spent(price) > mean_rank else (low, price)
    return high


def _means(seen: Observations, rungs: int) -> np.ndarray:
    """(rungs,) mean cost, 0 where not observed."""
    counts = np.bincount(seen.rungs.numpy(), minlength=rungs)
    return np.bincount(seen.rungs.numpy(), seen.costs.numpy(), minlength=rungs) / np.maximum(counts, 1)


def _rung_means(seen: Observations) -> np.ndarray:
    return _means(seen, int(seen.rungs.max()) + 1)[seen.rungs.numpy()]


def _deviance(costs: np.ndarray, predicted: np.ndarray) -> float:
    costs, predicted = np.maximum(costs, 1e-12), np.maximum(predicted, 1e-12)
    return float((costs * np.log(costs / predicted) - costs + predicted).sum())


def _interpolated(values: np.ndarray, observed: np.ndarray) -> np.ndarray:
    rungs = np.arange(len(values))
    return np.interp(rungs, rungs[observed], values[observed])
