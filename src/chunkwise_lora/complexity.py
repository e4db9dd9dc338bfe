"""Component 1: how hard is each token? (paper, token complexity estimator)"""

from __future__ import annotations

import math
from collections.abc import Sequence

from chunkwise_lora.config import ComplexityConfig


class TokenComplexityEstimator:
    """Streams tokens of one sequence into complexity scores in [0, 1].

    Four signals, each in [0, 1] and causal:

    - *entropy* of the distribution that predicted the token, over its maximum. Unknown for prompt tokens.
    - *novelty*: the share of the 1- to n-grams ending here that the last `window` tokens did not contain.
    - *attention proxy*: how far back the same token last stood, on a log scale. A token that must be related
      to a distant or missing past asks more of attention than one just repeated. The paper does not fix its
      proxy; this one needs no attention weights, so it works with fused kernels.
    - *position*: `2 ** (-t / half_life)`, early tokens are harder.

    The score is their weighted mean; a signal that is not known is left out and the other weights renormalised.
    """

    def __init__(self, config: ComplexityConfig, vocab_size: int) -> None:
        self.config = config
        self._max_entropy = math.log(max(vocab_size, 2))
        self._last_seen: dict[tuple[int, ...], int] = {}
        self._recent: tuple[int, ...] = ()
        self._position = 0

    def update(self, tokens: Sequence[int], entropies: Sequence[float | None]) -> list[float]:
        """Scores of the next `tokens`; `entropies` in nats, None where not known."""
        return [self._score(token, entropy) for token, entropy in zip(tokens, entropies, strict=True)]

    def _score(self, token: int, entropy: float | None) -> float:
        config, now = self.config, self._position
        self._recent = (*self._recent, token)[-config.ngram :]
        ngrams = [self._recent[-n:] for n in range(1, len(self._recent) + 1)]
        ages = [now - self._last_seen.get(ngram, -math.inf) for ngram in ngrams]
        for ngram in ngrams:
            self._last_seen[ngram] = now
        self._position += 1
        if self._position % config.window == 0:
            self._forget()

        weighted = [
            (config.novelty, sum(age > config.window for age in ages) / len(ages)),
            (config.attention, min(1.0, math.log1p(ages[0]) / math.log1p(config.window))),
            (config.position, 2.0 ** (-now / config.half_life)),
        ]
        if entropy is not None:
            weighted.append((config.entropy, min(1.0, max(0.0, entropy / self._max_entropy))))
        total = sum(weight for weight, _ in weighted)
        # Nothing known: neither easy nor hard.
        return sum(weight * value for weight, value in weighted) / total if total else 0.5

    def _forget(self) -> None:
        """Drop n-grams that left the window, so that memory stays bounded."""
        oldest = self._position - self.config.window
        self._last_seen = {ngram: seen for ngram, seen in self._last_seen.items() if seen >= oldest}
