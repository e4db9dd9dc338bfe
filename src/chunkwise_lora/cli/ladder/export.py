"""`chunkwise ladder export`."""

from __future__ import annotations

import os
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from chunkwise_lora import examples
from chunkwise_lora.cli.options import JsonOption, dtype_named, path_given, share
from chunkwise_lora.cli.output import console, print_plain, write_json
from chunkwise_lora.errors import ChunkWiseError

if TYPE_CHECKING:
    import torch

    from chunkwise_lora.ladder import RankLadder, Truncation


@dataclass(frozen=True)
class Figures:
    """Ranks and size of an adapter, before or after the export."""

    mean_rank: float
    """Mean rank of the modules, weighted by in + out features."""
    lowest_rank: int
    """Smallest rank of a module."""
    highest_rank: int
    """Largest rank of a module."""
    dtype: str
    """Number format of the adapter weights."""
    nbytes: int
    """Bytes of the adapter weights, and of the modules that the adapter replaces. For GGUF, bytes of the file."""


def export(
    ladder: Annotated[
        str,
        typer.Argument(help="Ladder or PEFT adapter: a folder, owner/name on the hub, or the name of an example."),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            parser=path_given,
            help="Folder to write the PEFT adapter to, other than a ladder's folder; for GGUF, the file to write.",
        ),
    ],
    file_format: Annotated[
        str,
        typer.Option(
            "--format",
            help="peft: a PEFT adapter folder. gguf: a file for llama.cpp and programs built on it, such as Ollama.",
        ),
    ] = "peft",
    mean_rank: Annotated[
        str | None,
        typer.Option(
            metavar="PERCENT",
            help="Mean rank to export, as a share of the full rank, such as 50% (50 and 0.5 mean the same). By default "
            "the full rank.",
        ),
    ] = None,
    one_rank: Annotated[
        bool,
        typer.Option(
            "--one-rank",
            help="Give all modules the same rank, for programs that cannot run an adapter whose modules differ in rank "
            "(rank_pattern).",
        ),
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Number format to write: float32, bfloat16 or float16, by default that of LADDER; for GGUF f32 (the "
            "default), f16 or q8_0."
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Base model, for GGUF only: its GGUF file, a folder or a name on the hub. By default the one that "
            "LADDER names. Only its config is read.",
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Write one rung of a ladder as a plain adapter, which runs without ChunkWise LoRA.

    Every token then runs at the rank of that rung. PEFT, vLLM and other programs that read PEFT adapters can use it; in
    the format gguf, llama.cpp and programs built on it.
    The command prints what the lower rank loses: the KL divergence from full rank, if `chunkwise calibrate` or
    `chunkwise ladder measure` measured it, and the share of the squared singular values (or of the importance, for a
    calibrated ladder) that is kept.
    """
    wanted = share("--mean-rank", mean_rank)
    if file_format not in ("peft", "gguf"):
        raise ChunkWiseError(f"--format {file_format}: choose one of peft, gguf")
    if base is not None and file_format != "gguf":
        raise ChunkWiseError("--base is only for --format gguf; leave it out")
    source = examples.find(ladder)

    from chunkwise_lora.ladder import RankLadder, truncate  # slow to import: only after all refusals

    chosen_dtype = dtype_named(dtype) if dtype is not None and file_format == "peft" else None
    if file_format == "peft":
        _check_folder(source, output)
    loaded = RankLadder.load(source)
    stored_dtype, stored_bytes = _as_stored(source, loaded)
    before = _figures(loaded, _name(stored_dtype), stored_bytes)
    found = truncate(loaded, 1.0 if wanted is None else wanted, one_rank)
    if file_format == "peft":
        after, usage = _write_peft(found.ladder, output, chosen_dtype or stored_dtype)
    else:
        after, usage = _write_gguf(found.ladder, output, dtype or "f32", base)

    console.print(_table(before, after))
    print_plain(_what_is_lost(found, one_rank))
    print_plain(f"Written to {output}. To use it:")
    print_plain(f"    {usage}", wrap=False)
    content = {"before": asdict(before), "after": asdict(after), "kl": found.kl, "energy_kept": found.energy_kept}
    write_json(json_file, {**content, "ranks": {name: module.rank for name, module in found.ladder.modules.items()}})


def _check_folder(source: str | Path, output: Path) -> None:
    """Refuse to replace the adapter that is exported, or any ladder."""
    from chunkwise_lora.ladder import is_ladder

    if os.path.isdir(source) and os.path.isdir(output) and os.path.samefile(source, output):
        raise ChunkWiseError(
            f"--output {output}: is the adapter that is exported, and the export would replace it; give another folder"
        )
    if is_ladder(output):
        raise ChunkWiseError(
            f"--output {output}: holds a ladder, and the export would replace it. PEFT can load that folder as it is, "
            "at full rank; give another folder for the export"
        )


def _write_peft(ladder: RankLadder, output: Path, dtype: torch.dtype) -> tuple[Figures, str]:
    """Write a PEFT adapter. Returns its figures and how to use it."""
    exported = ladder.to(dtype)
    exported.save_adapter(output)
    return _figures(exported, _name(dtype), _nbytes(exported)), f"PeftModel.from_pretrained(base, {str(output)!r})"


def _write_gguf(ladder: RankLadder, output: Path, dtype: str, base: str | None) -> tuple[Figures, str]:
    """Write a GGUF adapter. Returns its figures and how to use it."""
    from chunkwise_lora.ladder.gguf import write_gguf

    if base is None and ladder.base_model == examples.BASE_NAME:
        base = str(examples.gguf_file())
    write_gguf(ladder, output, base=base, dtype=dtype)
    usage = f"llama-cli -m BASE.gguf --lora {shlex.quote(str(output))}"
    return _figures(ladder, dtype, output.stat().st_size), usage


def _figures(ladder: RankLadder, dtype: str, nbytes: int) -> Figures:
    ranks = [module.rank for module in ladder.modules.values()]
    return Figures(ladder.rung_ranks[-1], min(ranks), max(ranks), dtype, nbytes)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _nbytes(ladder: RankLadder) -> int:
    factors = [tensor for module in ladder.modules.values() for tensor in (module.up, module.down)]
    return sum(tensor.nbytes for tensor in (*factors, *ladder.saved_modules.values()))


def _as_stored(source: str | Path, ladder: RankLadder) -> tuple[torch.dtype, int]:
    """The dtype and the bytes in which a ladder or an adapter is stored. A loaded adapter is always float32."""
    import torch

    from chunkwise_lora.ladder import is_ladder
    from chunkwise_lora.ladder.peft_adapter import PeftAdapter

    if is_ladder(source):
        dtypes = {module.up.dtype for module in ladder.modules.values()}
        nbytes = _nbytes(ladder)
    else:
        adapter = PeftAdapter.load(source)
        tensors = [tensor for a, b, _ in adapter.factors.values() for tensor in (a, b)]
        dtypes = {tensor.dtype for tensor in tensors}
        nbytes = sum(tensor.nbytes for tensor in (*tensors, *adapter.saved_modules.values()))
    return (dtypes.pop() if len(dtypes) == 1 and torch.float64 not in dtypes else torch.float32), nbytes


def _table(before: Figures, after: Figures) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for column in ("", "before", "exported"):
        table.add_column(column, justify="left" if not column else "right")
    for name, of in (
        ("mean rank", lambda one: f"{one.mean_rank:.3g}"),
        ("ranks of modules", _rank_range),
        ("number format", lambda one: one.dtype),
        ("adapter weights, KB", lambda one: f"{one.nbytes / 1024:,.0f}"),
    ):
        table.add_row(name, of(before), of(after))
    return table


def _rank_range(figures: Figures) -> str:
    lowest, highest = figures.lowest_rank, figures.highest_rank
    return f"{lowest}" if lowest == highest else f"{lowest} to {highest}"


def _what_is_lost(found: Truncation[RankLadder], one_rank: bool) -> str:
    if found.energy_kept >= 1:
        return "This is the full rank: nothing is lost except rounding to the number format."
    measure = "importance of all directions" if found.ladder.build == "calibrated" else "squared singular values"
    kept = f"the kept directions hold {found.energy_kept:.2%} of the {measure}"
    if found.kl is not None:
        return f"Loss: a measured KL divergence from full rank of {found.kl:.4f} nats per token; {kept}."
    if one_rank:
        return f"Loss: not measured, because only the ladder's own rungs are; {kept}."
    return f"Loss: not measured; {kept}. Measure it with `chunkwise ladder measure`."
