"""A decode step over a cache whose storage and sizes are tensors, so that a CUDA graph can run it for any cache."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch
from torch import Tensor


class StepRefused(Exception):
    """The model cannot run a decode step in this way. The message says why."""


class StepTables:
    """Where the storage of a cache lies, and which slots are in use.

    Args:
        kernels: The module `backends.triton.attention`.
        layers: Number of layers of the cache.
        batch: Number of sequences.
        device: The device of the cache.
    """

    def __init__(self, kernels: ModuleType, layers: int, batch: int, device: torch.device) -> None:
        self.kernels = kernels
        self.pools = torch.zeros(layers, kernels.POOLS, dtype=torch.int64, device=device)
        """(layers, POOLS) as `attention` takes them."""
        self.step = torch.zeros(kernels.STEP, dtype=torch.int64, device=device)
        self.mask = torch.ones(batch, 1, 1, 1, dtype=torch.bool, device=device)
        """What the model gets in place of a mask. Attention reads the slots that sequences see from `step`."""
        self._numbers: list[list[int]] = []
        self._seen: Tensor | None = None
        """(batch, slots) bool, whose address `step` holds."""

    def fill(self, pools: list[list[int]], cold_and_hot: tuple[int, int], seen: np.ndarray) -> None:
        """Take a cache.

        Args:
            pools: (layers, POOLS) numbers, as `attention` takes them.
            cold_and_hot: Slots in use of the two pools of every layer.
            seen: (batch, slots) bool: the slots that sequences see, the new token's included.
        """
        if pools != self._numbers:
            flat = [number for of_layer in pools for number in of_layer]
            self.kernels.on_device(flat, self.pools.view(-1))
            self._numbers = pools
        self._seen = None if seen.all() else _copied(seen, self.pools.device)
        mask = (0, 0) if self._seen is None else (self._seen.data_ptr(), self._seen.stride(0))
        self.kernels.on_device([*cold_and_hot, *mask], self.step)


def _copied(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
