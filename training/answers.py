"""Let an adapter answer E2E prompts, for others to be trained on: sequence-level distillation.

    python training/answers.py prompts.csv --adapter e2e --out answers.csv

An embedded adapter, a PEFT folder or a ladder answers greedily at full rank, a calibrated folder as its policy plans
(Kim & Rush, 2016, arXiv 1606.07947). What does not end in time is left out. `adapters.py e2e answers.csv` reads the
result, and `meanings.py` makes prompts.
"""

from __future__ import annotations

import csv
import io
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track
from transformers import AutoTokenizer

from chunkwise_lora import ChunkWiseConfig, ChunkWiseError, RankLadder, embedded
from chunkwise_lora.config import CONFIG_NAME
from chunkwise_lora.engines.transformers.model import load_base
from chunkwise_lora.evaluation.answers import own_answers
from chunkwise_lora.evaluation.data import Example, e2e_prompt, e2e_rows
from chunkwise_lora.files import write_atomically


def main(
    data: Annotated[Path, typer.Argument(help="Comma-separated values with a column mr.")],
    adapter: Annotated[str, typer.Option(help="Embedded adapter, or folder of an adapter or a calibrated ladder.")],
    out: Annotated[Path, typer.Option(help="File to write: comma-separated values with columns mr and ref.")],
    base: Annotated[Path, typer.Option(help="Folder of the base model.")] = embedded.BASE,
) -> None:
    """Let an adapter answer E2E prompts."""
    try:
        meanings = {e2e_prompt(meaning): meaning for meaning, _ in e2e_rows(str(data))}
        found = Path(embedded.find(adapter))
        planned = (found / CONFIG_NAME).exists()
        answered = own_answers(
            load_base(base, dtype=torch.float32),
            RankLadder.load(found),
            AutoTokenizer.from_pretrained(base),
            [Example(prompt, ()) for prompt in meanings],
            ChunkWiseConfig.from_pretrained(found) if planned else None,
            track=partial(track, description="answering prompts"),
        )
        answers = {one.prompt: one.references[0] for one in answered}
        content = io.StringIO()
        rows = [[meaning, answers[prompt]] for prompt, meaning in meanings.items() if prompt in answers]
        csv.writer(content).writerows([["mr", "ref"], *rows])
        write_atomically(out, content.getvalue().encode())
    except ChunkWiseError as error:
        sys.exit(f"error: {error}")
    print(f"{len(answers)} of {len(meanings)} prompts answered in {out}")


if __name__ == "__main__":
    typer.run(main)
