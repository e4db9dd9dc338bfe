"""`chunkwise ladder build`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chunkwise_lora import examples
from chunkwise_lora.cli.loading import load_base_and_tokenizer, token_ids
from chunkwise_lora.cli.options import JsonOption, LadderDTypeOption, dtype_named, path_given
from chunkwise_lora.cli.output import console, print_plain, write_json
from chunkwise_lora.cli.progress import progress
from chunkwise_lora.cli.rendering import ladder_table
from chunkwise_lora.errors import ChunkWiseError, LadderError
from chunkwise_lora.files import read_text

if TYPE_CHECKING:
    from chunkwise_lora.ladder import RankLadder


def build(
    adapter: Annotated[
        str, typer.Argument(help="PEFT adapter: a folder, owner/name on the hub, or the name of an example.")
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FOLDER", help="Folder to write the ladder to.", parser=path_given),
    ],
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Base model for a data-aware ladder: a folder or a name on the hub."),
    ] = None,
    calibration_text: Annotated[
        Path | None,
        typer.Option(help="File of plain text for a data-aware ladder, like the text that the adapter will see."),
    ] = None,
    as_trained: Annotated[
        bool,
        typer.Option(
            "--as-trained",
            help="Keep the adapter's own directions and their order. Use it for adapters whose first directions were "
            "trained to work without the others.",
        ),
    ] = False,
    dtype: LadderDTypeOption = "float32",
    json_file: JsonOption = None,
) -> None:
    """Turn a PEFT LoRA adapter into a rank ladder by SVD.

    With --base and --calibration-text the ladder is data-aware: at every rank, the adapter's output on this text has
    the least squared error.
    """
    if (base is None) != (calibration_text is None):
        raise ChunkWiseError("--base and --calibration-text go together; give both or none")
    if as_trained and base is not None:
        raise ChunkWiseError(
            "--as-trained keeps the adapter's directions, but --base with --calibration-text changes them; leave out "
            "one of the two"
        )
    source = examples.find(adapter)

    from chunkwise_lora.ladder import RankLadder, describe, is_ladder  # slow to import: only after all refusals

    if is_ladder(output) and RankLadder.load(output).policy is not None:
        raise ChunkWiseError(f"--output {output}: holds a calibrated ladder, which would be lost; give another folder")
    storage = dtype_named(dtype)
    ladder = RankLadder.from_peft(source, as_trained=as_trained)
    if base is not None and calibration_text is not None:
        ladder = _data_aware(ladder, base, calibration_text)
    ladder.to(storage).save_pretrained(output)
    console.print(ladder_table(ladder))
    print_plain(f"Written to {output}", wrap=False)
    write_json(json_file, describe(ladder))


def _data_aware(ladder: RankLadder, base: str, text: Path) -> RankLadder:
    """The ladder that truncates best on the text of a file, of which at most 128 sequences are used."""
    from chunkwise_lora.calibration.moments import second_moments
    from chunkwise_lora.calibration.text import TokenBlocks, block_length
    from chunkwise_lora.engines.transformers import ChunkWiseModel

    model, tokenizer = load_base_and_tokenizer(base)
    length = block_length(model, 512)
    tokens = token_ids(tokenizer, read_text(text, LadderError))[0, : 128 * length]
    if len(tokens) < length:
        raise LadderError(f"{text}: {len(tokens)} tokens are too few to calibrate on; give at least {length}")
    blocks = [one.tokens for one in TokenBlocks.cut(tokens, length).split(1)]
    with progress() as reports, ChunkWiseModel(model, ladder) as chunkwise:
        return ladder.data_aware(second_moments(chunkwise, reports.track(blocks, description="gathering moments")))
