"""`chunkwise eval`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chunkwise_lora import examples
from chunkwise_lora.cli.loading import load_base_and_tokenizer
from chunkwise_lora.cli.options import (
    DeviceOption,
    JsonOption,
    ModelOption,
    device_named,
    named_paths,
    path_given,
    share,
)
from chunkwise_lora.cli.output import console, print_plain, write_json
from chunkwise_lora.cli.progress import progress
from chunkwise_lora.cli.rendering import evaluation_table
from chunkwise_lora.errors import ChunkWiseError
from chunkwise_lora.evaluation.data import NEW_TOKENS
from chunkwise_lora.files import read_text, write_atomically
from chunkwise_lora.method.config import ChunkWiseConfig

if TYPE_CHECKING:
    from chunkwise_lora.evaluation.results import Result

DEFAULT_BASELINES = ["base", "svd", "ladder"]
CALIBRATED = "calibrated"
"""The name of a calibrated ladder that is given without a name, and the preset of all calibrated policies."""


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
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FOLDER",
            help="Calibrated ladder: a folder that `chunkwise calibrate` wrote, or the name of an example; several "
            "ladders need names for the table. May be repeated. By default the ladder in the adapter's folder, if it "
            "has a policy.",
        ),
    ] = None,
    mean_ranks: Annotated[
        list[str] | None,
        typer.Option(
            help="Mean ranks at which plain SVD and the rungs of calibrated ladders run, one or more, such as 50% 25% "
            "12.5%. By default the mean ranks of the plans."
        ),
    ] = None,
    presets: Annotated[
        list[str] | None,
        typer.Option(
            help="Settings of ChunkWise to evaluate, one or more. Presets run on the ladder in the adapter's folder, "
            "or else on the adapter's SVD. `calibrated` runs the calibrated ladders with their policies. By default "
            "`calibrated` if there are such ladders, and otherwise `balanced`."
        ),
    ] = None,
    baselines: Annotated[
        list[str],
        typer.Option(
            help="Baselines to compare with, one or more. base: no adapter. svd: plain SVD, the same rank for every "
            "token. ladder: the same for the calibrated ladders, or else for the ladder in the adapter's folder. "
            "For text also: alike, calibrated rungs at exactly the mean rank of the plan, without choice; random, the "
            "calibrated plan, shuffled; oracle, the best plan, given the cost of every token."
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
    device: DeviceOption = "cpu",
    report: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder to write report.html and report.md to.", parser=path_given),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Measure quality: the task's metric, mean rank, KL to full rank and KV bytes, compared with baselines.

    Text is cut into windows and runs as in generation, with plan, cross-fades and KV policy in force. Answers are
    generated greedily. All metrics come with 95% intervals. `chunkwise bench` measures speed and memory.

    Several processes share the work: `torchrun --nproc-per-node 8 -m chunkwise_lora.cli eval ... --device cuda` gives
    each GPU its batches. The results are those of one process.
    """
    configs = {
        name: ChunkWiseConfig.from_json(read_text(Path(file), ChunkWiseError), file)
        for name, file in named_paths("--config", config).items()
    }
    peft_adapters = {name: str(examples.find(path)) for name, path in named_paths("--peft", peft).items()}
    folders = {name: str(examples.find(path)) for name, path in _calibrated(calibrated or []).items()}
    shares = [share("--mean-ranks", one) or 1.0 for one in mean_ranks or []]
    adapter = adapter and str(examples.find(adapter))

    from chunkwise_lora.evaluation.baselines import Comparison, MethodSelection  # slow to import: after all refusals
    from chunkwise_lora.evaluation.plot import plot
    from chunkwise_lora.evaluation.processes import Processes
    from chunkwise_lora.evaluation.report import markdown, page
    from chunkwise_lora.evaluation.settings import EvaluationSettings
    from chunkwise_lora.evaluation.tasks import adapter_of, calibrated_ladder, own_policy, run_task
    from chunkwise_lora.evaluation.verdict import findings, verdict

    adapter = str(adapter_of(task, adapter))
    ladders = {name: calibrated_ladder(folder) for name, folder in folders.items()} or own_policy(adapter)
    presets = presets or [CALIBRATED if ladders else "balanced"]
    selection = MethodSelection(
        [one for one in presets if one], [one for one in baselines if one], shares, peft_adapters, configs
    )
    with Processes.launched() as processes, progress(shown=processes.is_main) as reports:
        base, tokenizer = load_base_and_tokenizer(model, processes.device(device_named(device)))
        evaluation = run_task(
            task,
            data,
            Comparison(base, adapter, ladders),
            selection,
            tokenizer,
            EvaluationSettings(limit, stride, new_tokens, batch, processes),
            advance=reports.begin(f"evaluating {task}"),
        )
    if not processes.is_main:
        return
    print_plain(verdict(evaluation), style="bold")
    console.print(evaluation_table(evaluation))
    for sentence in findings(evaluation):
        print_plain(f"- {sentence}")
    print_plain(evaluation.how, style="dim")
    if report is not None:
        write_atomically(report / "quality.png", plot(evaluation))
        write_atomically(report / "report.md", markdown(evaluation, "quality.png").encode())
        write_atomically(report / "report.html", page(evaluation).encode())
    write_json(
        json_file,
        {
            "task": task,
            "verdict": verdict(evaluation),
            "findings": findings(evaluation),
            "how": evaluation.how,
            "full_rank": evaluation.full_rank,
            "results": [asdict(one) | {"name": one.name, "prediction": _prediction(one)} for one in evaluation.results],
        },
    )


def _prediction(result: Result) -> dict[str, Any] | None:
    """What calibration predicted and what was measured, as plain data."""
    if result.prediction is None:
        return None
    return {
        "expected": result.prediction.expected.model_dump(),
        "loss_increase": asdict(result.prediction.loss_increase),
    }


def _calibrated(values: Sequence[str]) -> dict[str, str]:
    """Folders by name; one that is given without a name is called `calibrated`."""
    named = [value if "=" in value and not Path(value).exists() else f"{CALIBRATED}={value}" for value in values]
    folders = named_paths("--calibrated", named)
    if len(folders) < len(values):
        raise ChunkWiseError("--calibrated: several ladders need different names; write NAME=FOLDER for each")
    return folders
