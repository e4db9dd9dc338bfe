"""`chunkwise eval`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from chunkwise_lora import examples
from chunkwise_lora.cli.loading import load_base_and_tokenizer
from chunkwise_lora.cli.options import JsonOption, ModelOption, named_paths, path_given
from chunkwise_lora.cli.output import console, write_json
from chunkwise_lora.cli.progress import progress
from chunkwise_lora.errors import ChunkWiseError
from chunkwise_lora.evaluation.data import NEW_TOKENS
from chunkwise_lora.files import read_text, write_atomically
from chunkwise_lora.method.config import ChunkWiseConfig

DEFAULT_PRESETS, DEFAULT_BASELINES = ["balanced", "calibrated"], ["base", "svd", "ladder", "random", "oracle"]


def evaluate(
    task: Annotated[str, typer.Option(help="Task: wikitext (perplexity), squad (exact match and F1) or e2e (BLEU).")],
    data: Annotated[
        str,
        typer.Option(
            help="File with the task's data: plain text, SQuAD v1.1 JSON, or E2E as CSV; or the name of a data set on "
            "the hub."
        ),
    ],
    model: ModelOption = examples.BASE,
    adapter: Annotated[
        str,
        typer.Option(
            help="PEFT adapter: a folder, owner/name on the hub, or the name of an example. By default the "
            "example for the task."
        ),
    ] = "",
    calibrated: Annotated[
        str | None,
        typer.Option(help="Calibrated ladder: a folder that `chunkwise calibrate` wrote, or the name of an example."),
    ] = None,
    presets: Annotated[
        list[str],
        typer.Option(
            help="Settings of ChunkWise to evaluate, one or more. Presets run on the ladder in the adapter's folder, "
            "or else on the adapter's SVD. `calibrated` runs the ladder of --calibrated with its policy."
        ),
    ] = DEFAULT_PRESETS,
    baselines: Annotated[
        list[str],
        typer.Option(
            help="Baselines to compare with, one or more. base: no adapter. svd: plain SVD at several ranks, the same "
            "rank for every token. ladder: the same for the ladder in the adapter's folder and for the calibrated one. "
            "random: the calibrated plan, shuffled. oracle: the best plan, given the cost of every token. Both need "
            "--calibrated."
        ),
    ] = DEFAULT_BASELINES,
    peft: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=ADAPTER",
            help="Another PEFT adapter as a baseline: a name for the table, and a folder or an example. May "
            "be repeated.",
        ),
    ] = None,
    config: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE",
            help="Settings to evaluate besides the presets: a name for the table, and a JSON file. May be repeated.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Largest number of windows of text, or of examples. By default all.")
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens from the start of one window of text to the start of the next. By default windows do not "
            "overlap.",
        ),
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Largest number of tokens of an answer.")] = NEW_TOKENS,
    batch: Annotated[int, typer.Option(min=1, help="Windows or prompts that run together.")] = 16,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder to write report.html and report.md to.", parser=path_given),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Measure quality: the task's metric, mean rank, KL to full rank and KV bytes, compared with baselines.

    Text is cut into windows as long as the model allows and run token by token, as in generation, with plan,
    cross-fades and KV policy in force. Answers are generated greedily. All metrics come with 95% intervals.
    """
    configs = {
        name: ChunkWiseConfig.from_json(read_text(Path(file), ChunkWiseError), file)
        for name, file in named_paths("--config", config).items()
    }
    peft_adapters = {name: str(examples.find(path)) for name, path in named_paths("--peft", peft).items()}
    calibrated = calibrated and str(examples.find(calibrated))
    adapter = adapter and str(examples.find(adapter))
    if calibrated is None and presets == DEFAULT_PRESETS:
        presets = ["balanced"]

    from rich.markdown import Markdown

    from chunkwise_lora.evaluation.baselines import Comparison, MethodSelection  # slow to import: after all refusals
    from chunkwise_lora.evaluation.report import markdown, page
    from chunkwise_lora.evaluation.tasks import EvaluationSettings, adapter_of, calibrated_ladder, run_task

    adapter = str(adapter_of(task, adapter))
    selection = MethodSelection(
        [one for one in presets if one], [one for one in baselines if one], peft_adapters, configs
    )
    base, tokenizer = load_base_and_tokenizer(model)
    with progress() as reports:
        comparison = Comparison(base, adapter, calibrated_ladder(calibrated) if calibrated else None)
        evaluation = run_task(
            task,
            data,
            comparison.methods(selection),
            tokenizer,
            EvaluationSettings(limit, stride, new_tokens, batch),
            advance=reports.begin(f"evaluating {task}"),
        )
    text = markdown(evaluation)
    console.print(Markdown(text))
    if report is not None:
        write_atomically(report / "report.md", text.encode())
        write_atomically(report / "report.html", page(evaluation).encode())
    write_json(json_file, {"task": task, "how": evaluation.how, "results": [asdict(one) for one in evaluation.results]})
