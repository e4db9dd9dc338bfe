"""Prints to the terminal, and writes JSON files."""

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
    """Print one paragraph. Names and paths in it are not taken for markup or for commands to the terminal.

    Args:
        text: The paragraph.
        style: A style of rich.
        wrap: Whether to break lines between words. Without it, users can copy a long line as one.
    """
    console.print(Text(escaped(text), style), soft_wrap=not wrap)


def escaped_lines(text: str) -> str:
    """`text` in which all unprintable characters except line breaks and tabs are escaped.

    Models can generate characters that would move the cursor or change the colours of a terminal.
    """
    return "".join(c if c in "\n\t" else escaped(c) for c in text)


def write_json(path: Path | None, content: Any) -> None:
    """Write `content` as JSON to `path`. Nothing is written if `path` is None."""
    if path is not None:
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
