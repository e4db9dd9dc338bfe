"""Options that several commands have, and how their values are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from chunkwise_lora.errors import ChunkWiseError

if TYPE_CHECKING:
    import torch

JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the results as JSON too.")]


class ListCommand(TyperCommand):
    """A command whose repeatable options may also be followed by all their values: `--batch 1 4`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option before each of its values, then parse as usual."""
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


def share(text: str | None) -> float | None:
    """0.5% or 0.005 as a number."""
    if text is None:
        return None
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise ChunkWiseError(f"{text}: write a share such as 0.5% or 0.005") from None


def named_paths(option: str, values: Sequence[str] | None) -> dict[str, str]:
    """Paths by name, from the values `name=path` of a repeatable option."""
    pairs = dict(value.partition("=")[::2] for value in values or [])
    if not all(pairs) or not all(pairs.values()):
        raise ChunkWiseError(f"{option}: write name=path")
    return pairs


def given(**options: Any) -> dict[str, Any]:
    """Only those options that the user gave, which are not None."""
    return {name: value for name, value in options.items() if value is not None}


def dtype_named(name: str) -> torch.dtype:
    """The dtype that `--dtype` names.

    Raises:
        ChunkWiseError: The name is none of float32, bfloat16 and float16.
    """
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ChunkWiseError(f"--dtype {name}: choose one of {', '.join(known)}")
    return known[name]


def device_named(name: str) -> torch.device:
    """The device that `--device` names.

    Raises:
        ChunkWiseError: The name is neither cpu nor, on a machine that has one, cuda.
    """
    import torch

    known = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if name not in known:
        raise ChunkWiseError(f"--device {name}: this machine has {' and '.join(known)}")
    return torch.device(name)
