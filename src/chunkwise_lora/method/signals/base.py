"""What a complexity signal is, and the registry of signals."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from chunkwise_lora.method.registry import Registry


class Signal(ABC):
    """One sign of how hard a token is (paper arXiv 2601.21109, token complexity estimator).

    A signal reads the tokens of one sequence in order. It is causal: its value for token t depends on tokens up to t
    and on the distribution that predicted token t, on nothing later. One object serves one sequence and must support
    `copy.deepcopy`, because a beam search copies sequences.

    A subclass is usually a dataclass whose fields are its settings. Fields called `vocab_size` (entries of the
    model's vocabulary), `ngram`, `window` and `half_life` get the values of the model and of `ComplexityConfig`; other
    fields keep their defaults.
    """

    needs_entropy: ClassVar[bool] = False
    """Whether the signal reads the entropy. An engine computes entropies only if a signal in use reads them."""

    @abstractmethod
    def update(self, token: int, entropy: float | None) -> float | None:
        """Read the next token and return its value.

        Args:
            token: The token's id.
            entropy: Entropy in nats of the distribution that predicted the token. None where it is not known, as for
                the tokens of a prompt.

        Returns:
            A value in [0, 1], where 1 is hardest, or None where the signal does not know.
        """

    def update_all(self, tokens: Sequence[int], entropies: Sequence[float | None]) -> Sequence[float | None]:
        """Read the next tokens, such as a prompt, and return their values: those that `update` gives one by one.

        Override it if the signal can read many tokens in less time.
        """
        return [self.update(token, entropy) for token, entropy in zip(tokens, entropies, strict=True)]


PAPER_SIGNALS = ("entropy", "novelty", "attention", "position")
"""The paper's four signals, each with its own weight in `ComplexityConfig`."""

SIGNAL_REGISTRY: Registry[Signal] = Registry("signal")
register_signal = SIGNAL_REGISTRY.register
