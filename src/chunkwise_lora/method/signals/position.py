"""The signal `position`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from chunkwise_lora.method.signals.base import Signal, register_signal


@register_signal("position")
@dataclass
class PositionalPrior(Signal):
    """`2 ** (-t / half_life)` for the token at position t: early tokens are harder, since little context precedes them.

    Source: arXiv 2601.21109, token complexity estimator.
    """

    half_life: float = 64.0
    """Tokens after which the value halves."""
    _position: int = field(default=0, init=False, repr=False)

    def update(self, token: int, entropy: float | None) -> float:
        """Return the prior of the next position."""
        now = self._position
        self._position = now + 1
        return 2.0 ** (-now / self.half_life)

    def update_all(self, tokens: Sequence[int], entropies: Sequence[float | None]) -> list[float]:
        """Return the priors of the next positions."""
        start, self._position = self._position, self._position + len(tokens)
        return [2.0 ** (-position / self.half_life) for position in range(start, self._position)]
