"""Generate answers to E2E prompts with adapters, to train other adapters on: sequence-level distillation.

    python training/answers.py prompts.csv --adapter e2e --adapter runs/e2e-r8 --out answers.csv

Answers are generated greedily (Kim and Rush, arXiv 1606.07947). One adapter runs under the policy of its ladder, or at
full rank if it has none. Several adapters run at full rank, and the mean of their distributions decides. Answers that
do not end in time are left out. `meanings.py` makes prompts, and `adapters.py e2e answers.csv` trains on the answers.
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

from chunkwise_lora import ChunkWiseError, RankLadder, examples
from chunkwise_lora.engines.transformers.loading import load_base
from chunkwise_lora.evaluation.answer_generator import AnswerGenerator
from chunkwise_lora.evaluation.data import NEW_TOKENS, Example, e2e_prompt, e2e_rows
from meanings import write_rows


def main(
    data: Annotated[Path, typer.Argument(help="Comma-separated values with a column mr.")],
    adapter: Annotated[
        list[str], typer.Option(help="Example ladder, or folder of an adapter or a ladder. May be repeated.")
    ],
    out: Annotated[Path, typer.Option(help="File to write: comma-separated values with columns mr and ref.")],
    base: Annotated[str, typer.Option(help="Base model: a folder, or smollm2, the example.")] = examples.BASE,
) -> None:
    """Generate answers to E2E prompts with adapters."""
    try:
        if len(set(adapter)) < len(adapter):
            raise ChunkWiseError("--adapter names the same adapter twice")
        meanings = {e2e_prompt(meaning): meaning for meaning, _ in e2e_rows(str(data))}
        folders = {name: Path(examples.find(name)) for name in adapter}
        ladders = {name: RankLadder.load(folder) for name, folder in folders.items()}
        first, *others = ladders.values()
        folder = examples.find_base(base)
        generator = AnswerGenerator(
            load_base(folder, dtype=torch.float32),
            ladders,
            AutoTokenizer.from_pretrained(folder),
            None if others else first.policy,
        )
        prompts = [Example(prompt, ()) for prompt in meanings]
        answered = generator(prompts, partial(track, description="answering prompts"))
        answers = {one.prompt: one.references[0] for one in answered}
        if not answers:
            raise ChunkWiseError(
                f"{data}: none of {len(meanings)} prompts has an answer that ends within {NEW_TOKENS} tokens"
            )
        rows = [[meaning, answers[prompt]] for prompt, meaning in meanings.items() if prompt in answers]
        write_rows(out, [["mr", "ref"], *rows])
    except ChunkWiseError as error:
        sys.exit(f"error: {error}")
    print(f"{len(answers)} of {len(meanings)} prompts answered in {out}")


if __name__ == "__main__":
    typer.run(main)
