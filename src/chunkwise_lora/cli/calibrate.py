"""`chunkwise calibrate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from chunkwise_lora import embedded
from chunkwise_lora.cli.loading import load_base_and_tokenizer
from chunkwise_lora.cli.options import JsonOption, given, share
from chunkwise_lora.cli.output import console, progress_bar, write_json
from chunkwise_lora.cli.rendering import calibration_table
from chunkwise_lora.errors import ChunkWiseError
from chunkwise_lora.evaluation.data import NEW_TOKENS, Example
from chunkwise_lora.method.config import CalibrationConfig


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
    from chunkwise_lora.ladder import RankLadder

    if (max_loss_increase is None) == (mean_rank is None):
        raise ChunkWiseError("give one budget: --max-loss-increase or --mean-rank")
    knobs = CalibrationConfig(
        max_loss_increase=share(max_loss_increase),
        mean_rank=share(mean_rank),
        keep_directions=keep_directions,
        seed=seed,
        **given(
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
    base, tokenizer = load_base_and_tokenizer(model)
    with progress_bar() as progress:

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
    write_json(json_file, found)
