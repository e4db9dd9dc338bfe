"""Component 4: how do chunks join without a jump? (arXiv 2601.21109, boundary-safe composer)"""

from __future__ import annotations

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
        self._outgoing: np.ndarray | None = None
        self._incoming: np.ndarray | None = None

    def weights(self, selection: Selection, offset: int) -> np.ndarray:
        """Return (rungs,) float32 weights of the next token, which is token `offset` of a chunk with `selection`."""
        if offset == 0 or self._incoming is None:
            self._outgoing = self._incoming
            self._incoming = np.zeros(self._rungs, np.float32)
            self._incoming[selection.rung] = selection.scale
        if self._outgoing is None or offset >= self.window:
            return self._incoming
        u = np.float32((offset + 1) / (self.window + 1))
        return (1 - u) * self._outgoing + u * self._incoming
