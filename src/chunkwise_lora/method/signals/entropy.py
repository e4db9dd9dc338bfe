"""The signal `entropy`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from chunkwise_lora.method.signals.base import Signal, register_signal


@register_signal("entropy")
@dataclass
class Entropy(Signal):
    """Entropy of the next-token distribution, divided by its maximum `log(vocab_size)`.

    A token is hard where the model was unsure what comes next. Source: arXiv 2601.21109, token complexity estimator.
    """

    needs_entropy: ClassVar[bool] = True

    vocab_size: int
    """Entries of the model's vocabulary."""

    def __post_init__(self) -> None:
        self._maximum = math.log(max(self.vocab_size, 2))

    def update(self, token: int, entropy: float | None) -> float | None:
        """Return the share of the maximal entropy, limited to [0, 1]."""
        return None if entropy is None else min(1.0, max(0.0, entropy / self._maximum))

    def update_all(self, tokens: Sequence[int], entropies: Sequence[float | None]) -> Sequence[float | None]:
        """Return the shares of the maximal entropy. For a prompt, none is known."""
        if not any(entropies):
            return [None if entropy is None else 0.0 for entropy in entropies]
        return super().update_all(tokens, entropies)
