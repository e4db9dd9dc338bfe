"""How far the mean over a text can be trusted."""

from __future__ import annotations

import math

from torch import Tensor

MAX_SEGMENT = 64
"""Tokens per segment. Neighbouring tokens are alike, so the error is estimated from the means of segments."""
MIN_SEGMENTS = 8
"""Fewest segments; short texts are cut into shorter ones."""


def standard_error(values: Tensor) -> float:
    """The standard error of the mean of values (n,) of the tokens of a text, in their order."""
    length = max(1, min(MAX_SEGMENT, len(values) // MIN_SEGMENTS))
    means = values.unfold(0, length, length).mean(1)
    return float(means.std(correction=0)) / math.sqrt(len(means))
