"""A small base model and adapters that come with the package, for demonstrations and tests. See MODEL_CARD.md."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path

from chunkwise_lora.errors import LadderError

_HERE = Path(__file__).parent

BASE = _HERE / "base"
"""A Llama of 5.5 million parameters, trained on public-domain books."""

ADAPTERS = {path.name: path for path in sorted((_HERE / "adapters").glob("*"))}
"""PEFT adapters for it by name: `wiki` (encyclopedia text) and `e2e` (restaurant facts to a sentence), and,
made for half of their rank, the calibrated ladders `wiki-nested` and `e2e-nested`, which are PEFT adapters, too."""

HELD_TEXT = _HERE / "held_text.txt"
"""A text that nothing here was trained on, in the style of `wiki`'s."""


def find(name: str) -> str | Path:
    """The folder of the embedded adapter of this name. A folder and a name such as owner/name are returned unchanged.

    Raises:
        LadderError: The name is a single word, but no embedded adapter and no folder. It is refused at once, because a
            hub would need seconds to say that it does not know a mistyped name.
    """
    if name in ADAPTERS:
        return ADAPTERS[name]
    if "/" in name or os.sep in name or os.path.exists(name):
        return name
    close = get_close_matches(name, ADAPTERS, n=2)
    meant = f"Did you mean {' or '.join(close)}? " if close else ""
    raise LadderError(
        f"{name}: no such folder, and no embedded adapter has this name (they are {', '.join(ADAPTERS)}). {meant}"
        "Give a folder, an embedded adapter, or owner/name for an adapter on the hub"
    )
