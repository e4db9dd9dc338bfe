"""Prints to the terminal, and writes JSON files."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text

from chunkwise_lora.errors import escaped
from chunkwise_lora.files import write_atomically

console = Console()
"""Standard output; standard error while standard output is for JSON alone."""
STANDARD_OUTPUT = Path("-")
"""Stands for standard output where a file is expected."""


@contextmanager
def for_json_alone() -> Iterator[None]:
    """Keep standard output for JSON: everything else goes to standard error meanwhile."""
    console.stderr = True
    try:
        yield
    finally:
        console.stderr = False


def shows_colours() -> bool:
    """Whether readers see the colours of what is printed."""
    return console.color_system is not None and not console.no_color


def is_ascii_only() -> bool:
    """Whether the terminal has no characters beyond ASCII."""
    return not console.encoding.lower().startswith("utf")


def never_fail_to_encode() -> None:
    """Print a question mark for a character that the terminal does not have."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def print_plain(text: str, style: str = "", wrap: bool = True) -> None:
    """Print one paragraph. Names and paths in it are not taken for markup or for commands to the terminal.

    Args:
        text: The paragraph.
        style: A style of rich.
        wrap: Whether to break lines between words. Without it, users can copy a long line as one.
    """
    console.print(Text(escaped(text), style), soft_wrap=not wrap)


def write_picture(path: Path, parts: Sequence[RenderableType], title: str) -> None:
    """Write what a terminal with colours shows as an SVG picture."""
    options: dict[str, Any] = {"force_terminal": True, "color_system": "truecolor", "width": 88, "_environ": {}}
    terminal = Console(record=True, file=io.StringIO(), **options)
    for part in parts:
        terminal.print(part)
    write_atomically(path, terminal.export_svg(title=title).encode())


def write_json(path: Path | None, content: Any) -> None:
    """Write `content` as JSON to `path`, or to standard output. Nothing is written if `path` is None."""
    if path is None:
        return
    text = json.dumps(content, indent=1) + "\n"
    if path == STANDARD_OUTPUT:
        sys.stdout.write(text)
    else:
        write_atomically(path, text.encode())
