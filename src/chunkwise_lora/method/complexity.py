"""Component 1: how hard is each token? (paper, token complexity estimator)"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from chunkwise_lora.method.config import ComplexityConfig

SIGNALS = ("entropy", "novelty", "attention", "position")


@dataclass(frozen=True)
class LearnedComplexity:
    """What calibration learned about an adapter: how the cost of a low rank depends on what is known of a token.

    The log of a token's cost over the mean token's is, up to a constant, the sum of one number for its id, one for
    the id before it, and `weights` on the signals.
    """

    token: np.ndarray
    """(vocabulary,) float32 by token id; ids beyond it count as 0."""
    previous: np.ndarray
    """(vocabulary,) float32 by the id of the token before."""
    weights: np.ndarray
    """(4,) float32 on `SIGNALS`, less their `means`; a signal that is not known counts as its mean."""
    means: np.ndarray
    """(4,) float32"""

    @classmethod
    def neutral(cls) -> LearnedComplexity:
        """Knows nothing: every token is as hard as the mean one."""
        return cls(np.zeros(0), np.zeros(0), np.zeros(len(SIGNALS)), np.zeros(len(SIGNALS)))

    def log_cost(self, token: int, previous: int | None, signals: Sequence[float | None]) -> float:
        """Log of the token's relative cost."""
        cost = float(self.token[token]) if token < len(self.token) else 0.0
        if previous is not None and previous < len(self.previous):
            cost += float(self.previous[previous])
        for weight, mean, value in zip(self.weights, self.means, signals, strict=True):
            if value is not None:
                cost += float(weight) * (value - float(mean))
        return cost


class TokenComplexityEstimator:
    """Streams tokens of one sequence into complexity scores in [0, 1].

    Four signals, each in [0, 1] and causal:

    - *entropy* of the distribution that predicted the token, over its maximum. Unknown for prompt tokens.
    - *novelty*: the share of the 1- to n-grams ending here that the last `window` tokens did not contain.
    - *attention proxy*: how far back the same token last stood, on a log scale. A token that must be related
      to a distant or missing past asks more of attention than one just repeated. The paper does not fix its
      proxy; this one needs no attention weights, so it works with fused kernels.
    - *position*: `2 ** (-t / half_life)`, early tokens are harder.

    Uncalibrated, the score is their weighted mean; a signal that is not known is left out and the other weights
    renormalised. With `learned`, it is a / (1 + a) for a token that costs a times the mean token's.
    """

    def __init__(self, config: ComplexityConfig, vocab_size: int, learned: LearnedComplexity | None = None) -> None:
        self.config = config
        self._learned = learned
        self._max_entropy = math.log(max(vocab_size, 2))
        self._last_seen: dict[tuple[int, ...], int] = {}
        self._recent: tuple[int, ...] = ()
        self._position = 0

    def update(self, tokens: Sequence[int], entropies: Sequence[float | None]) -> list[float]:
        """Scores of the next `tokens`; `entropies` in nats, None where not known."""
        return [self._score(token, entropy) for token, entropy in zip(tokens, entropies, strict=True)]

    def _score(self, token: int, entropy: float | None) -> float:
        previous = self._recent[-1] if self._recent else None
        signals = self.signals(token, entropy)
        if self._learned is not None:
            return 0.5 * (1 + math.tanh(self._learned.log_cost(token, previous, signals) / 2))
        weights = [getattr(self.config, name) for name in SIGNALS]
        known = [(weight, value) for weight, value in zip(weights, signals, strict=True) if value is not None]
        total = sum(weight for weight, _ in known)
        # Nothing known: neither easy nor hard.
        return sum(weight * value for weight, value in known) / total if total else 0.5

    def signals(self, token: int, entropy: float | None) -> tuple[float | None, float, float, float]:
        """Take the next token in and give its `SIGNALS`; the entropy is None where not known."""
        config, now = self.config, self._position
        self._recent = (*self._recent, token)[-config.ngram :]
        ngrams = [self._recent[-n:] for n in range(1, len(self._recent) + 1)]
        ages = [now - self._last_seen.get(ngram, -math.inf) for ngram in ngrams]
        for ngram in ngrams:
            self._last_seen[ngram] = now
        self._position += 1
        if self._position % config.window == 0:
            self._forget()
        return (
            None if entropy is None else min(1.0, max(0.0, entropy / self._max_entropy)),
            sum(age > config.window for age in ages) / len(ages),
            min(1.0, math.log1p(ages[0]) / math.log1p(config.window)),
            2.0 ** (-now / config.half_life),
        )

    def _forget(self) -> None:
        """Drop n-grams that left the window, so that memory stays bounded."""
        oldest = self._position - self.config.window
        self._last_seen = {ngram: seen for ngram, seen in self._last_seen.items() if seen >= oldest}
