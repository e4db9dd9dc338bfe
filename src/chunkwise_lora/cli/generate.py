"""`chunkwise generate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from chunkwise_lora import examples
from chunkwise_lora.cli.generations import print_generations
from chunkwise_lora.cli.loading import load_base_and_tokenizer
from chunkwise_lora.cli.options import DeviceOption, JsonOption, ModelOption, device_named, dtype_named, path_given
from chunkwise_lora.cli.output import console, write_json
from chunkwise_lora.cli.rendering import rank_legend
from chunkwise_lora.errors import ChunkWiseError, shown
from chunkwise_lora.files import read_text
from chunkwise_lora.method.config import PRESETS, ChunkWiseConfig

DEFAULT_ADAPTER = ["wiki"]


def generate(
    prompt: Annotated[list[str], typer.Option(help="Text to continue; several run in one batch.")],
    model: ModelOption = examples.BASE,
    adapter: Annotated[
        list[str],
        typer.Option(
            help="PEFT adapter or ladder: a folder, owner/name on the hub, or the name of an example. Give one for all "
            "prompts, one for each, or several for one prompt."
        ),
    ] = DEFAULT_ADAPTER,
    preset: Annotated[
        str | None,
        typer.Option(
            help=f"Settings: one of {', '.join(PRESETS)}. By default the ladder's own policy if it was calibrated, "
            "otherwise lossless."
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="JSON file with settings, instead of --preset.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Largest number of tokens to generate.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0, help="Above 0, tokens are sampled at this temperature; 0 takes the likeliest.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, help="Sample from the likeliest tokens that have this share together.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed of sampling: the same seed gives the same text.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; by default that of the model's files.")
    ] = None,
    device: DeviceOption = "cpu",
    show_ranks: Annotated[
        bool, typer.Option("--show-ranks", help="Colour every token by its rank, and mark where chunks begin.")
    ] = False,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the texts coloured by rank as an SVG picture.", parser=path_given),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Continue prompts with a base model and adapters. One text appears while it is generated."""
    prompts, adapters = _pairs(prompt, adapter)
    if preset is not None and config is not None:
        raise ChunkWiseError("--preset and --config: give only one of them")
    settings = ChunkWiseConfig.from_json(read_text(config, ChunkWiseError), str(config)) if config is not None else None
    if preset is not None:
        settings = ChunkWiseConfig.preset(preset)
    names = _names(list(dict.fromkeys(adapters)))
    sources = {name: examples.find(path) for path, name in names.items()}

    import torch  # slow to import: only after all refusals

    from chunkwise_lora.engines.transformers import ChunkWiseModel

    place, wanted = device_named(device), None if dtype is None else dtype_named(dtype)
    base, tokenizer = load_base_and_tokenizer(model, place)
    base = base.to(wanted)
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        options |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
    if seed is not None:
        torch.manual_seed(seed)
    with ChunkWiseModel(base, sources, settings) as chunkwise:
        if show_ranks:
            console.print(rank_legend(max(ladder.rung_ranks[-1] for ladder in chunkwise.ladders.values())))
        content = print_generations(
            chunkwise,
            tokenizer,
            prompts,
            [names[path] for path in adapters],
            show_ranks=show_ranks,
            picture=picture,
            max_new_tokens=max_new_tokens,
            **options,
        )
    write_json(json_file, content)


def _pairs(prompts: Sequence[str], adapters: Sequence[str]) -> tuple[list[str], list[str]]:
    """A prompt and an adapter for every sequence."""
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise ChunkWiseError(f"--prompt {shown(prompt, 40)}: is not UTF-8 text") from None
    count = max(len(prompts), len(adapters))
    if {len(prompts), len(adapters)} - {1, count}:
        raise ChunkWiseError(
            f"{len(prompts)} prompts and {len(adapters)} adapters do not match; give one of them once, or as many of "
            "both"
        )
    of_prompts, of_adapters = (list(one) * (count if len(one) == 1 else 1) for one in (prompts, adapters))
    return of_prompts, of_adapters


def _names(paths: Sequence[str]) -> dict[str, str]:
    """A name to show for each adapter: the last part of its path, without dots, which PEFT does not allow."""
    names: dict[str, str] = {}
    for path in paths:
        name = Path(path).name.replace(".", "-") or "adapter"
        names[path] = name if name not in names.values() else f"{name}-{len(names) + 1}"
    return names
