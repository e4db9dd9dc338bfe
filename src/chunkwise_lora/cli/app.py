"""The `chunkwise` command: its subcommands, and how their errors are printed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperCommand

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
from chunkwise_lora.cli.output import never_fail_to_encode
from chunkwise_lora.cli.serve import serve
from chunkwise_lora.errors import ChunkWiseError

EXAMPLES = {
    "demo": "chunkwise demo --engine llama-cpp",
    "generate": "chunkwise generate --prompt 'Karsund is a town' --adapter wiki --show-ranks",
    "calibrate": "chunkwise calibrate --adapter path/to/adapter --text text.txt --mean-rank 25% --quick -o calibrated",
    "eval": "chunkwise eval --task wikitext --data test.txt --calibrated calibrated --report report",
    "bench": "chunkwise bench --random-weights 135M --contexts 128 2048 --plot bench.png",
    "serve": "chunkwise serve --model model.gguf --ladder squad=path/to/ladder",
    "ladder build": "chunkwise ladder build path/to/adapter -o ladder",
    "ladder show": "chunkwise ladder show ladder",
    "ladder measure": "chunkwise ladder measure ladder --text text.txt -o measured",
    "ladder export": "chunkwise ladder export calibrated --mean-rank 50% -o small",
}
"""An example for each command, which its `--help` shows."""

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")
ladder_app = typer.Typer(help="Build, show, measure and export rank ladders.", no_args_is_help=True)


def _add(
    commands: typer.Typer, name: str, function: Callable[..., None], cls: type[TyperCommand] | None = None
) -> None:
    """Add a command with its example."""
    commands.command(name.rpartition(" ")[2], cls=cls, epilog=f"Example: `{EXAMPLES[name]}`")(function)


_add(app, "demo", demo)
_add(app, "generate", generate, ListCommand)
_add(app, "calibrate", calibrate)
_add(app, "eval", evaluate, ListCommand)
_add(app, "bench", bench, ListCommand)
_add(app, "serve", serve, ListCommand)
_add(ladder_app, "ladder build", build)
_add(ladder_app, "ladder show", show)
_add(ladder_app, "ladder measure", measure)
_add(ladder_app, "ladder export", export)
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

    `chunkwise demo` shows the method on an example model. Every command has `--help`, with an example.
    """


def main() -> None:
    """Run the command. A `ChunkWiseError` is printed as one line on standard error, and the exit status is 1."""
    never_fail_to_encode()
    try:
        app()
    except ChunkWiseError as error:
        line = Text("error: ", "bold red").append(" ".join(str(error).split()), "default")
        Console(stderr=True).print(line, soft_wrap=True)
        sys.exit(1)
