"""The `chunkwise` command: its subcommands, and how their errors are printed."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from chunkwise_lora import __version__
from chunkwise_lora.cli.bench import bench
from chunkwise_lora.cli.calibrate import calibrate
from chunkwise_lora.cli.demo import demo
from chunkwise_lora.cli.evaluate import evaluate
from chunkwise_lora.cli.generate import generate
from chunkwise_lora.cli.ladder.build import build
from chunkwise_lora.cli.ladder.export import export
from chunkwise_lora.cli.ladder.measure import measure
from chunkwise_lora.cli.ladder.show import show
from chunkwise_lora.cli.options import ListCommand
from chunkwise_lora.cli.serve import serve
from chunkwise_lora.errors import ChunkWiseError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")
app.command()(demo)
app.command()(generate)
app.command()(calibrate)
app.command("eval", cls=ListCommand)(evaluate)
app.command(cls=ListCommand)(bench)
app.command(cls=ListCommand)(serve)

ladder_app = typer.Typer(help="Build, show, measure and export rank ladders.", no_args_is_help=True)
ladder_app.command()(build)
ladder_app.command()(show)
ladder_app.command()(measure)
ladder_app.command()(export)
app.add_typer(ladder_app, name="ladder")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"chunkwise-lora {__version__}")
        raise typer.Exit


@app.callback()
def _options_of_all(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Run LoRA adapters with a rank and a KV-cache precision that are chosen chunk by chunk.

    `chunkwise demo` shows the method on a small model that comes with the package. Every command has `--help`.
    """


def main() -> None:
    """Run the command. A `ChunkWiseError` is printed as one line on standard error, and the exit status is 1."""
    try:
        app()
    except ChunkWiseError as error:
        line = Text("error: ", "bold red").append(" ".join(str(error).split()), "default")
        Console(stderr=True).print(line, soft_wrap=True)
        sys.exit(1)
