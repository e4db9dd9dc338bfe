"""`chunkwise eval`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from chunkwise_lora import embedded
from chunkwise_lora.cli.loading import load_base_and_tokenizer
from chunkwise_lora.cli.options import JsonOption, named_paths
from chunkwise_lora.cli.output import console, progress_bar, write_json
from chunkwise_lora.errors import ChunkWiseError
from chunkwise_lora.evaluation.data import NEW_TOKENS
from chunkwise_lora.files import read_text, write_atomically
from chunkwise_lora.method.config import ChunkWiseConfig

EVALUATED, RIVALS = ["balanced", "calibrated"], ["base", "svd", "ladder", "random", "oracle"]


def evaluate(
    task: Annotated[str, typer.Option(help="wikitext (perplexity), squad (exact match, F1) or e2e (BLEU).")],
    data: Annotated[
        str, typer.Option(help="File: plain text, SQuAD v1.1 JSON, or E2E as CSV; or a data set's name on the hub.")
    ],
    model: Annotated[str, typer.Option(help="Base model: a folder or a name on the hub.")] = str(embedded.BASE),
    adapter: Annotated[str, typer.Option(help="PEFT adapter: a folder or a name on the hub, or an embedded one.")] = "",
    calibrated: Annotated[
        str | None, typer.Option(help="Folder that `chunkwise calibrate` wrote, or an embedded adapter that holds one.")
    ] = None,
    presets: Annotated[
        list[str],
        typer.Option(help="Ours: presets, on the ladder in the adapter's folder or else its SVD; and `calibrated`."),
    ] = EVALUATED,
    rivals: Annotated[
        list[str],
        typer.Option(
            help="Any of base; svd (plain SVD truncated uniformly at each tier); ladder (the same of a ladder in the "
            "adapter's folder, and of the calibrated one); and of the calibrated ladder: random (its plan shuffled), "
            "oracle (a plan that knows every token's cost)."
        ),
    ] = RIVALS,
    peft: Annotated[
        list[str] | None,
        typer.Option(help="Another PEFT adapter as a rival, as name=folder or name=embedded one; may be repeated."),
    ] = None,
    config: Annotated[
        list[str] | None,
        typer.Option(help="Settings of your own beside the presets, as name=file.json; may be repeated."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many windows of text, or examples.")] = None,
    stride: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens from one window's start to the next; by default they do not overlap."),
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, tokens.")] = NEW_TOKENS,
    batch: Annotated[int, typer.Option(min=1, help="Windows or prompts run together.")] = 16,
    report: Annotated[Path | None, typer.Option(help="Folder for report.html and report.md.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Measure quality: the task's metric with its interval, mean rank, KL to full rank and KV bytes, beside rivals.

    Text is cut into windows as long as the model's positions and run token by token as generation would, with plan,
    cross-fades and KV policy in force. Answers are generated greedily.
    """
    from rich.markdown import Markdown

    from chunkwise_lora.evaluation.report import markdown, page
    from chunkwise_lora.evaluation.tasks import adapter_of, run_task

    adapter = str(adapter_of(task, adapter))
    configs = {
        name: ChunkWiseConfig.from_json(read_text(Path(file), ChunkWiseError), file)
        for name, file in named_paths("--config", config).items()
    }
    base, tokenizer = load_base_and_tokenizer(model)
    with progress_bar() as progress:
        bar = progress.add_task(f"evaluating {task}", total=None)
        evaluation = run_task(
            task,
            data,
            base,
            tokenizer,
            adapter,
            calibrated=calibrated and embedded.find(calibrated),
            presets=[one for one in presets if one and (calibrated or presets != EVALUATED or one != "calibrated")],
            rivals=[one for one in rivals if one],
            peft={name: str(embedded.find(path)) for name, path in named_paths("--peft", peft).items()},
            configs=configs,
            limit=limit,
            stride=stride,
            new_tokens=new_tokens,
            batch=batch,
            advance=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    text = markdown(evaluation)
    console.print(Markdown(text))
    if report is not None:
        write_atomically(report / "report.md", text.encode())
        write_atomically(report / "report.html", page(evaluation).encode())
    write_json(json_file, {"task": task, "how": evaluation.how, "results": [asdict(one) for one in evaluation.results]})
