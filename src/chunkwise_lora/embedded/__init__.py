"""A small base model and adapters that come with the package, for demonstrations and tests. See MODEL_CARD.md."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent

BASE = _HERE / "base"
"""A Llama of 5.5 million parameters, trained on public-domain books."""

ADAPTERS = {path.name: path for path in sorted((_HERE / "adapters").glob("*"))}
"""PEFT adapters for it by name: `wiki` (encyclopedia text) and `e2e` (restaurant facts to a sentence), and, made for
half of their rank, with a calibrated ladder beside them, `wiki-nested` and `e2e-nested`."""

HELD_TEXT = _HERE / "held_text.txt"
"""A text that nothing here was trained on, in the style of `wiki`'s."""


def find(name: str) -> str | Path:
    """Where the adapter of this name lies, or the name itself if it is none of these."""
    return ADAPTERS.get(name, name)
