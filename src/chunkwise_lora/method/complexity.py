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

MANY_TOKENS = 16
"""From this number of tokens on, arrays are faster than single numbers."""


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
        if len(tokens) < MANY_TOKENS:
            return [self._score(token, entropy) for token, entropy in zip(tokens, entropies, strict=True)]
        values = [signal.update_all(tokens, entropies) for signal in self._signals]
        if self._learned is not None:
            previous, self._previous = [self._previous, *tokens[:-1]], tokens[-1]
            costs = map(self._learned.log_cost, tokens, previous, zip(*values, strict=True))
            return [_share_of(cost) for cost in costs]
        for name, _, signal in self._others:
            values.append(signal.update_all(tokens, entropies))
            _check_range(name, values[-1])
        return self._weighted_means(values)

    def signals(self, token: int, entropy: float | None) -> tuple[float | None, ...]:
        """Read the next token like `update`, and return (4,) the values of `SIGNALS`; None if a value is not known."""
        return tuple([signal.update(token, entropy) for signal in self._signals])

    def _score(self, token: int, entropy: float | None) -> float:
        signals = self.signals(token, entropy)
        if self._learned is not None:
            previous, self._previous = self._previous, token
            return _share_of(self._learned.log_cost(token, previous, signals))
        weighted = total = 0.0
        for weight, value in zip(self._weights, signals, strict=True):
            if value is not None:
                weighted += weight * value
                total += weight
        for name, weight, signal in self._others:
            value = signal.update(token, entropy)
            if value is not None:
                _check_range(name, (value,))
                weighted += weight * value
                total += weight
        # If no signal is known, the token counts as neither easy nor hard.
        return weighted / total if total else 0.5

    def _weighted_means(self, values: Sequence[Sequence[float | None]]) -> list[float]:
        """Return the scores of many tokens from (signals, tokens) values, with the same sums in the same order."""
        weighted, total = np.zeros(len(values[0])), np.zeros(len(values[0]))
        for weight, of_signal in zip([*self._weights, *(weight for _, weight, _ in self._others)], values, strict=True):
            numbers = np.array(of_signal, float)  # None becomes NaN
            known = ~np.isnan(numbers)
            weighted += np.where(known, weight * numbers, 0.0)
            total += np.where(known, weight, 0.0)
        return np.where(total == 0, 0.5, weighted / np.where(total == 0, 1.0, total)).tolist()


def _share_of(log_cost: float) -> float:
    """Return a / (1 + a) for a token that costs a times the mean cost."""
    return 0.5 * (1 + math.tanh(log_cost / 2))


def _check_range(name: str, values: Sequence[float | None]) -> None:
    for value in values:
        if value is not None and not 0 <= value <= 1:
            raise ConfigError(f"complexity.signals: {name!r} gave {value}; a signal must stay within 0 and 1")
