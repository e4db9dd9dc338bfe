"""`chunkwise ladder show`."""

from __future__ import annotations

from typing import Annotated

import typer

from chunkwise_lora import examples
from chunkwise_lora.cli.options import JsonOption
from chunkwise_lora.cli.output import console, write_json
from chunkwise_lora.cli.rendering import ladder_table


def show(
    ladder: Annotated[
        str,
        typer.Argument(help="Ladder or PEFT adapter: a folder, owner/name on the hub, or the name of an example."),
    ],
    every_module: Annotated[
        bool, typer.Option("--all", help="One row per module, instead of means over the modules of each type.")
    ] = False,
    json_file: JsonOption = None,
) -> None:
    """Show a ladder: the singular values of its modules, and the energy that each rung keeps.

    The energy is the share of the squared singular values.
    """
    source = examples.find(ladder)

    from chunkwise_lora.ladder import RankLadder, describe  # slow to import: only after all refusals

    loaded = RankLadder.load(source)
    console.print(ladder_table(loaded, every_module))
    write_json(json_file, describe(loaded))
