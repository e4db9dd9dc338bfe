"""`chunkwise demo`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from chunkwise_lora import examples
from chunkwise_lora.cli.generations import print_generations
from chunkwise_lora.cli.loading import load_base_and_tokenizer, token_ids
from chunkwise_lora.cli.options import JsonOption
from chunkwise_lora.cli.output import console, print_plain, write_json
from chunkwise_lora.cli.progress import progress
from chunkwise_lora.cli.rendering import bench_table, rank_legend
from chunkwise_lora.errors import EngineError
from chunkwise_lora.files import read_text
from chunkwise_lora.method.config import PRESETS, ChunkWiseConfig

HELD_TEXT = Path(__file__).parents[1] / "sample" / "wiki.txt"
"""A text in the style of the `wiki` data, written for this project. No model was trained on it."""

PROMPTS = (
    ("wiki", " = Aldhaven = \n \n Aldhaven is a town in"),
    ("wiki", " = = History = = \n \n The church was built in"),
    ("e2e", "name[Blue Spice], eatType[coffee shop], area[city centre] ->"),
)
"""The adapter of each prompt, and the prompt."""


def demo(
    folder: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder with a base model, `base`, and adapters, `wiki` and `e2e`, instead of the examples.",
        ),
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=2, max=512, help="Tokens to generate per prompt.")] = 48,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which prefill and decoding are timed.")] = 5,
    json_file: JsonOption = None,
) -> None:
    """Show the method on the example model: text coloured by rank, and a comparison with PEFT."""
    from transformers import set_seed

    from chunkwise_lora.benchmark.measure import measure
    from chunkwise_lora.benchmark.methods import methods
    from chunkwise_lora.benchmark.perplexity import perplexity
    from chunkwise_lora.engines.transformers import ChunkWiseModel
    from chunkwise_lora.ladder import RankLadder

    base, tokenizer = load_base_and_tokenizer(str(folder / "base") if folder else examples.BASE)
    sources = {name: folder / name if folder else examples.find(name) for name in dict(PROMPTS)}
    ladders = {name: RankLadder.load(source) for name, source in sources.items()}
    console.print("Three prompts in one batch, two adapters on one base model, preset [bold]balanced[/]:")
    with ChunkWiseModel(base, ladders, ChunkWiseConfig.preset("balanced")) as model:
        console.print(rank_legend(ladders["wiki"].rung_ranks))
        names, prompts = zip(*PROMPTS, strict=True)
        set_seed(0)
        generations = print_generations(
            model, tokenizer, list(prompts), list(names), max_new_tokens=new_tokens, do_sample=True, top_p=0.7
        )

    compared = methods(
        base,
        {"wiki": sources["wiki"]},
        {name: ChunkWiseConfig.preset(name) for name in PRESETS},
        ladders={"wiki": ladders["wiki"]},
    )
    held = token_ids(tokenizer, read_text(HELD_TEXT, EngineError))
    with progress() as reports:
        advance = reports.steps("comparing with PEFT", len(compared) * (2 * rounds + 1))
        results = measure(compared, held[:, :256], new_tokens=new_tokens, rounds=rounds, advance=advance)
        perplexities = {}
        for method in compared:
            perplexities[method.name] = perplexity(method, held)
            advance()
    console.print(bench_table(results, perplexities))
    print_plain(
        f"Adapter wiki, {base.dtype}, a prompt of 256 tokens, {new_tokens} new tokens, {rounds} rounds. The perplexity "
        f"is that of {held.shape[1]} tokens of held text, run token by token. If you use only one adapter, merge it: "
        "that is faster."
    )
    comparison = [{**asdict(result), "perplexity": perplexities[result.name]} for result in results]
    write_json(json_file, {"generations": generations, "comparison": comparison})
