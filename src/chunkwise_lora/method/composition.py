"""Component 4: from one chunk's adapter to the next without a jump (paper, boundary-safe composer)"""

from __future__ import annotations

import numpy as np

from chunkwise_lora.method.config import CompositionConfig
from chunkwise_lora.method.selection import Selection


class BoundarySafeComposer:
    """Streams selections of one sequence into weights over the rungs.

    Inside a chunk the weights are one-hot, times the scale. Over the first w tokens after a boundary they move
    from the outgoing to the incoming selection: token j gets `(1 - u) * old + u * new`, `u = (j + 1) / (w + 1)`.
    Since all rungs share `up` and `down`, mixing weights mixes the adapters' outputs exactly.
    """

    def __init__(self, config: CompositionConfig, rungs: int) -> None:
        self.window = config.window
        self._rungs = rungs
        self._outgoing: np.ndarray | None = None
        self._incoming: np.ndarray | None = None

    def weights(self, selection: Selection, offset: int) -> np.ndarray:
        """(rungs,) float32: the weights of the token `offset` tokens into a chunk with `selection`."""
        if offset == 0 or self._incoming is None:
            self._outgoing = self._incoming
            self._incoming = np.zeros(self._rungs, np.float32)
            self._incoming[selection.rung] = selection.scale
        if self._outgoing is None or offset >= self.window:
            return self._incoming
        u = np.float32((offset + 1) / (self.window + 1))
        return (1 - u) * self._outgoing + u * self._incoming
