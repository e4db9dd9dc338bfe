"""Component 1: how hard is each token? (arXiv 2601.21109, token complexity estimator)"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from chunkwise_lora.errors import ConfigError
from chunkwise_lora.method.config import ComplexityConfig
from chunkwise_lora.method.signals import PAPER_SIGNALS, SIGNAL_REGISTRY, Signal

SIGNALS = PAPER_SIGNALS
"""The order of `LearnedComplexity.weights`."""


@dataclass(frozen=True)
class LearnedComplexity:
    """What calibration learned about an adapter: the predicted cost of running a token at a low rank.

    The logarithm of a token's cost, relative to the mean cost, is modelled as a sum: one number for the token's id,
    one number for the id before it, and a weight on each of the paper's four signals. Other registered signals are
    not used.
    """

    token: np.ndarray
    """(vocabulary,) float32, the number of each token id. Ids beyond the array count as 0."""
    previous: np.ndarray
    """(vocabulary,) float32, the number of each id that precedes a token."""
    weights: np.ndarray
    """(4,) float32, a weight per entry of `SIGNALS`, applied to the signal minus its mean."""
    means: np.ndarray
    """(4,) float32, the mean of each signal. A signal that is not known counts as its mean."""

    @classmethod
    def neutral(cls) -> LearnedComplexity:
        """Return a model without learned values: it predicts the mean cost for every token."""
        return cls(np.zeros(0), np.zeros(0), np.zeros(len(SIGNALS)), np.zeros(len(SIGNALS)))

    def log_cost(self, token: int, previous: int | None, signals: Sequence[float | None]) -> float:
        """Return the natural logarithm of the token's cost relative to the mean cost.

        Args:
            token: The token's id.
            previous: The id before it, None for the first token.
            signals: (4,) the values of `SIGNALS`, None where a value is not known.
        """
        cost = float(self.token[token]) if token < len(self.token) else 0.0
        if previous is not None and previous < len(self.previous):
            cost += float(self.previous[previous])
        for weight, mean, value in zip(self.weights, self.means, signals, strict=True):
            if value is not None:
                cost += float(weight) * (value - float(mean))
        return cost


class TokenComplexityEstimator:
    """Turns the tokens of one sequence into complexity scores in [0, 1], token by token.

    Without `learned`, the score is the weighted mean of the signals that `config` gives a weight. A signal that is
    not known for a token is left out, and the other weights are renormalised. With `learned`, the score is
    a / (1 + a) for a token whose predicted cost is a times the mean cost.

    Args:
        config: Weights and settings of the signals.
        vocab_size: Entries of the model's vocabulary.
        learned: What calibration learned, or None for the weighted mean.
    """

    def __init__(self, config: ComplexityConfig, vocab_size: int, learned: LearnedComplexity | None = None) -> None:
        self.config = config
        self._learned = learned
        self._previous: int | None = None
        settings = {
            "vocab_size": vocab_size,
            "ngram": config.ngram,
            "window": config.window,
            "half_life": config.half_life,
        }
        self._signals = [SIGNAL_REGISTRY.create(name, settings) for name in SIGNALS]
        self._weights = [getattr(config, name) for name in SIGNALS]
        self._others: list[tuple[str, float, Signal]] = [
            (name, weight, SIGNAL_REGISTRY.create(name, settings)) for name, weight in config.signals.items() if weight
        ]

    def update(self, tokens: Sequence[int], entropies: Sequence[float | None]) -> list[float]:
        """Score the next tokens.

        Args:
            tokens: (n,) token ids.
            entropies: (n,) entropy in nats of the distribution that predicted each token, None where not known.

        Returns:
            (n,) scores in [0, 1].

        Raises:
            ConfigError: A registered signal gave a value outside [0, 1].
        """
        return [self._score(token, entropy) for token, entropy in zip(tokens, entropies, strict=True)]

    def signals(self, token: int, entropy: float | None) -> tuple[float | None, ...]:
        """Read the next token like `update`, and return (4,) the values of `SIGNALS`; None if a value is not known."""
        return tuple([signal.update(token, entropy) for signal in self._signals])

    def _score(self, token: int, entropy: float | None) -> float:
        signals = self.signals(token, entropy)
        if self._learned is not None:
            previous, self._previous = self._previous, token
            return 0.5 * (1 + math.tanh(self._learned.log_cost(token, previous, signals) / 2))
        weighted = total = 0.0
        for weight, value in zip(self._weights, signals, strict=True):
            if value is not None:
                weighted += weight * value
                total += weight
        for name, weight, signal in self._others:
            value = signal.update(token, entropy)
            if value is not None:
                if not 0 <= value <= 1:
                    raise ConfigError(f"complexity.signals: {name!r} gave {value}; a signal must stay within 0 and 1")
                weighted += weight * value
                total += weight
        # If no signal is known, the token counts as neither easy nor hard.
        return weighted / total if total else 0.5
