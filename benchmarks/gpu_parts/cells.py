"""What is measured, and what was measured so far."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from chunkwise_lora.benchmark.measure import machine
from chunkwise_lora.files import write_atomically

BROKEN_DEVICE = ("CUDA error", "device-side assert", "illegal memory access")
"""Parts of messages after which a process can no longer use its GPU."""


@dataclass(frozen=True)
class Settings:
    """How all cells are measured."""

    device: torch.device
    tiny: bool
    """Whether sizes are so small that a CPU runs everything in seconds. The times then mean nothing."""
    scratch: Path
    """A folder for files that nobody needs afterwards."""
    vllm_kernels: Path | None = None
    """The folder of vLLM's Triton LoRA kernels; None leaves them out."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        return torch.bfloat16


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    name: str
    """Unique within its part."""
    measure: Callable[[], dict[str, Any]]
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """What the result depends on. After a change it is measured again."""


class Results:
    """The measured cells of all parts, in one JSON file that is written after every cell.

    Args:
        path: The file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.cells: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}
        """By "part, name": `inputs`, `device`, and either `measured` or `failed`, the message."""

    def of(self, part: str) -> dict[str, dict[str, Any]]:
        """By name, what was measured in a part."""
        start = f"{part}, "
        return {
            name.removeprefix(start): cell["measured"]
            for name, cell in self.cells.items()
            if name.startswith(start) and "measured" in cell
        }

    @property
    def failures(self) -> dict[str, str]:
        """By "part, name", why a cell could not be measured."""
        return {name: cell["failed"] for name, cell in self.cells.items() if "failed" in cell}

    @property
    def machines(self) -> list[str]:
        """The machines that measured, without repetition."""
        return list(dict.fromkeys(cell["machine"] for cell in self.cells.values()))

    def run(self, part: str, cell: Cell, settings: Settings, tried: str) -> None:
        """Measure a cell, unless it was measured before on such a machine, or failed in this run.

        Args:
            part: The name of the cell's part.
            cell: The cell.
            settings: How it is measured.
            tried: Identifies this run.

        Raises:
            BrokenDevice: The GPU can no longer be used in this process. The failure is kept.
        """
        key = f"{part}, {cell.name}"
        known = {"inputs": dict(cell.inputs), "machine": machine(settings.device), "tiny": settings.tiny}
        before = self.cells.get(key, {})
        if all(before.get(name) == value for name, value in known.items()) and (
            "measured" in before or before.get("tried") == tried
        ):
            return
        print(f"{key} ...", flush=True)
        self._keep(key, known | {"failed": "the process ended meanwhile", "tried": tried})
        try:
            self._keep(key, known | {"measured": cell.measure()})
        except Exception as error:
            self._keep(key, known | {"failed": f"{type(error).__name__}: {error}"[:2000], "tried": tried})
            print(f"{key}: failed: {error}", flush=True)
            if any(part in str(error) for part in BROKEN_DEVICE):
                raise BrokenDevice(str(error)) from error

    def _keep(self, key: str, cell: dict[str, Any]) -> None:
        self.cells[key] = cell
        write_atomically(self._path, (json.dumps(self.cells, indent=1) + "\n").encode())


class BrokenDevice(Exception):
    """The GPU cannot be used any more in this process."""
