"""`chunkwise generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chunkwise_lora import examples
from chunkwise_lora.cli.generations import print_generations
from chunkwise_lora.cli.loading import load_base_and_tokenizer
from chunkwise_lora.cli.options import JsonOption, ModelOption
from chunkwise_lora.cli.output import console, write_json
from chunkwise_lora.cli.rendering import rank_legend
from chunkwise_lora.errors import ChunkWiseError
from chunkwise_lora.files import read_text
from chunkwise_lora.method.config import PRESETS, ChunkWiseConfig


def generate(
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    model: ModelOption = examples.BASE,
    adapter: Annotated[
        str,
        typer.Option(help="PEFT adapter or ladder: a folder, owner/name on the hub, or the name of an example."),
    ] = "wiki",
    preset: Annotated[
        str | None,
        typer.Option(
            help=f"Settings: one of {', '.join(PRESETS)}. By default the ladder's own policy if it was calibrated, "
            "otherwise lossless."
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="JSON file with settings, instead of --preset.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Largest number of tokens to generate.")] = 64,
    show_ranks: Annotated[
        bool, typer.Option("--show-ranks", help="Colour every token by its rank, and mark where chunks begin.")
    ] = False,
    json_file: JsonOption = None,
) -> None:
    """Continue a prompt greedily with a base model and an adapter."""
    if preset is not None and config is not None:
        raise ChunkWiseError("--preset and --config: give only one of them")
    settings = ChunkWiseConfig.from_json(read_text(config, ChunkWiseError), str(config)) if config is not None else None
    if preset is not None:
        settings = ChunkWiseConfig.preset(preset)
    source = examples.find(adapter)

    from chunkwise_lora.engines.transformers import ChunkWiseModel  # slow to import: only after all refusals

    base, tokenizer = load_base_and_tokenizer(model)
    with ChunkWiseModel(base, {_name_of(adapter): source}, settings) as chunkwise:
        if show_ranks:
            console.print(rank_legend(next(iter(chunkwise.ladders.values())).rung_ranks[-1]))
        generations = print_generations(
            chunkwise, tokenizer, [prompt], show_ranks=show_ranks, max_new_tokens=max_new_tokens, do_sample=False
        )
    write_json(json_file, generations[0])


def _name_of(adapter: str) -> str:
    """A name to show for an adapter: the last part of its path, without dots, which PEFT does not allow."""
    return Path(adapter).name.replace(".", "-") or "adapter"
