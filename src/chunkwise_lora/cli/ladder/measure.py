"""`chunkwise ladder measure`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from chunkwise_lora import examples
from chunkwise_lora.cli.loading import load_base_and_tokenizer
from chunkwise_lora.cli.options import JsonOption, ModelOption, path_given
from chunkwise_lora.cli.output import console, print_plain, write_json
from chunkwise_lora.cli.progress import progress
from chunkwise_lora.errors import ChunkWiseError


def measure(
    ladder: Annotated[
        str,
        typer.Argument(help="Ladder or PEFT adapter: a folder, owner/name on the hub, or the name of an example."),
    ],
    text: Annotated[str, typer.Option(help="File with text like the text that the adapter will be used on.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="Folder to write the measured ladder to. It may be the ladder's own folder.",
            parser=path_given,
        ),
    ],
    task: Annotated[
        str, typer.Option(help="Kind of --text: wikitext (plain text), squad (SQuAD v1.1 JSON) or e2e (E2E as CSV).")
    ] = "wikitext",
    model: ModelOption = examples.BASE,
    tokens: Annotated[int, typer.Option(min=1, help="Largest number of tokens to measure on.")] = 8192,
    json_file: JsonOption = None,
) -> None:
    """Measure what each rung of a ladder loses when every token runs on it.

    The loss is the KL divergence of the next-token distribution from full rank, in nats per token. It is stored in the
    ladder, and `chunkwise ladder export` prints it.
    """
    source = examples.find(ladder)

    from chunkwise_lora.calibration.rung_divergence import rung_divergence  # slow to import: only after all refusals
    from chunkwise_lora.calibration.text import TokenBlocks, block_length
    from chunkwise_lora.engines.transformers import ChunkWiseModel
    from chunkwise_lora.evaluation.data import Example
    from chunkwise_lora.evaluation.tasks import CalibrationReader
    from chunkwise_lora.ladder import RankLadder

    def refuse(examples: Sequence[Example]) -> list[Example]:
        raise ChunkWiseError(f"{text}: {len(examples)} prompts have no answer to measure on; give data with answers")

    loaded = RankLadder.load(source)
    base, tokenizer = load_base_and_tokenizer(model)
    ids, scored, length = CalibrationReader(task, tokenizer, refuse)(text, block_length(base, 512))
    blocks = TokenBlocks.cut(ids, length, scored)
    if not len(blocks) or not blocks.scored.any():
        raise ChunkWiseError(f"{text}: {len(ids)} tokens are too few to measure on; give at least {length}")
    blocks = blocks.evenly(max(1, tokens // length))
    with progress() as reports, ChunkWiseModel(base, loaded) as chunkwise:
        found = rung_divergence(chunkwise, reports.track(blocks.split(4), description="measuring every rung"))
    replace(loaded, rung_divergence=found).save_pretrained(output)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("mean rank", justify="right")
    table.add_column("KL from full rank, nats per token", justify="right")
    for rank, divergence in zip(loaded.rung_ranks, found, strict=True):
        table.add_row(f"{rank:.3g}", f"{divergence:.4f}")
    console.print(table)
    print_plain(f"Measured on {int(blocks.scored.sum()):,} tokens of {text}. Written to {output}")
    write_json(json_file, {"rung_ranks": list(loaded.rung_ranks), "rung_divergence": list(found)})
