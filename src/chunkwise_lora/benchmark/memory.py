"""The largest memory that a block of code needs: memory of the process, or of the GPU that it runs on."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Self

import torch

from chunkwise_lora.backends.native import give_memory_back

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Measures a `with` block.

    On a CPU this is the resident memory of the process as Linux counts it. What was in memory before the block began,
    such as the model's weights, is not counted.
    """

    bytes: int | None = None
    """After the block: how many bytes the memory rose above its start; None if this system does not tell."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> Self:
        gc.collect()
        self._start = self._reset()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._start is not None:
            self.bytes = max(0, self._peak() - self._start)

    def _reset(self) -> int | None:
        """Forget the peak so far; returns the bytes held now, or None if this system does not tell."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return torch.cuda.memory_allocated(self._device)
        try:
            give_memory_back()  # freed memory that is used again would not be counted
            _CLEAR.write_text("5")
            return _resident("VmRSS")
        except OSError:
            return None

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else _resident("VmHWM")


def _resident(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
