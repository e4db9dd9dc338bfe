"""`chunkwise demo`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from chunkwise_lora import embedded
from chunkwise_lora.cli.generations import print_generations
from chunkwise_lora.cli.loading import load_base_and_tokenizer, token_ids
from chunkwise_lora.cli.options import JsonOption
from chunkwise_lora.cli.output import console, progress_bar, write_json
from chunkwise_lora.cli.rendering import bench_table, rank_legend
from chunkwise_lora.errors import EngineError
from chunkwise_lora.files import read_text
from chunkwise_lora.method.config import PRESETS, ChunkWiseConfig

PROMPTS = (
    ("wiki", " = Aldhaven = \n \n Aldhaven is a town in"),
    ("wiki", " = = History = = \n \n The church was built in"),
    ("e2e", "name[Blue Spice], eatType[coffee shop], area[city centre] ->"),
)


def demo(
    new_tokens: Annotated[int, typer.Option(min=2, max=512, help="Tokens to generate per prompt.")] = 48,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the comparison.")] = 5,
    json_file: JsonOption = None,
) -> None:
    """Run the whole method on the embedded model: coloured text, then a comparison with PEFT."""
    from transformers import set_seed

    from chunkwise_lora.benchmark.measure import contestants, measure, score
    from chunkwise_lora.engines.transformers import ChunkWiseModel
    from chunkwise_lora.ladder import RankLadder

    base, tokenizer = load_base_and_tokenizer(str(embedded.BASE))
    ladders = {name: RankLadder.load(embedded.ADAPTERS[name]) for name in dict(PROMPTS)}
    console.print("Two adapters on one base model, [bold]balanced[/], all prompts in one batch:")
    with ChunkWiseModel(base, ladders, ChunkWiseConfig.preset("balanced")) as model:
        console.print(rank_legend(ladders["wiki"].rung_ranks))
        names, prompts = zip(*PROMPTS, strict=True)
        set_seed(0)
        shown = print_generations(model, tokenizer, list(prompts), list(names), new_tokens, do_sample=True, top_p=0.7)

    entrants = contestants(
        base,
        {"wiki": embedded.ADAPTERS["wiki"]},
        {name: ChunkWiseConfig.preset(name) for name in PRESETS},
        ladders={"wiki": ladders["wiki"]},
    )
    held = token_ids(tokenizer, read_text(embedded.HELD_TEXT, EngineError))
    with progress_bar() as progress:
        task = progress.add_task("comparing on the embedded model", total=len(entrants) * (2 * rounds + 1))
        results = measure(
            entrants, held[:, :256], new_tokens=new_tokens, rounds=rounds, advance=lambda: progress.advance(task)
        )
        perplexities = {}
        for entrant in entrants:
            perplexities[entrant.name] = score(entrant, held)
            progress.advance(task)
    console.print(bench_table(results, perplexities))
    console.print(
        f"Adapter `wiki`, {base.dtype}, prompt of 256 tokens, {new_tokens} new tokens, {rounds} rounds; perplexity on "
        f"{held.shape[1]} held tokens, run token by token. Where one adapter never changes, merge it instead."
    )
    compared = [{**asdict(result), "perplexity": perplexities[result.name]} for result in results]
    write_json(json_file, {"generations": shown, "comparison": compared})
