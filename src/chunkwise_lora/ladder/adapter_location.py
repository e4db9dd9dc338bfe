"""Finds the files of an adapter in a folder, or in the only folder inside it that holds an adapter."""

from __future__ import annotations

import os
import re
from itertools import islice
from pathlib import Path

from chunkwise_lora.errors import LadderError, shown
from chunkwise_lora.ladder.folder import is_ladder
from chunkwise_lora.ladder.peft_files import CONFIG_NAME, WEIGHTS_NAME
from chunkwise_lora.ladder.whole_folder import read_folder

PICKLE_NAME = "adapter_model.bin"

MLX_WEIGHTS_NAME = "adapters.safetensors"
"""The file in which mlx-lm stores an adapter."""

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
"""Matches names of repositories on the hub, owner/name. Anything else can only be a folder."""

MOST_NAMED = 5
"""Bound on the folders that an error lists."""


def find_folder(adapter: str | Path, subfolder: str | None = None) -> Path | None:
    """Return the folder that holds the adapter or the ladder, or None if only the hub can have it.

    If `adapter` is a folder without an adapter, and exactly one of the folders in it holds one, it is that folder.

    Raises:
        LadderError: There is no such folder, or it holds no adapter, or several.
    """
    if not str(adapter):
        raise LadderError("the adapter's path is empty; give the folder of a PEFT adapter, or a name on the hub")
    folder = Path(adapter) / (subfolder or "")
    if os.path.isdir(folder):  # Path.is_dir can raise
        return read_folder(folder, lambda: _folder_within(folder), self_checking=False)
    if os.path.isdir(adapter):
        raise LadderError(f"{folder}: there is no such folder; give a subfolder of {adapter}")
    if os.path.lexists(adapter):
        raise LadderError(f"{adapter}: is not a folder that can be opened; give the folder of a PEFT adapter")
    if not HUB_NAME.fullmatch(str(adapter)):
        raise LadderError(
            f"{shown(adapter)}: there is no such folder; give the folder of a PEFT adapter, or owner/name on the hub"
        )
    return None


def _folder_within(folder: Path) -> Path:
    """Return the folder itself if it holds an adapter, or else the only folder in it that does."""
    if is_ladder(folder) or not _is_missing(folder / CONFIG_NAME):
        return folder
    holders = (path.parent for path in folder.glob(f"*/{CONFIG_NAME}") if not path.parent.name.startswith("."))
    inside = sorted(islice(holders, MOST_NAMED))
    if len(inside) == 1:
        return inside[0]
    if inside:
        names = ", ".join(shown(path.name) for path in inside)
        raise LadderError(f"{folder}: no {CONFIG_NAME} here; its folders {names} hold adapters, give one of these")
    raise LadderError(f"{folder}: no {CONFIG_NAME} here; give the folder of a PEFT adapter")


def files_in(folder: Path) -> tuple[Path, Path]:
    """Return the paths of the config and of the weights in the folder of an adapter.

    Raises:
        LadderError: The folder has no weights, or only pickled ones.
    """
    config, mlx = folder / CONFIG_NAME, folder / MLX_WEIGHTS_NAME
    if _is_missing(config):
        raise LadderError(f"{folder}: no {CONFIG_NAME} here; give the folder of a PEFT adapter")
    if not _is_missing(folder / WEIGHTS_NAME):
        return config, folder / WEIGHTS_NAME
    if not _is_missing(mlx):
        return config, mlx
    if not _is_missing(folder / PICKLE_NAME):
        raise LadderError(
            f"{folder}: {PICKLE_NAME} is a pickle, which can run code when loaded; save the adapter again with "
            "save_pretrained(..., safe_serialization=True)"
        )
    raise LadderError(f"{folder}: no {WEIGHTS_NAME} here; save the adapter again")


def _is_missing(path: Path) -> bool:
    """Whether nothing exists at `path`. A file that exists but cannot be read is refused when it is read."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False
