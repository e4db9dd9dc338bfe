"""Bootstrap intervals of measured values (Efron and Tibshirani, 1993)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
"""Bootstrap samples per interval."""
SEGMENT = 64
"""Tokens per segment. Segments are treated as independent; tokens are not, because neighbours are similar."""


Statistic = Callable[[np.ndarray], np.ndarray]
"""Computes values (...,) from means (..., fields) of measurements; see `bootstrap`."""


@dataclass(frozen=True)
class Estimate:
    """A value and its 95% bootstrap interval."""

    value: float
    low: float
    high: float


def bootstrap(pieces: np.ndarray, statistic: Statistic = lambda means: means[..., 0], seed: int = 0) -> Estimate:
    """Compute a statistic of the mean of independent pieces, and its 95% interval over resampled pieces.

    Args:
        pieces: (n, fields) measurements, such as one row per example or segment.
        statistic: Computes the value from the mean; by default the first field.
        seed: Seed of the resampling.
    """
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(len(pieces), np.full(len(pieces), 1 / len(pieces)), RESAMPLES)
    low, high = np.quantile(statistic(counts @ pieces / len(pieces)), [0.025, 0.975])
    return Estimate(float(statistic(pieces.mean(0))), float(low), float(high))


def segments(values: np.ndarray) -> np.ndarray:
    """Cut every row of values (rows, tokens) into segments.

    Returns:
        (n, 2) the sum of each segment and its number of tokens, for `bootstrap` with `per_token`.
    """
    starts = np.arange(0, values.shape[1], SEGMENT)
    sums = np.add.reduceat(values, starts, axis=1)
    sizes = np.broadcast_to(np.diff(starts, append=values.shape[1]), sums.shape)
    return np.stack([sums, sizes], axis=-1).reshape(-1, 2)


def per_token(means: np.ndarray) -> np.ndarray:
    """The mean over tokens (...,), from the mean (..., 2) of rows of `segments`."""
    return means[..., 0] / means[..., 1]


def relative_increase(means: np.ndarray) -> np.ndarray:
    """How much the first of two values (..., 2) is above the second one, as a share of the second one."""
    return means[..., 0] / means[..., 1] - 1
