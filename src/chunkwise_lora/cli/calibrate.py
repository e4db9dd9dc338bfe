"""`chunkwise calibrate`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chunkwise_lora import examples
from chunkwise_lora.calibration.config import QUICK, CalibrationConfig
from chunkwise_lora.cli.loading import load_base_and_tokenizer
from chunkwise_lora.cli.options import (
    DeviceOption,
    JsonOption,
    LadderDTypeOption,
    ModelOption,
    device_named,
    given,
    path_given,
    share,
)
from chunkwise_lora.cli.output import console, print_plain, write_json
from chunkwise_lora.cli.progress import in_words, progress
from chunkwise_lora.cli.rendering import calibration_table
from chunkwise_lora.errors import ChunkWiseError
from chunkwise_lora.evaluation.data import NEW_TOKENS, Example

if TYPE_CHECKING:
    from chunkwise_lora.calibration.calibrate import Calibration
    from chunkwise_lora.calibration.unfinished import Unfinished
    from chunkwise_lora.calibration.work import Report

ENOUGH = 2
"""How many times the tokens to learn from are read from prompts and answers; a part of them is held back."""
AMBIGUOUS_LOSS = (0.1, 1.0)
"""Loss increases that are refused without a percent sign: 0.5 can mean 0.5% or 50%."""


def _setting(name: str) -> Any:
    """The option for one field of `CalibrationConfig`, with the field's description and default."""
    field = CalibrationConfig.model_fields[name]
    return typer.Option(help=field.description, show_default=str(field.default))


def calibrate(
    text: Annotated[
        str,
        typer.Option(
            help="File with text like the text that the adapter will be used on, but not the text that it was trained "
            "on. --task says what kind of file it is."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FOLDER", help="Folder to write the ladder and its policy to.", parser=path_given
        ),
    ],
    task: Annotated[
        str,
        typer.Option(
            help="Kind of --text: wikitext (plain text), squad (SQuAD v1.1 JSON) or e2e (E2E as CSV). If prompts have "
            "no answers, the adapter generates the missing answers."
        ),
    ] = "wikitext",
    model: ModelOption = examples.BASE,
    adapter: Annotated[
        str,
        typer.Option(
            help="PEFT adapter or ladder: a folder, owner/name on the hub, or the name of an example. By default "
            "the example for the task."
        ),
    ] = "",
    max_loss_increase: Annotated[
        str | None,
        typer.Option(metavar="PERCENT", help="Budget: largest increase of the loss per token, such as 0.5%."),
    ] = None,
    mean_rank: Annotated[
        str | None,
        typer.Option(
            metavar="PERCENT",
            help="Budget: mean rank as a share of the full rank, such as 50% (50 and 0.5 mean the same). Give either "
            "this or --max-loss-increase.",
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Do less, for a first result: "
            + ", ".join(f"--{name} {value}" for name, value in QUICK.items() if name != "explorations")
            + ". Options that you give have priority.",
        ),
    ] = False,
    minutes: Annotated[float | None, _setting("minutes")] = None,
    tokens: Annotated[int | None, _setting("tokens")] = None,
    block: Annotated[int | None, _setting("block")] = None,
    self_generated_tokens: Annotated[int | None, _setting("self_generated_tokens")] = None,
    refinements: Annotated[int | None, _setting("refinements")] = None,
    rounds: Annotated[int | None, _setting("rounds")] = None,
    keep_directions: Annotated[
        bool,
        typer.Option("--keep-directions", help=str(CalibrationConfig.model_fields["keep_directions"].description)),
    ] = False,
    distillations: Annotated[int | None, _setting("distillations")] = None,
    distillation_rate: Annotated[float | None, _setting("distillation_rate")] = None,
    held_text: Annotated[
        str | None,
        typer.Option(
            help="File of the same kind as --text, to choose the last settings on and to check the result on. Nothing "
            "else is learned from it. By default a part of --text is held back for this."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of all random choices: the same seed gives the same ladder.")] = 0,
    dtype: LadderDTypeOption = "float32",
    device: DeviceOption = "cpu",
    json_file: JsonOption = None,
) -> None:
    """Fit a ladder and its policy to an adapter, a text and a budget of quality or rank.

    Calibration builds a ladder for your data, measures what every token loses on each rung, learns to predict this
    loss, and checks the result on text that it has not used before. The output folder holds the ladder and its policy.
    Use it in place of the adapter's folder.

    Ctrl-C stops it. The same command then goes on from what it has found, which lies in a folder beside the output.
    """
    if (max_loss_increase is None) == (mean_rank is None):
        raise ChunkWiseError("give one budget: --max-loss-increase or --mean-rank")
    settings = CalibrationConfig(
        max_loss_increase=share("--max-loss-increase", max_loss_increase, AMBIGUOUS_LOSS),
        mean_rank=share("--mean-rank", mean_rank),
        keep_directions=keep_directions,
        dtype=dtype,
        seed=seed,
        **(QUICK if quick else {})
        | given(
            minutes=minutes,
            tokens=tokens,
            block=block,
            self_generated_tokens=self_generated_tokens,
            refinements=refinements,
            rounds=rounds,
            distillations=distillations,
            distillation_rate=distillation_rate,
        ),
    )
    if self_generated_tokens and task != "wikitext":
        raise ChunkWiseError(
            "--self-generated-tokens continues plain text; with --task squad or e2e, leave it out and give prompts "
            "without answers: the adapter generates the answers"
        )
    adapter = adapter and str(examples.find(adapter))

    from chunkwise_lora.calibration.calibrate import calibrate as run  # slow to import: only after all refusals
    from chunkwise_lora.calibration.text import block_length
    from chunkwise_lora.calibration.unfinished import Unfinished
    from chunkwise_lora.evaluation.answer_generator import AnswerGenerator
    from chunkwise_lora.evaluation.tasks import CalibrationReader, adapter_of
    from chunkwise_lora.ladder import RankLadder

    unfinished = Unfinished.beside(output, print_plain)
    with _ends_cleanly(unfinished), progress() as reports:
        ladder = RankLadder.load(adapter_of(task, adapter))
        base, tokenizer = load_base_and_tokenizer(model, device_named(device))

        def answer(examples: Sequence[Example]) -> list[Example]:
            track = partial(reports.track, description="answering prompts")
            found = AnswerGenerator(base, ladder, tokenizer)(examples, track)
            print_plain(
                f"The adapter answered {len(found):,} of {len(examples):,} prompts that have no answer. Prompts whose "
                f"answers do not end within {NEW_TOKENS} tokens are left out."
            )
            return found

        read = CalibrationReader(task, tokenizer, answer, print_plain)
        longest, enough = block_length(base, settings.block), None if minutes else ENOUGH * settings.tokens
        ids, scored, length = read(text, longest, tokens=enough)
        held, held_scored = None, None
        if held_text is not None:
            held, held_scored, _ = read(held_text, length, exact=True, tokens=settings.tokens)
        settings = settings.model_copy(update={"block": length})
        report = _announced(reports.overall())
        result = run(base, ladder, ids, settings, report, scored, held, held_scored, unfinished)
        result.ladder.save_pretrained(output)
    unfinished.remove()
    _print_result(result, output)
    policy = result.policy.model_dump(mode="json")
    content = {"check": asdict(result.check), "choice": asdict(result.choice), "explained": result.explained}
    content["searched"] = result.searched
    write_json(json_file, {**content, "config": policy})


@contextmanager
def _ends_cleanly(unfinished: Unfinished) -> Iterator[None]:
    """Let Ctrl-C end the command with one line and the exit status that shells expect."""
    try:
        yield
    except KeyboardInterrupt:
        kept = "" if unfinished.folder is None else f" Run the same command to go on, or delete {unfinished.folder}."
        print(f"Stopped.{kept}", file=sys.stderr)
        raise typer.Exit(130) from None


def _announced(report: Report) -> Report:
    """`report`, with a line about the time that the rest of the work takes before its first call."""
    announced = False

    def announce(stage: str, done: float, total: float) -> None:
        nonlocal announced
        if not announced:
            announced = True
            rest = "takes" if not done else "goes on for"
            print_plain(f"Calibration {rest} {in_words(total - done)} on this machine.")
        report(stage, done, total)

    return announce


def _print_result(result: Calibration, output: Path) -> None:
    console.print(calibration_table(result))
    check, choice = result.check, result.choice
    verdict = "Each token gets its own rung" if choice.pays else "One rung serves all tokens: choosing does not pay"
    print_plain(
        f"{verdict} (KL to full rank {choice.planned:.2g} nats per token if rungs are chosen, and {choice.alike:.2g} "
        "with one rung at that cost)."
    )
    change = "rise" if check.loss_increase >= 0 else "fall"
    print_plain(
        f"Expect the loss to {change} by {abs(check.loss_increase):.2%} (95% interval: plus or minus "
        f"{check.loss_increase_error:.2%}) at a mean rank of {check.mean_rank:.1f} of "
        f"{result.ladder.rung_ranks[-1]:g}, with {check.kv_share:.0%} of the KV bytes. This was measured on "
        f"{check.tokens:,} tokens of unseen text."
    )
    print_plain(f"Written to {output}", wrap=False)
