"""Let adapters answer E2E prompts, for others to be trained on: sequence-level distillation.

    python training/answers.py prompts.csv --adapter e2e --adapter runs/e2e-r8 --out answers.csv

Adapters answer greedily (Kim & Rush, 2016, arXiv 1606.07947): one at full rank, or as its policy plans where there is
one beside it, several the mean of what they say at full rank. What does not end in time is left out. `meanings.py`
makes prompts, and `adapters.py e2e answers.csv` learns the answers.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track
from transformers import AutoTokenizer

from chunkwise_lora import ChunkWiseError, RankLadder, embedded
from chunkwise_lora.engines.transformers.loading import load_base
from chunkwise_lora.evaluation.answers import own_answers
from chunkwise_lora.evaluation.data import NEW_TOKENS, Example, e2e_prompt, e2e_rows
from meanings import write_rows


def main(
    data: Annotated[Path, typer.Argument(help="Comma-separated values with a column mr.")],
    adapter: Annotated[
        list[str], typer.Option(help="Embedded adapter, or folder of an adapter or a ladder. Repeat for more.")
    ],
    out: Annotated[Path, typer.Option(help="File to write: comma-separated values with columns mr and ref.")],
    base: Annotated[Path, typer.Option(help="Folder of the base model.")] = embedded.BASE,
) -> None:
    """Let adapters answer E2E prompts."""
    try:
        if len(set(adapter)) < len(adapter):
            raise ChunkWiseError("--adapter names the same adapter twice")
        meanings = {e2e_prompt(meaning): meaning for meaning, _ in e2e_rows(str(data))}
        folders = {name: Path(embedded.find(name)) for name in adapter}
        ladders = {name: RankLadder.load(folder) for name, folder in folders.items()}
        first, *others = ladders.values()
        answered = own_answers(
            load_base(base, dtype=torch.float32),
            ladders,
            AutoTokenizer.from_pretrained(base),
            [Example(prompt, ()) for prompt in meanings],
            None if others else first.policy,
            track=partial(track, description="answering prompts"),
        )
        answers = {one.prompt: one.references[0] for one in answered}
        if not answers:
            raise ChunkWiseError(f"{data}: none of {len(meanings)} prompts was answered in {NEW_TOKENS} tokens")
        rows = [[meaning, answers[prompt]] for prompt, meaning in meanings.items() if prompt in answers]
        write_rows(out, [["mr", "ref"], *rows])
    except ChunkWiseError as error:
        sys.exit(f"error: {error}")
    print(f"{len(answers)} of {len(meanings)} prompts answered in {out}")


if __name__ == "__main__":
    typer.run(main)
