"""The choice of rungs: one Lagrange multiplier for a whole text decides every token's rung.

A token's rung is argmin_k cost(k) + multiplier * rank(k). The predicted cost depends on the token's score alone, so the
choice is a set of thresholds on the score.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from chunkwise_lora.calibration.cost_model import CostModel
from chunkwise_lora.method.config import ChunkingConfig, SelectionConfig

QUANTILES = 256
"""Number of equally frequent ranges of scores; a threshold lies between two of them."""
MIN_MULTIPLIER, MAX_MULTIPLIER = 1e-9, 1e3
"""Range of the search for the multiplier, in nats per unit of rank. It covers all costs from rounding errors to far
above any entropy."""
BISECTIONS = 80
"""Steps of the search; each halves the range of the multiplier's logarithm."""


@dataclass(frozen=True)
class RungPolicy:
    """Thresholds on the score, the rung above each of them, and the multiplier that gave both."""

    chunking: ChunkingConfig
    selection: SelectionConfig
    multiplier: float
    """The Lagrange multiplier: nats that one unit of a token's rank must save."""


def choose_rungs(
    model: CostModel, scores: np.ndarray, rung_ranks: Sequence[float], mean_rank: float, allowed: Collection[int]
) -> RungPolicy:
    """The policy with the least predicted cost that spends at most `mean_rank` on a text.

    A chunk ends wherever the rung changes. A change costs nothing, because rungs are gates over the same directions,
    and longer chunks lose much of the gain.

    Args:
        model: Predicts the costs.
        scores: (n,) the scores of the text's tokens.
        rung_ranks: (rungs,) the rank of each rung.
        mean_rank: Budget: the mean rank of the tokens.
        allowed: Rungs that may be chosen.
    """
    quantiles = np.quantile(scores, (np.arange(QUANTILES) + 0.5) / QUANTILES)
    edges = np.quantile(scores, np.arange(1, QUANTILES) / QUANTILES)
    rungs = np.array(sorted(allowed))
    ranks = np.array(rung_ranks)[rungs]
    costs = model.costs(quantiles)[:, rungs]

    def chosen(multiplier: float) -> np.ndarray:
        return np.maximum.accumulate((costs + multiplier * ranks).argmin(1))

    multiplier = multiplier_for(lambda multiplier: float(ranks[chosen(multiplier)].mean()), mean_rank)
    of_quantiles = chosen(multiplier)
    levels: dict[float, int] = {}  # threshold of each level above the first, and its rung
    for edge, before, after in zip(edges, of_quantiles, of_quantiles[1:], strict=False):
        if after != before:
            levels[float(0.5 * (1 + np.tanh(edge / 2)))] = int(after)
    shares = [float(ranks[i] / rung_ranks[-1]) for i in (of_quantiles[0], *levels.values())]
    return RungPolicy(
        ChunkingConfig(min_length=1, thresholds=tuple(levels), hysteresis=0.0, memory=1.0, hard_share=1.0),
        SelectionConfig(rank_shares=tuple(shares), scales=(1.0,) * len(shares)),
        multiplier,
    )


def multiplier_for(spent: Callable[[float], float], mean_rank: float) -> float:
    """Find the lowest Lagrange multiplier at which the mean rank is at most `mean_rank`, by bisection.

    Args:
        spent: The mean rank at a multiplier; it must not rise with the multiplier.
        mean_rank: The budget.
    """
    low, high = MIN_MULTIPLIER, MAX_MULTIPLIER
    for _ in range(BISECTIONS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if spent(middle) > mean_rank else (low, middle)
    return high
