"""Component 4: how do chunks join without a jump? (arXiv 2601.21109, boundary-safe composer)"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from chunkwise_lora.method.config import CompositionConfig
from chunkwise_lora.method.selection import Selection


class BoundarySafeComposer:
    """Turns the selections of one sequence into weights over the rungs.

    Inside a chunk, the selected rung has the weight `scale` and all others 0. The first w tokens of a chunk are
    cross-faded: token j gets `(1 - u) * old + u * new` with `u = (j + 1) / (w + 1)`. All rungs share the factors `up`
    and `down`, so mixing weights is the same as mixing the adapters' outputs.

    Args:
        config: Holds w, the window of the cross-fade in tokens.
        rungs: Number of rungs of the ladder.
    """

    def __init__(self, config: CompositionConfig, rungs: int) -> None:
        self.window = config.window
        self._rungs = rungs
        self._outgoing: Selection | None = None
        self._incoming: Selection | None = None

    def weights(self, parts: Sequence[tuple[Selection, int, int]]) -> np.ndarray:
        """Return (tokens, rungs) float32 weights of the next tokens.

        Args:
            parts: For each chunk of the tokens, in order, its selection, the number of its tokens that already have
                weights, and the number of its next tokens.
        """
        weights = np.zeros((sum(count for _, _, count in parts), self._rungs), np.float32)
        start = 0
        for selection, offset, count in parts:
            if offset == 0 or self._incoming is None:
                self._outgoing, self._incoming = self._incoming, selection
            weights[start : start + count, selection.rung] = selection.scale
            if self._outgoing is not None:
                self._fade(weights[start : start + count], self._outgoing, selection, offset)
            start += count
        return weights

    def _fade(self, weights: np.ndarray, outgoing: Selection, incoming: Selection, offset: int) -> None:
        """Cross-fade the tokens of a chunk, after `offset` others, that lie within the window."""
        for token in range(min(len(weights), self.window - offset)):
            u = np.float32((offset + token + 1) / (self.window + 1))
            weights[token, incoming.rung] = 0
            weights[token, outgoing.rung] = (1 - u) * np.float32(outgoing.scale)
            weights[token, incoming.rung] += u * np.float32(incoming.scale)
