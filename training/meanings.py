"""Recombine E2E meanings into prompts without answers, which an adapter can answer itself.

    python training/meanings.py devset.csv --out prompts.csv --count 6000

Each has the slots of one meaning of the data, and in every slot a value that some meaning has there, as often as the
data has it. The data's own meanings come first.
"""

from __future__ import annotations

import csv
import io
import random
import re
from pathlib import Path
from typing import Annotated

import typer

from chunkwise_lora.files import write_atomically

SLOT = re.compile(r"([^\[\],]+)\[([^\]]*)\]")
TRIES = 20
"""Draws per meaning that is wanted; where there are enough slots, nearly every one is new."""


def recombined(meanings: list[str], count: int, seed: int) -> list[str]:
    """At most `count` meanings that are none of `meanings`."""
    slots = [[(name.strip(), value) for name, value in SLOT.findall(meaning)] for meaning in meanings]
    values: dict[str, list[str]] = {}
    for of_meaning in slots:
        for name, value in of_meaning:
            values.setdefault(name, []).append(value)
    draw = random.Random(seed)
    known = set(meanings)
    found: dict[str, None] = {}
    for _ in range(TRIES * count):
        if len(found) == count:
            break
        meaning = ", ".join(f"{name}[{draw.choice(values[name])}]" for name, _ in draw.choice(slots))
        if meaning not in known:
            found[meaning] = None
    return list(found)


def main(
    data: Annotated[Path, typer.Argument(help="Comma-separated values with a column mr.")],
    out: Annotated[Path, typer.Option(help="File to write: comma-separated values with the column mr alone.")],
    count: Annotated[int, typer.Option(min=1, help="New meanings.")] = 6000,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
) -> None:
    """Recombine E2E meanings into prompts without answers."""
    with data.open(newline="") as lines:
        meanings = list(dict.fromkeys(row["mr"] for row in csv.DictReader(lines)))
    content = io.StringIO()
    writer = csv.writer(content)
    writer.writerow(["mr"])
    writer.writerows([meaning] for meaning in meanings + recombined(meanings, count, seed))
    write_atomically(out, content.getvalue().encode())


if __name__ == "__main__":
    typer.run(main)
