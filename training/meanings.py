"""Recombine E2E meanings into prompts without answers, for which an adapter can generate the answers.

    python training/meanings.py devset.csv --out prompts.csv --count 6000 [--names valid.txt]

A new meaning has the slots of one meaning of the data. Each slot gets a value that the data has there, drawn with the
data's frequency. With `--names`, about half of the values of the slots `NAMED` are capitalised words of that text, so
that the prompts contain names that the adapter has not seen. The data's own meanings come first.
"""

from __future__ import annotations

import csv
import io
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from chunkwise_lora.errors import ChunkWiseError
from chunkwise_lora.evaluation.data import e2e_rows
from chunkwise_lora.files import read_text, write_atomically

SLOT = re.compile(r"([^\[\],]+)\[([^\]]*)\]")
NAMES = re.compile(r"[A-Z][a-z]{2,}(?: [A-Z][a-z]+)?")
NAMED = ("name", "eatType", "food", "near")
"""Slots that have more values in real use than in the data."""
NAMED_SHARE = 0.5
"""Share of the values of these slots that are taken from the other text."""
TRIES = 10_000
"""The search ends after this many draws in a row without a new meaning."""


def slots_of(meaning: str) -> list[tuple[str, str]]:
    """The (name, value) of every slot of a meaning."""
    slots = [(name.strip(), value) for name, value in SLOT.findall(meaning)]
    if meaning_of(slots) != meaning:
        raise ChunkWiseError(f"{meaning!r} is not a meaning; write it like 'name[Zizzi], area[riverside]'")
    return slots


def meaning_of(slots: list[tuple[str, str]]) -> str:
    """The meaning with these slots; the inverse of `slots_of`."""
    return ", ".join(f"{name}[{value}]" for name, value in slots)


def recombined(meanings: list[str], count: int, seed: int = 0, names: Sequence[str] = ()) -> list[str]:
    """At most `count` new meanings, none of which is in `meanings`. Some have values from `names`."""
    patterns = [slots_of(meaning) for meaning in meanings]
    values: dict[str, list[str]] = {}
    for slots in patterns:
        for name, value in slots:
            values.setdefault(name, []).append(value)
    draw = random.Random(seed)

    def drawn(slot: str) -> str:
        return draw.choice(names if names and slot in NAMED and draw.random() < NAMED_SHARE else values[slot])

    known, found = set(meanings), dict[str, None]()
    tries = 0
    while len(found) < count and tries < TRIES:
        meaning = meaning_of([(slot, drawn(slot)) for slot, _ in draw.choice(patterns)])
        tries += 1
        if meaning not in known and meaning not in found:
            found[meaning], tries = None, 0
    return list(found)


def write_rows(file: Path, rows: list[list[str]]) -> None:
    """Write the rows as comma-separated values, in one step."""
    content = io.StringIO()
    csv.writer(content).writerows(rows)
    write_atomically(file, content.getvalue().encode())


def main(
    data: Annotated[Path, typer.Argument(help="Comma-separated values with a column mr.")],
    out: Annotated[Path, typer.Option(help="File to write: comma-separated values with the column mr alone.")],
    count: Annotated[int, typer.Option(min=1, help="Number of new meanings.")] = 6000,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    names: Annotated[Path | None, typer.Option(help="Text whose capitalised words are used as names.")] = None,
) -> None:
    """Recombine E2E meanings into prompts without answers."""
    try:
        meanings = list(dict.fromkeys(meaning for meaning, _ in e2e_rows(str(data))))
        found = NAMES.findall(read_text(names, ChunkWiseError)) if names else []
        if names and not found:
            raise ChunkWiseError(f"{names}: holds no capitalised words to take as names")
        new = recombined(meanings, count, seed, found) if meanings else []
        write_rows(out, [["mr"], *([meaning] for meaning in meanings + new)])
    except ChunkWiseError as error:
        sys.exit(f"error: {error}")
    print(f"{len(meanings)} meanings and {len(new)} new ones written to {out}")


if __name__ == "__main__":
    typer.run(main)
