"""The largest memory that a block of code needs: of the process, or of the GPU that the code runs on."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Self

import torch

from chunkwise_lora.backends.native import give_memory_back

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Measures how far the memory rises during a `with` block.

    On a CPU this is the resident memory of the process, as Linux reports it. Memory that was in use before the block,
    such as the model's weights, does not count.
    """

    bytes: int | None = None
    """After the block: the rise of the memory in bytes; None if this system does not report it."""

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
        """Begin a new peak; returns the bytes in use now, or None if this system does not report them."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return torch.cuda.memory_allocated(self._device)
        try:
            give_memory_back()  # otherwise the block could use freed memory without a rise
            _CLEAR.write_text("5")
            return _resident("VmRSS")
        except OSError:
            return None

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else _resident("VmHWM")


def _resident(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
