"""`chunkwise generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chunkwise_lora import embedded
from chunkwise_lora.cli.generations import print_generations
from chunkwise_lora.cli.loading import load_base_and_tokenizer
from chunkwise_lora.cli.options import JsonOption
from chunkwise_lora.cli.output import console, write_json
from chunkwise_lora.cli.rendering import rank_legend
from chunkwise_lora.errors import ChunkWiseError
from chunkwise_lora.files import read_text
from chunkwise_lora.method.config import PRESETS, ChunkWiseConfig


def generate(
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    model: Annotated[str, typer.Option(help="Base model: a folder or a name on the hub.")] = str(embedded.BASE),
    adapter: Annotated[
        str, typer.Option(help="PEFT adapter or ladder: a folder, a name on the hub, or an embedded one.")
    ] = "wiki",
    preset: Annotated[str | None, typer.Option(help=f"One of {', '.join(PRESETS)}.")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings as JSON, instead of a preset.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 64,
    show_ranks: Annotated[bool, typer.Option("--show-ranks", help="Colour tokens by rank and mark chunks.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Continue a prompt with a base model and an adapter, greedily."""
    from chunkwise_lora.engines.transformers import ChunkWiseModel

    if preset is not None and config is not None:
        raise ChunkWiseError("--preset and --config: give one of them")
    chosen = ChunkWiseConfig.from_json(read_text(config, ChunkWiseError), str(config)) if config is not None else None
    if preset is not None:
        chosen = ChunkWiseConfig.preset(preset)
    source = embedded.find(adapter)
    base, tokenizer = load_base_and_tokenizer(model)
    with ChunkWiseModel(base, source, chosen) as chunkwise:
        if show_ranks:
            console.print(rank_legend(next(iter(chunkwise.ladders.values())).rung_ranks))
        shown = print_generations(chunkwise, tokenizer, [prompt], None, max_new_tokens, show_ranks, do_sample=False)
    write_json(json_file, shown[0])
