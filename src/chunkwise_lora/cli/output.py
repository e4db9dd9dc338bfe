"""Where the commands write: the terminal, and JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from chunkwise_lora.files import write_atomically

console = Console()
"""Standard output."""


def progress_bar() -> Progress:
    """Progress of long work, shown while its `with` block runs."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def write_json(path: Path | None, content: Any) -> None:
    """Write `content` as JSON to `path`, if there is one."""
    if path is not None:
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
