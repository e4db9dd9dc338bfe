"""The signal `attention`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from chunkwise_lora.method.signals.base import Signal, register_signal


@register_signal("attention")
@dataclass
class AttentionProxy(Signal):
    """Distance to the last occurrence of the same token, on a log scale: `log(1 + distance) / log(1 + window)`.

    A token that relates to a distant or missing past asks more of attention than one that was just repeated.
    The paper (arXiv 2601.21109, token complexity estimator) does not define its attention proxy. This one needs no
    attention weights, so it works with fused kernels.
    """

    window: int = 512
    """Distance in tokens from which on the value is 1."""
    _last_seen: dict[int, int] = field(default_factory=dict, init=False, repr=False)
    _position: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        self._scale = math.log1p(self.window)

    def update(self, token: int, entropy: float | None) -> float:
        """Return the distance; 1 for a token that the window does not contain."""
        return self.update_all((token,), (entropy,))[0]

    def update_all(self, tokens: Sequence[int], entropies: Sequence[float | None]) -> list[float]:
        """Return the distances."""
        seen, scale, log1p = self._last_seen, self._scale, math.log1p
        distances = []
        for now, token in enumerate(tokens, self._position):
            distances.append(min(1.0, log1p(now - seen.get(token, -math.inf)) / scale))
            seen[token] = now
            if (now + 1) % self.window == 0:  # memory stays bounded
                oldest = now + 1 - self.window
                self._last_seen = seen = {other: last for other, last in seen.items() if last >= oldest}
        self._position += len(tokens)
        return distances
