"""The signal `novelty`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from chunkwise_lora.method.signals.base import Signal, register_signal


@register_signal("novelty")
@dataclass
class Novelty(Signal):
    """Share of the n-grams ending at the token that the last `window` tokens did not contain.

    The n-grams are those of length 1 to `ngram`. A token is hard where the text does not repeat itself. Source:
    arXiv 2601.21109, token complexity estimator.
    """

    ngram: int = 3
    """Longest n-gram, in tokens."""
    window: int = 512
    """How far back an n-gram may lie to be known, in tokens."""
    _last_seen: dict[tuple[int, ...], int] = field(default_factory=dict, init=False, repr=False)
    _recent: tuple[int, ...] = field(default=(), init=False, repr=False)
    _position: int = field(default=0, init=False, repr=False)

    def update(self, token: int, entropy: float | None) -> float:
        """Return the share of new n-grams."""
        return self.update_all((token,), (entropy,))[0]

    def update_all(self, tokens: Sequence[int], entropies: Sequence[float | None]) -> list[float]:
        """Return the shares of new n-grams."""
        seen, recent = self._last_seen, self._recent
        shares = []
        for now, token in enumerate(tokens, self._position):
            recent = (*recent, token)[-self.ngram :]
            oldest = now - self.window
            new = 0
            for start in range(len(recent)):
                ngram = recent[start:]
                if seen.get(ngram, -math.inf) < oldest:
                    new += 1
                seen[ngram] = now
            shares.append(new / len(recent))
            if (now + 1) % self.window == 0:  # memory stays bounded
                self._last_seen = seen = {ngram: last for ngram, last in seen.items() if last > oldest}
        self._recent = recent
        self._position += len(tokens)
        return shares
