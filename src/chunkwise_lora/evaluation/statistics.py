"""How sure a number is: bootstrap over the independent pieces it was measured on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
SEGMENT = 64
"""Neighbouring tokens are alike; segments of so many are taken as independent."""


Statistic = Callable[[np.ndarray], np.ndarray]
"""Takes means of pieces (..., fields) and gives (...,)."""


@dataclass(frozen=True)
class Estimate:
    """A value and its 95% bootstrap interval."""

    value: float
    low: float
    high: float


def bootstrap(pieces: np.ndarray, statistic: Statistic = lambda means: means[..., 0], seed: int = 0) -> Estimate:
    """The statistic of the mean of `pieces` (n, fields) and its interval over resampled pieces."""
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(len(pieces), np.full(len(pieces), 1 / len(pieces)), RESAMPLES)
    low, high = np.quantile(statistic(counts @ pieces / len(pieces)), [0.025, 0.975])
    return Estimate(float(statistic(pieces.mean(0))), float(low), float(high))


def segments(values: np.ndarray) -> np.ndarray:
    """(n, 2) sums over segments of the tokens of every row of (rows, tokens), and how many tokens these are."""
    starts = np.arange(0, values.shape[1], SEGMENT)
    sums = np.add.reduceat(values, starts, axis=1)
    sizes = np.broadcast_to(np.diff(starts, append=values.shape[1]), sums.shape)
    return np.stack([sums, sizes], axis=-1).reshape(-1, 2)


def per_token(means: np.ndarray) -> np.ndarray:
    """(...,) the mean over tokens, of means (..., 2) over `segments`."""
    return means[..., 0] / means[..., 1]
