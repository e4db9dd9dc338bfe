"""Where the commands write: the terminal, and JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from chunkwise_lora.errors import escaped
from chunkwise_lora.files import write_atomically

console = Console()
"""Standard output."""


def print_plain(text: str, style: str = "", wrap: bool = True) -> None:
    """Print one paragraph that may quote names and paths: nothing in it is read as markup or as a terminal command.

    With `wrap` = False the terminal breaks lines where it must, so that the text can be copied.
    """
    console.print(Text(escaped(text), style), soft_wrap=not wrap)


def escaped_lines(text: str) -> str:
    """`text` with its line breaks and tabs, and an escape sequence for every other character that is not printable.

    A model can generate any character, also those that move the cursor or change the colours of a terminal.
    """
    return "".join(c if c in "\n\t" else escaped(c) for c in text)


def write_json(path: Path | None, content: Any) -> None:
    """Write `content` as JSON to `path`. Nothing is written if `path` is None."""
    if path is not None:
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
