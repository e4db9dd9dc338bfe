"""`chunkwise ladder export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chunkwise_lora.cli.output import console


def export(
    folder: Annotated[Path, typer.Argument(help="Folder of a ladder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; may be the ladder's own.")],
) -> None:
    """Write a ladder at full rank as a plain PEFT adapter, for programs that know no ladders."""
    from chunkwise_lora.ladder import RankLadder

    RankLadder.from_pretrained(folder).save_adapter(output)
    console.print(f"Written to {output}", markup=False)
