"""Options that several commands share, and functions that read the values of options."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from chunkwise_lora.cli.output import STANDARD_OUTPUT, for_json_alone
from chunkwise_lora.errors import ChunkWiseError

if TYPE_CHECKING:
    import torch


def path_given(text: str) -> Path:
    """The path in the value of an option.

    Raises:
        BadParameter: The value is empty, which `Path` takes for the current folder.
    """
    if not text:
        raise typer.BadParameter("the path is empty")
    return Path(text)


def _json_file(context: typer.Context, path: Path | None) -> Path | None:
    """Refuse a folder as the file of `--json` before anything runs, and keep standard output free if it is the file."""
    if path is not None and os.path.isdir(path):
        raise ChunkWiseError(f"--json {path}: is a folder; give a file in it")
    if path == STANDARD_OUTPUT:
        context.with_resource(for_json_alone())
    return path


JsonOption = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Also write the results as JSON; - is standard output, which then holds nothing else.",
        parser=path_given,
        callback=_json_file,
    ),
]
ModelOption = Annotated[
    str,
    typer.Option(metavar="MODEL", help="Base model: a folder, a name on the hub, or smollm2, the example."),
]


class ListCommand(TyperCommand):
    """A command whose repeatable options also accept several values after one flag: `--batch 1 4`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the flag before each of its values, then parse as usual."""
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


def share(option: str, text: str | None, ambiguous: tuple[float, float] | None = None) -> float | None:
    """The value of an option that takes a share, as a number above 0 and at most 1; None if the option is not given.

    `50%`, `0.5` and `50` mean the same: a number above 1 is in percent, and 1 is 100%.

    Args:
        option: The name of the option, for the error.
        text: The value that the user gave.
        ambiguous: Lowest and highest number that is refused without a percent sign, because it may be meant in percent.

    Raises:
        ChunkWiseError: The text is no number, is not above 0% and at most 100%, or is ambiguous.
    """
    if text is None:
        return None
    digits, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        number = float(digits)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise ChunkWiseError(f"{option} {text}: write a percentage such as 50% or 0.5%")
    if ambiguous is not None and not percent and ambiguous[0] <= number <= ambiguous[1]:
        raise ChunkWiseError(f"{option} {text}: this can mean {number:g}% or {100 * number:g}%; write the percent sign")
    value = number / 100 if percent or number > 1 else number
    if not 0 < value <= 1:
        raise ChunkWiseError(f"{option} {text}: write a percentage above 0% and at most 100%")
    return value


def named_paths(option: str, values: Sequence[str] | None) -> dict[str, str]:
    """Paths by name, from the values `name=path` of a repeatable option.

    Raises:
        ChunkWiseError: A value has no name or no path, or a name cannot be shown in a table.
    """
    pairs = dict(value.partition("=")[::2] for value in values or [])
    if not all(pairs) or not all(pairs.values()):
        raise ChunkWiseError(f"{option}: write name=path")
    for name in pairs:
        if not name.isprintable() or "|" in name:
            raise ChunkWiseError(f"{option} {name}: use letters, digits, spaces, dots and dashes in the name")
    return pairs


def given(**options: Any) -> dict[str, Any]:
    """The options that are not None, which are those that the user gave."""
    return {name: value for name, value in options.items() if value is not None}


LadderDTypeOption = Annotated[
    str, typer.Option("--dtype", help="Number format of the written ladder: float32 (lossless), bfloat16 or float16.")
]


def dtype_named(name: str) -> torch.dtype:
    """The dtype that `--dtype` names.

    Raises:
        ChunkWiseError: The name is not float32, bfloat16 or float16.
    """
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ChunkWiseError(f"--dtype {name}: choose one of {', '.join(known)}")
    return known[name]


DeviceOption = Annotated[str, typer.Option(help="cpu, or cuda on a machine with a GPU.")]


def device_named(name: str) -> torch.device:
    """The device that `--device` names.

    Raises:
        ChunkWiseError: The name is neither `cpu` nor, on a machine with a CUDA GPU, `cuda`.
    """
    import torch

    known = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if name not in known:
        raise ChunkWiseError(f"--device {name}: this machine has {' and '.join(known)}")
    return torch.device(name)
