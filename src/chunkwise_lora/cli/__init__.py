"""The `chunkwise` command."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from typer.core import TyperCommand

from chunkwise_lora import embedded
from chunkwise_lora.errors import ChunkWiseError, EngineError, LadderError, first_line
from chunkwise_lora.evaluation.data import NEW_TOKENS, Example
from chunkwise_lora.files import read_text, write_atomically
from chunkwise_lora.ladder import RankLadder, describe
from chunkwise_lora.method.config import PRESETS, CalibrationConfig, ChunkWiseConfig

if TYPE_CHECKING:
    import torch

    from chunkwise_lora.engines.transformers import ChunkWiseModel

CONTEXTS, BATCHES, ALL_PRESETS = [128, 512], [1], list(PRESETS)
EVALUATED, RIVALS = ["balanced", "calibrated"], ["base", "svd", "ladder", "random", "oracle"]


class ListCommand(TyperCommand):
    """A command whose repeatable options may also be followed by all their values: `--batch 1 4`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give every value its own flag, then parse as usual."""
        repeatable = {flag for param in self.params if getattr(param, "multiple", False) for flag in param.opts}
        spread: list[str] = []
        flag = ""
        for arg in args:
            if arg.startswith("-"):
                flag = arg.partition("=")[0]
            elif flag in repeatable and spread[-1] != flag:
                spread.append(flag)
            spread.append(arg)
        return super().parse_args(ctx, spread)


app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")
ladder_app = typer.Typer(help="Build and look at rank ladders.", no_args_is_help=True)
app.add_typer(ladder_app, name="ladder")
console = Console()

JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the results as JSON too.")]

DEMO_PROMPTS = (
    ("wiki", " = Aldhaven = \n \n Aldhaven is a town in"),
    ("wiki", " = = History = = \n \n The church was built in"),
    ("e2e", "name[Blue Spice], eatType[coffee shop], area[city centre] ->"),
)


@app.command()
def demo(
    new_tokens: Annotated[int, typer.Option(min=2, max=512, help="Tokens to generate per prompt.")] = 48,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the comparison.")] = 5,
    json_file: JsonOption = None,
) -> None:
    """Run the whole method on the embedded model: coloured text, then a comparison with PEFT."""
    from transformers import set_seed

    from chunkwise_lora.benchmark.measure import contestants, measure, score
    from chunkwise_lora.engines.transformers import ChunkWiseModel
    from chunkwise_lora.rendering import bench_table, rank_legend

    base, tokenizer = _load(str(embedded.BASE))
    ladders = {name: RankLadder.load(embedded.ADAPTERS[name]) for name in dict(DEMO_PROMPTS)}
    console.print("Two adapters on one base model, [bold]balanced[/], all prompts in one batch:")
    with ChunkWiseModel(base, ladders, ChunkWiseConfig.preset("balanced")) as model:
        console.print(rank_legend(ladders["wiki"].rung_ranks))
        names, prompts = zip(*DEMO_PROMPTS, strict=True)
        set_seed(0)
        shown = _show(model, tokenizer, list(prompts), list(names), new_tokens, do_sample=True, top_p=0.7)

    entrants = contestants(
        base,
        {"wiki": embedded.ADAPTERS["wiki"]},
        {name: ChunkWiseConfig.preset(name) for name in PRESETS},
        ladders={"wiki": ladders["wiki"]},
    )
    held = _tokens(tokenizer, read_text(embedded.HELD_TEXT, EngineError))
    with _progress() as progress:
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
    _write_json(json_file, {"generations": shown, "comparison": compared})


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    model: Annotated[str, typer.Option(help="Base model: a folder or a name on the hub.")] = str(embedded.BASE),
    adapter: Annotated[
        str, typer.Option(help="PEFT adapter or ladder: a folder, a name on the hub, or an embedded one.")
    ] = "wiki",
    preset: Annotated[str | None, typer.Option(help=f"One of {', '.join(PRESETS)}.")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings as JSON, instead of a preset.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 64,
    show_ranks: Annotated[bool, typer.Option("--show-ranks", help="Colour tokens by rank and mark chunks.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Continue a prompt with a base model and an adapter, greedily."""
    from chunkwise_lora.engines.transformers import ChunkWiseModel
    from chunkwise_lora.rendering import rank_legend

    if preset is not None and config is not None:
        raise ChunkWiseError("--preset and --config: give one of them")
    chosen = ChunkWiseConfig.from_json(read_text(config, ChunkWiseError), str(config)) if config is not None else None
    if preset is not None:
        chosen = ChunkWiseConfig.preset(preset)
    source = embedded.find(adapter)
    base, tokenizer = _load(model)
    with ChunkWiseModel(base, source, chosen) as chunkwise:
        if show_ranks:
            console.print(rank_legend(next(iter(chunkwise.ladders.values())).rung_ranks))
        shown = _show(chunkwise, tokenizer, [prompt], None, max_new_tokens, show_ranks, do_sample=False)
    _write_json(json_file, shown[0])


@app.command(cls=ListCommand)
def bench(
    model: Annotated[str, typer.Option(help="Base model: a folder or a name on the hub.")] = str(embedded.BASE),
    adapter: Annotated[
        str, typer.Option(help="PEFT adapter: a folder, a name on the hub, or an embedded one.")
    ] = "wiki",
    random_weights: Annotated[
        str | None,
        typer.Option(metavar="SHAPE", help="Instead: random weights in a known shape, 135M, 360M, 1B or 7B."),
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the random adapters.")] = 16,
    adapters: Annotated[
        int, typer.Option(min=1, help="So many random adapters, which the sequences of a batch take in turns.")
    ] = 1,
    contexts: Annotated[list[int], typer.Option(min=16, help="Prompt tokens, one or more numbers.")] = CONTEXTS,
    batch: Annotated[list[int], typer.Option(min=1, help="Sequences per batch, one or more numbers.")] = BATCHES,
    presets: Annotated[list[str], typer.Option(help=f"One or more of {', '.join(PRESETS)}.")] = ALL_PRESETS,
    contestants: Annotated[
        list[str] | None, typer.Option(help="Only those whose names start so, besides PEFT unmerged.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that a round decodes.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds of decoding.")] = 7,
    prefill_rounds: Annotated[
        int, typer.Option(min=0, help="Rounds of prefill. 0: fill the rivals' caches at random and time decoding only.")
    ] = 3,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    slow: Annotated[
        list[str] | None, typer.Option(help="Fast paths to switch off: kernels, attention, products.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw latency and memory against context into this PNG.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Time and weigh ChunkWise beside the base model, PEFT merged and PEFT unmerged.

    One process, the same weights, threads and attention for all, in interleaved rounds: ratios are medians of paired
    rounds. The base model without its adapter shows the limit for any adapter. Peaks are of the process above the
    loaded weights, or of the GPU.
    """
    from chunkwise_lora.benchmark import measure as benchmark
    from chunkwise_lora.benchmark.shapes import SHAPES, random_adapter, random_model
    from chunkwise_lora.engines.transformers.layers import FastPaths
    from chunkwise_lora.rendering import bench_table

    known = [name for name in FastPaths.__dataclass_fields__ if name in (slow or [])]
    if unknown := sorted(set(slow or []) - set(known)):
        raise ChunkWiseError(f"--slow {unknown[0]}: choose from {', '.join(FastPaths.__dataclass_fields__)}")
    if random_weights is not None and random_weights not in SHAPES:
        raise ChunkWiseError(f"--random-weights {random_weights}: choose one of {', '.join(SHAPES)}")
    if adapters > 1 and random_weights is None:
        raise ChunkWiseError("--adapters makes random adapters; give --random-weights too")
    configs = {name: ChunkWiseConfig.preset(name) for name in presets}
    with tempfile.TemporaryDirectory() as scratch:
        if random_weights is None:
            base = _load(model)[0].to(_device(device), _dtype(dtype))
            folders = {"adapter": embedded.find(adapter)}
        else:
            shape = SHAPES[random_weights]
            base = random_model(shape, _dtype(dtype), _device(device))
            names = [f"random-{seed}" for seed in range(1, adapters + 1)]
            folders = {
                name: random_adapter(shape, rank, Path(scratch) / name, seed) for seed, name in enumerate(names, 1)
            }
        fast = FastPaths(**dict.fromkeys(known, False))
        entrants = benchmark.contestants(base, folders, configs, caches=True, fast=fast)
    wanted = (benchmark.UNMERGED, *(contestants or [""]))
    entrants = [entrant for entrant in entrants if entrant.name.startswith(wanted)]
    cells = [(size, context) for size in batch for context in contexts]
    results = []
    with _progress() as progress:
        task = progress.add_task("", total=len(cells) * len(entrants) * (rounds + max(prefill_rounds, 1)))
        for size, context in cells:
            progress.update(task, description=f"context {context}, batch {size}")
            results += benchmark.measure(
                entrants,
                benchmark.random_prompt(base, size, context),
                new_tokens=new_tokens,
                rounds=rounds,
                prefill_rounds=prefill_rounds,
                advance=lambda: progress.advance(task),
            )
    machine = benchmark.machine(base.device)
    console.print(bench_table(results))
    share = max(result.scheduler_ms / result.decode_ms for result in results)
    console.print(
        f"{random_weights or model}, {dtype}, {rounds} rounds of {new_tokens} tokens, {prefill_rounds} of prefill; "
        f"planning is at most {share:.1%} of a step; {machine}"
    )
    if plot is not None:
        from chunkwise_lora.benchmark.plots import plot_bench

        plot_bench(results, plot)
    _write_json(json_file, {"machine": machine, "results": [asdict(result) for result in results]})


@app.command()
def calibrate(
    text: Annotated[
        str, typer.Option(help="File of plain text like the adapter will see, and did not train on; see --task.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write: a ladder that knows its config.")],
    task: Annotated[
        str,
        typer.Option(
            help="What --text is: wikitext (plain text), squad (SQuAD v1.1 JSON) or e2e (E2E as CSV). Prompts without "
            "an answer are answered by the adapter itself."
        ),
    ] = "wikitext",
    model: Annotated[str, typer.Option(help="Base model: a folder or a name on the hub.")] = str(embedded.BASE),
    adapter: Annotated[str, typer.Option(help="PEFT adapter: a folder or a name on the hub, or an embedded one.")] = "",
    max_loss_increase: Annotated[
        str | None, typer.Option(help="Budget: how much the loss per token may rise, such as 0.5%.")
    ] = None,
    mean_rank: Annotated[
        str | None, typer.Option(help="Or: mean rank as a share of the full one, such as 50%.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help=CalibrationConfig.model_fields["tokens"].description)] = None,
    written: Annotated[int | None, typer.Option(help=CalibrationConfig.model_fields["written"].description)] = None,
    refinements: Annotated[
        int | None, typer.Option(help=CalibrationConfig.model_fields["refinements"].description)
    ] = None,
    rounds: Annotated[int | None, typer.Option(help=CalibrationConfig.model_fields["rounds"].description)] = None,
    keep_directions: Annotated[
        bool,
        typer.Option(
            "--keep-directions", help=f"{CalibrationConfig.model_fields['keep_directions'].description} See training."
        ),
    ] = False,
    distillations: Annotated[
        int | None, typer.Option(help=CalibrationConfig.model_fields["distillations"].description)
    ] = None,
    distillation_rate: Annotated[
        float | None, typer.Option(help=CalibrationConfig.model_fields["distillation_rate"].description)
    ] = None,
    held_text: Annotated[
        str | None,
        typer.Option(
            help="File of plain text to choose the last knobs by and to check on; by default the end of --text."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of every draw: the same seed gives the same ladder.")] = 0,
    json_file: JsonOption = None,
) -> None:
    """Fit a ladder and its policy to an adapter, a text and a budget of quality or rank.

    Builds the data-aware ladder and its rungs, measures what every token costs at each rung, learns to predict that
    in time, and checks the result on text it has not seen. The folder runs wherever an adapter does.
    """
    from chunkwise_lora.calibration.calibrate import calibrate as run
    from chunkwise_lora.evaluation.answers import own_answers
    from chunkwise_lora.evaluation.tasks import adapter_of, calibration_tokens
    from chunkwise_lora.rendering import calibration_table

    if (max_loss_increase is None) == (mean_rank is None):
        raise ChunkWiseError("give one budget: --max-loss-increase or --mean-rank")
    knobs = CalibrationConfig(
        max_loss_increase=_share(max_loss_increase),
        mean_rank=_share(mean_rank),
        keep_directions=keep_directions,
        seed=seed,
        **_given(
            tokens=tokens,
            written=written,
            refinements=refinements,
            rounds=rounds,
            distillations=distillations,
            distillation_rate=distillation_rate,
        ),
    )
    if written and task != "wikitext":
        raise ChunkWiseError(
            "--written goes on from plain text; with --task squad or e2e, prompts without answers do so"
        )
    if held_text is not None and task != "wikitext":
        raise ChunkWiseError("--held-text is plain text; with --task squad or e2e, the end of --text is held back")
    ladder = RankLadder.load(adapter_of(task, adapter))
    base, tokenizer = _load(model)
    with _progress() as progress:

        def answer(examples: Sequence[Example]) -> list[Example]:
            track = partial(progress.track, description="answering prompts")
            found = own_answers(base, ladder, tokenizer, examples, track=track)
            console.print(
                f"Of {len(examples):,} prompts without an answer, the adapter answered {len(found):,} within "
                f"{NEW_TOKENS} tokens; the others are left out."
            )
            return found

        ids, counted, block = calibration_tokens(task, text, tokenizer, knobs.block, answer)
        held = None if held_text is None else calibration_tokens(task, held_text, tokenizer, block, answer)[0]
        knobs = knobs.model_copy(update={"block": block})
        result = run(base, ladder, ids, knobs, cast("Any", progress.track), counted, held)
    result.ladder.save_pretrained(output)
    result.config.save_pretrained(output)
    console.print(calibration_table(result))
    check = result.check
    console.print(
        f"Expect the loss to rise by {check.loss_increase:.2%} (give or take {check.loss_increase_error:.2%}) at a "
        f"mean rank of {check.mean_rank:.1f} of {result.ladder.rung_ranks[-1]:g}, with {check.kv_share:.0%} of the KV "
        f"bytes. Measured on {check.tokens:,} unseen tokens. Written to {output}"
    )
    config = result.config.model_dump(mode="json")
    found = {"check": asdict(check), "explained": result.explained, "searched": result.searched, "config": config}
    _write_json(json_file, found)


@app.command("eval", cls=ListCommand)
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
        for name, file in _named("--config", config).items()
    }
    base, tokenizer = _load(model)
    with _progress() as progress:
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
            peft={name: str(embedded.find(path)) for name, path in _named("--peft", peft).items()},
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
    _write_json(
        json_file, {"task": task, "how": evaluation.how, "results": [asdict(one) for one in evaluation.results]}
    )


@ladder_app.command("build")
def ladder_build(
    adapter: Annotated[str, typer.Argument(help="PEFT adapter: a folder or a name on the hub.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    base: Annotated[str | None, typer.Option(help="Base model, for a data-aware ladder.")] = None,
    calibration_text: Annotated[Path | None, typer.Option(help="Plain text like the adapter will see.")] = None,
    as_trained: Annotated[
        bool, typer.Option("--as-trained", help="Keep the adapter's directions and their order, instead of the SVD's.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Storage: float32 (lossless), bfloat16 or float16.")] = "float32",
    json_file: JsonOption = None,
) -> None:
    """Turn a PEFT LoRA adapter into a rank ladder: once, by SVD.

    --as-trained is for adapters whose first directions were trained to stand alone. With --base and
    --calibration-text the ladder is data-aware: every rank keeps most of the adapter's output on real inputs, not on
    random ones.
    """
    from chunkwise_lora.rendering import ladder_table

    if (base is None) != (calibration_text is None):
        raise ChunkWiseError("--base and --calibration-text go together; give both or none")
    storage = _dtype(dtype)
    if as_trained and base is not None:
        raise ChunkWiseError("--as-trained keeps the directions that --base would change; give one of them")
    ladder = RankLadder.from_peft(embedded.find(adapter), as_trained=as_trained)
    if base is not None and calibration_text is not None:
        ladder = _data_aware(ladder, base, calibration_text)
    ladder.to(storage).save_pretrained(output)
    console.print(ladder_table(ladder))
    console.print(f"Written to {output}", markup=False)
    _write_json(json_file, describe(ladder))


@ladder_app.command("export")
def ladder_export(
    folder: Annotated[Path, typer.Argument(help="Folder of a ladder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; may be the ladder's own.")],
) -> None:
    """Write a ladder at full rank as a plain PEFT adapter, for programs that know no ladders."""
    RankLadder.from_pretrained(folder).save_peft(output)
    console.print(f"Written to {output}", markup=False)


@ladder_app.command("show")
def ladder_show(
    folder: Annotated[Path, typer.Argument(help="Folder of a ladder, or of a PEFT adapter.")],
    json_file: JsonOption = None,
) -> None:
    """Show a ladder: spectrum and energy kept per rung and module."""
    from chunkwise_lora.rendering import ladder_table

    if not os.path.isdir(folder):
        raise LadderError(f"{folder}: no such folder")
    ladder = RankLadder.load(folder)
    console.print(ladder_table(ladder))
    _write_json(json_file, describe(ladder))


def main() -> None:
    """Run the command; a refusal becomes one line and exit status 1."""
    try:
        app()
    except ChunkWiseError as error:
        line = Text("error: ", "bold red").append(" ".join(str(error).split()), "default")
        Console(stderr=True).print(line, soft_wrap=True)
        sys.exit(1)


def _share(text: str | None) -> float | None:
    """0.5% or 0.005 as a number."""
    if text is None:
        return None
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise ChunkWiseError(f"{text}: write a share such as 0.5% or 0.005") from None


def _named(option: str, values: Sequence[str] | None) -> dict[str, str]:
    """What name=path options say."""
    pairs = dict(value.partition("=")[::2] for value in values or [])
    if not all(pairs) or not all(pairs.values()):
        raise ChunkWiseError(f"{option}: write name=path")
    return pairs


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def _dtype(name: str) -> torch.dtype:
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ChunkWiseError(f"--dtype {name}: choose one of {', '.join(known)}")
    return known[name]


def _device(name: str) -> torch.device:
    import torch

    known = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if name not in known:
        raise ChunkWiseError(f"--device {name}: this machine has {' and '.join(known)}")
    return torch.device(name)


def _load(name: str) -> tuple[Any, Any]:
    """Base model and tokenizer."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from chunkwise_lora.engines.transformers.model import load_base

    logging.disable_progress_bar()
    base = load_base(name)
    if base.device.type == "cpu" and str(base.dtype) == "torch.float16":
        base = base.float()  # CPUs compute float16 slowly
    try:
        return base, AutoTokenizer.from_pretrained(name)
    except Exception as error:  # a damaged tokenizer raises whatever its reader meets
        raise EngineError(f"{name}: its tokenizer cannot be loaded ({first_line(error)})") from None


def _tokens(tokenizer: Any, text: str) -> torch.Tensor:
    """(1, tokens)"""
    ids: torch.Tensor = tokenizer(text, return_tensors="pt").input_ids
    return ids.long()


def _show(
    model: ChunkWiseModel,
    tokenizer: Any,
    prompts: list[str],
    adapters: list[str] | None,
    new_tokens: int,
    show_ranks: bool = True,
    **options: Any,
) -> list[dict[str, Any]]:
    """Generate for all prompts in one batch, print the texts and return what happened."""
    from chunkwise_lora.rendering import coloured_tokens

    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    inputs = tokenizer(prompts, return_tensors="pt", padding=len(prompts) > 1, padding_side="left")
    output = model.generate(
        inputs.input_ids,
        attention_mask=inputs.attention_mask,
        adapter_names=adapters,
        max_new_tokens=new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    trace = model.trace
    assert trace is not None
    shown = []
    for row, sequence in enumerate(trace.sequences):
        prompt_tokens = int(inputs.attention_mask[row].sum())
        text = tokenizer.decode(output[row, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        if show_ranks:
            full_rank = model.ladders[sequence.adapter].rung_ranks[-1] if sequence.adapter else 0.0
            coloured = coloured_tokens(sequence, _pieces(tokenizer, sequence.tokens), full_rank, prompt_tokens)
            ranks = f"mean rank {sequence.mean_rank:.1f} of {full_rank:g}"
            title = f"{sequence.adapter}, {ranks}, {len(sequence.chunks)} chunks"
            console.print(Panel(coloured, title=title))
        else:
            console.print(text, markup=False, highlight=False)
        shown.append({"prompt": prompts[row], "text": text, "mean_rank": sequence.mean_rank, **asdict(sequence)})
    console.print(
        f"KV cache {trace.kv_bytes / 1024:,.0f} KB of {trace.kv_bytes_full / 1024:,.0f} KB in full precision, "
        f"adapter {trace.adapter_bytes_read / trace.passes / 1024:,.0f} KB read per pass, "
        f"scheduler {trace.scheduler_seconds / trace.passes * 1e3:.2f} ms per pass",
        style="dim",
    )
    return shown


def _pieces(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """What each token adds to the text; a character of several tokens comes with the last of them."""
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=False)
    return [stream.step(tokenizer.backend_tokenizer, token) or "" for token in tokens]


def _data_aware(ladder: RankLadder, base: str, text: Path) -> RankLadder:
    from chunkwise_lora.calibration.costs import Text
    from chunkwise_lora.calibration.moments import second_moments
    from chunkwise_lora.engines.transformers import ChunkWiseModel

    model, tokenizer = _load(base)
    length = min(512, getattr(model.config.get_text_config(), "max_position_embeddings", 512))
    tokens = _tokens(tokenizer, read_text(text, LadderError))[0, : 128 * length]
    if len(tokens) < length:
        raise LadderError(f"{text}: {len(tokens)} tokens are too few to calibrate on; give at least {length}")
    blocks = [one.tokens for one in Text.blocks(tokens, length).split(1)]
    with _progress() as progress, ChunkWiseModel(model, ladder) as chunkwise:
        return ladder.data_aware(second_moments(chunkwise, progress.track(blocks, description="calibrating")))


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def _write_json(path: Path | None, content: Any) -> None:
    if path is not None:
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
