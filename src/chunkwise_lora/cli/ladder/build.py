"""`chunkwise ladder build`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chunkwise_lora import embedded
from chunkwise_lora.cli.loading import load_base_and_tokenizer, token_ids
from chunkwise_lora.cli.options import JsonOption, dtype_named
from chunkwise_lora.cli.output import console, progress_bar, write_json
from chunkwise_lora.cli.rendering import ladder_table
from chunkwise_lora.errors import ChunkWiseError, LadderError
from chunkwise_lora.files import read_text

if TYPE_CHECKING:
    from chunkwise_lora.ladder import RankLadder


def build(
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
    from chunkwise_lora.ladder import RankLadder, describe

    if (base is None) != (calibration_text is None):
        raise ChunkWiseError("--base and --calibration-text go together; give both or none")
    storage = dtype_named(dtype)
    if as_trained and base is not None:
        raise ChunkWiseError("--as-trained keeps the directions that --base would change; give one of them")
    ladder = RankLadder.from_peft(embedded.find(adapter), as_trained=as_trained)
    if base is not None and calibration_text is not None:
        ladder = _data_aware(ladder, base, calibration_text)
    ladder.to(storage).save_pretrained(output)
    console.print(ladder_table(ladder))
    console.print(f"Written to {output}", markup=False)
    write_json(json_file, describe(ladder))


def _data_aware(ladder: RankLadder, base: str, text: Path) -> RankLadder:
    from chunkwise_lora.calibration.costs import Text
    from chunkwise_lora.calibration.moments import second_moments
    from chunkwise_lora.engines.transformers import ChunkWiseModel

    model, tokenizer = load_base_and_tokenizer(base)
    length = min(512, getattr(model.config.get_text_config(), "max_position_embeddings", 512))
    tokens = token_ids(tokenizer, read_text(text, LadderError))[0, : 128 * length]
    if len(tokens) < length:
        raise LadderError(f"{text}: {len(tokens)} tokens are too few to calibrate on; give at least {length}")
    blocks = [one.tokens for one in Text.blocks(tokens, length).split(1)]
    with progress_bar() as progress, ChunkWiseModel(model, ladder) as chunkwise:
        return ladder.data_aware(second_moments(chunkwise, progress.track(blocks, description="calibrating")))
