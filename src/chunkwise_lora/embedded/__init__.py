"""A small base model and adapters that come with the package, for demonstrations and tests. See MODEL_CARD.md."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path

from chunkwise_lora.errors import LadderError

_HERE = Path(__file__).parent

BASE = _HERE / "base"
"""A Llama of 5.5 million parameters, trained on public-domain books."""

BASE_NAME = "chunkwise_lora/embedded/base"
"""How the embedded adapters, and ladders made from them, name this base model."""

ADAPTERS = {path.name: path for path in sorted((_HERE / "adapters").glob("*"))}
"""Folders of the adapters of this base model, by name. `wiki` (encyclopedia text) and `e2e` (a sentence from facts
about a restaurant) are PEFT adapters. `wiki-nested` and `e2e-nested` are ladders, calibrated for half of the rank."""

HELD_TEXT = _HERE / "held_text.txt"
"""A text in the style of the `wiki` data. Neither the base model nor an adapter was trained on it."""


def find(name: str) -> str | Path:
    """Return the folder of the embedded adapter `name`. A path, or a hub name (owner/name), is returned unchanged.

    Raises:
        LadderError: The name is a single word, but neither an embedded adapter nor a folder. A hub would need seconds
            to answer that it does not know a mistyped name, so the hub is not asked.
    """
    if name in ADAPTERS:
        return ADAPTERS[name]
    if "/" in name or os.sep in name or os.path.exists(name):
        return name
    close = get_close_matches(name, ADAPTERS, n=2)
    meant = f"Did you mean {' or '.join(close)}? " if close else ""
    raise LadderError(
        f"{name}: there is no such folder, and the embedded adapters are {', '.join(ADAPTERS)}. {meant}"
        "Give a folder, an embedded adapter, or owner/name for an adapter on the hub"
    )
