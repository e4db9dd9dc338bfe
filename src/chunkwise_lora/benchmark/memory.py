"""The peak of a stretch of work: memory of the process, or of the GPU it runs on."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Self

import torch

from chunkwise_lora.backends.native import give_memory_back

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Measures a `with` block; afterwards `bytes` is how far memory rose above its start, None where unknown.

    On a CPU that is resident memory as Linux counts it; weights and whatever else was there before do not count.
    """

    bytes: int | None = None

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
        """Let the peak begin here; returns what is held now."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return torch.cuda.memory_allocated(self._device)
        try:
            give_memory_back()  # so that it is not used again uncounted
            _CLEAR.write_text("5")
            return _resident("VmRSS")
        except OSError:
            return None

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else _resident("VmHWM")


def _resident(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
