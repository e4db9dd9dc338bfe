"""`chunkwise ladder show`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from chunkwise_lora.cli.options import JsonOption
from chunkwise_lora.cli.output import console, write_json
from chunkwise_lora.cli.rendering import ladder_table
from chunkwise_lora.errors import LadderError


def show(
    folder: Annotated[Path, typer.Argument(help="Folder of a ladder, or of a PEFT adapter.")],
    json_file: JsonOption = None,
) -> None:
    """Show a ladder: spectrum and energy kept per rung and module."""
    from chunkwise_lora.ladder import RankLadder, describe

    if not os.path.isdir(folder):
        raise LadderError(f"{folder}: no such folder")
    ladder = RankLadder.load(folder)
    console.print(ladder_table(ladder))
    write_json(json_file, describe(ladder))
