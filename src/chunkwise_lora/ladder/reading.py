"""Reads files of unknown origin: only regular files, of bounded size, into memory. Every error names the file.

Tensors are not memory-mapped: if a mapped file is truncated later, the process that reads it is killed (SIGBUS).
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as tensors_from
from torch import Tensor

from chunkwise_lora.errors import LadderError, shown

LARGEST_JSON = 16 * 2**20
"""Bound on the bytes of a JSON file. A ladder of 10,000 modules and 64 rungs needs 3 MB; parsing 16 MB takes at
most about a gigabyte."""


def read_file(path: Path, limit: int | None = None) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    Raises:
        LadderError: The file cannot be read, is too long, or is a folder, pipe or device (which might never end).
    """
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise LadderError(f"{path}: is not a regular file; give a folder that holds the file itself")
            content = file.read() if limit is None else file.read(limit + 1)
    except OSError as error:
        raise LadderError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:  # a NUL in the path
        raise LadderError(f"{path}: cannot be read ({error})") from None
    if limit is not None and len(content) > limit:
        raise LadderError(f"{path}: has more than {limit:,} bytes; a file of this kind is much shorter")
    return content


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # without it, opening a pipe waits for a writer


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; see `parse_json`.

    Raises:
        LadderError: The file cannot be read or holds anything else.
    """
    return parse_json(read_file(path, LARGEST_JSON), path)


def parse_json(raw: bytes, path: Path) -> dict[str, Any]:
    """Parse what was read from `path`: a JSON object in UTF-8, without repeated keys, NaN, infinity or lone surrogates.

    Raises:
        LadderError: The content is something else.
    """
    try:
        content = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_distinct)
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except (ValueError, RecursionError) as error:
        raise LadderError(f"{path}: not valid JSON ({shown(error)}); save it again") from None
    _check_scalars(path, content)
    return content


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"'{counts.most_common(1)[0][0]}' appears twice")
    return content


def _check_scalars(path: Path, content: dict[str, Any]) -> None:
    """Refuse strings that are not valid Unicode and numbers that are not finite, in the whole tree."""
    stack: list[tuple[str, Any]] = list(content.items())
    for name in content:
        _check_string(path, name, name)
    while stack:
        name, value = stack.pop()
        if isinstance(value, str):
            _check_string(path, name, value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise LadderError(f"{path}: {shown(name)} holds {value}, which is not a number; correct it")
        elif isinstance(value, dict):
            for key, item in value.items():
                _check_string(path, name, key)
                stack.append((name, item))
        elif isinstance(value, list):
            stack.extend((name, item) for item in value)


def _check_string(path: Path, name: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise LadderError(
            f"{path}: {shown(name)} holds '{shown(value)}', which is not valid Unicode; correct it"
        ) from None


def parse_tensors(content: bytes, path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file that was read from `path`, by name.

    Raises:
        LadderError: The content is not a complete safetensors file, or has a dtype that PyTorch does not have.
    """
    try:
        return dict(sorted(tensors_from(content).items()))
    except SafetensorError as error:
        raise LadderError(f"{path}: cannot be read as safetensors ({shown(error)}); save it again") from None
    except (KeyError, ValueError, RuntimeError, AssertionError, OverflowError, MemoryError) as error:
        raise LadderError(
            f"{path}: holds a tensor that PyTorch cannot hold ({type(error).__name__}: {shown(error)}); "
            "save it in float32 or bfloat16"
        ) from None
