"""Checks that attention reads a cache slot by slot, as KV decisions need it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from chunkwise_lora.errors import EngineError

ANOTHER_ATTENTION = (
    "the model does not read its cache through the engine's attention function; load it with "
    "attn_implementation='sdpa' and leave FastPaths.attention on, if the model supports that"
)
ANOTHER_MASK = "the model's attention masks are not over the slots of its cache (a window, or a bias by position?)"
NOT_PLANNED = "the cache was used in a pass that was not planned"


class Reading:
    """Whether every pass so far has read all layers through `attention`, under a mask of the slots in use.

    Only then may KV decisions move slots: attention code of the model itself may tell positions by slots. Once slots
    have moved, a pass that reads them in another way is an error.
    """

    def __init__(self) -> None:
        self.obstacle: str | None = None
        """Why slots must not move; None if they may."""
        self.moved = False
        """Whether slots have moved."""
        self.visible: np.ndarray | None = None
        """(batch, slots) bool: the slots that the last token of the running pass sees; None between passes."""
        self._matched: list[Tensor | None] = []
        """The last mask of the running pass that was compared, if there is one."""

    def begin(self, visible: np.ndarray) -> None:
        """Start a pass, whose last token sees the slots `visible` (batch, slots), those of the pass included."""
        self.visible, self._matched = visible, []

    def compare(self, mask: Tensor | None, tokens: int) -> None:
        """Compare the mask (batch, 1, tokens, slots) that attention gets for `tokens` queries with the slots in use.

        Raises:
            EngineError: They differ, and slots have moved.
        """
        if self._matched and mask is self._matched[0]:
            return
        if self.visible is None:
            self._found(NOT_PLANNED)
        elif not _shows(mask, tokens, self.visible):
            self._found(ANOTHER_MASK)
        else:
            self._matched = [mask]

    def end(self, all_layers: bool) -> None:
        """End a pass.

        Args:
            all_layers: Whether `attention` has read all layers.

        Raises:
            EngineError: It has not, and slots have moved.
        """
        if not all_layers:
            self._found(ANOTHER_ATTENTION)
        self.visible, self._matched = None, []

    def _found(self, obstacle: str) -> None:
        if self.moved:
            raise EngineError(f"KV decisions have moved the cache's entries, but {obstacle}")
        self.obstacle = self.obstacle or obstacle


def _shows(mask: Tensor | None, tokens: int, visible: np.ndarray) -> bool:
    """Return whether the last query sees exactly the slots `visible` (batch, slots)."""
    batch, slots = visible.shape
    if mask is None:  # attention is causal then, and counts queries from the first slot
        return bool(visible.all()) and tokens in (1, slots)
    if mask.ndim != 4 or mask.shape[0] not in (1, batch) or mask.shape[3] != slots:
        return False
    last = mask[:, :, -1]
    shown = last if last.dtype == torch.bool else last == 0
    return bool((shown == torch.from_numpy(visible).to(mask.device)[:, None]).all())
