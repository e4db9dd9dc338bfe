"""Reads and writes ladders of format 2: a PEFT adapter folder with `chunkwise.json` next to the adapter's files.

| file | content |
|---|---|
| `adapter_config.json`, `adapter_model.safetensors` | the ladder at full rank, as PEFT stores an adapter |
| `chunkwise.json` | format version, SHA-256 of the other files, build, base model, ranks, policy and what it costs |
| `chunkwise.safetensors` | only if there is something learned: importance of the directions, complexity of tokens |

`chunkwise.safetensors` holds `sigma/<module>` only if the importance of directions is not their length: after
calibration and for data-aware builds. Otherwise sigma is computed from the factors when a ladder is read;
for factors in bfloat16 or float16 it may then differ by their rounding.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from chunkwise_lora.errors import LadderError
from chunkwise_lora.ladder import format_v1
from chunkwise_lora.ladder.contents import Build, Contents, Expectation, LadderContents
from chunkwise_lora.ladder.module import LadderModule, checked_module, checked_parameter, direction_lengths
from chunkwise_lora.ladder.peft_files import CONFIG_NAME, MEANING, PREFIX, WEIGHTS_NAME, peft_config, peft_files
from chunkwise_lora.ladder.reading import LARGEST_JSON, parse_json, parse_tensors, read_file
from chunkwise_lora.ladder.tensors import LEARNED, learned_tensors, read_learned, to_bytes
from chunkwise_lora.ladder.whole_folder import read_folder, write_folder

LADDER_NAME = "chunkwise.json"
LEARNED_NAME = "chunkwise.safetensors"
FORMAT_VERSION = 2
SIGMA = "sigma/"


class _BaseModel(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name_or_path: str | None
    fingerprint: str


class _Manifest(BaseModel):
    """What `chunkwise.json` holds."""

    model_config = ConfigDict(extra="forbid")

    format_version: Literal[2]
    build: Build
    base_model: _BaseModel
    files: dict[str, str]
    ranks: dict[str, list[int]] = Field(min_length=1)
    rung_divergence: list[float] | None
    expectation: Expectation | None = None
    policy: dict[str, Any] | None


def is_format_2(folder: str | Path) -> bool:
    """Return whether the folder holds a ladder of format 2."""
    return os.path.lexists(os.path.join(folder, LADDER_NAME))


def is_ladder(folder: str | Path) -> bool:
    """Return whether a ladder, of format 1 or 2, was saved in the folder."""
    if not str(folder):
        return False  # an empty path must not mean the current folder
    return is_format_2(folder) or format_v1.is_format_1(folder)


def ladder_files(ladder: LadderContents) -> dict[str, bytes]:
    """Return the content of a ladder's files by file name. The weights come last.

    Raises:
        LadderError: The name of the base model cannot be written as UTF-8.
    """
    files: dict[str, bytes] = {}
    extra = {} if _sigma_is_length(ladder) else {f"{SIGMA}{name}": m.sigma for name, m in ladder.modules.items()}
    if ladder.learned is not None:
        extra |= learned_tensors(ladder.learned)
    if extra:
        files[LEARNED_NAME] = to_bytes(extra)
    files |= peft_files(ladder)
    manifest = {
        "format_version": FORMAT_VERSION,
        "build": ladder.build,
        "base_model": {"name_or_path": ladder.base_model, "fingerprint": ladder.fingerprint},
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        "ranks": {name: list(module.ranks) for name, module in ladder.modules.items()},
        "rung_divergence": None if ladder.rung_divergence is None else list(ladder.rung_divergence),
        "expectation": None if ladder.expectation is None else ladder.expectation.model_dump(),
        "policy": None if ladder.policy is None else ladder.policy.model_dump(mode="json"),
    }
    return {LADDER_NAME: (_dump(manifest) + "\n").encode(), **files}


def _dump(manifest: dict[str, Any]) -> str:
    """Return JSON with one line per field, and one line per module."""
    lines = []
    for key, value in manifest.items():
        if key == "ranks":
            rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(ranks)}" for name, ranks in value.items())
            lines.append(f'  "ranks": {{\n{rows}\n  }}')
        else:
            lines.append(f"  {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}"


def _sigma_is_length(ladder: LadderContents) -> bool:
    """Whether every sigma can be computed from the factors, up to the rounding of their dtype."""
    return all(
        torch.allclose(
            direction_lengths(module.up, module.down), module.sigma, rtol=4 * torch.finfo(module.up.dtype).eps, atol=0
        )
        for module in ladder.modules.values()
    )


def owned_files(folder: Path) -> list[str]:
    """Return the names of the files of a ladder, of either format, or of a PEFT adapter in a folder.

    A new ladder replaces these files and no others. They may be removed in this order: without the first ones, the
    others are refused when they are read.
    """
    return [WEIGHTS_NAME, *format_v1.owned_files(folder), LEARNED_NAME, CONFIG_NAME, LADDER_NAME]


def read(folder: Path, kind: type[Contents]) -> Contents:
    """Read a ladder of format 2, as an object of the class `kind`.

    All files are read into memory and checked against the SHA-256 in the manifest before they are used.

    Raises:
        LadderError: A file is missing, cut off, altered, or does not belong to a ladder.
        ConfigError: The policy is damaged.
    """
    manifest, files = read_folder(folder, lambda: _read_files(folder), self_checking=True)
    path = folder / LADDER_NAME
    tensors = parse_tensors(files[WEIGHTS_NAME], folder / WEIGHTS_NAME)
    extra = parse_tensors(files[LEARNED_NAME], folder / LEARNED_NAME) if LEARNED_NAME in files else {}
    if unknown := [name for name in extra if not name.startswith((SIGMA, LEARNED))]:
        raise LadderError(
            f"{folder / LEARNED_NAME}: {unknown[0]!r} is not a tensor of a ladder; build the ladder again"
        )
    try:
        modules = {name: _module(name, ranks, tensors, extra) for name, ranks in manifest.ranks.items()}
        if unknown := [name for name in tensors if not name.startswith(PREFIX) or "lora_" in name]:
            raise LadderError(f"{WEIGHTS_NAME} holds {unknown[0]!r}, which belongs to no module of {LADDER_NAME}")
        saved = {name.removeprefix(PREFIX): checked_parameter(name, tensor) for name, tensor in tensors.items()}
        ladder = kind(
            modules,
            manifest.base_model.name_or_path,
            manifest.build,
            saved,
            read_learned(extra),
            None if manifest.policy is None else format_v1.parse_policy(manifest.policy, f"{path}: policy"),
            None if manifest.rung_divergence is None else tuple(manifest.rung_divergence),
            manifest.expectation,
        )
    except LadderError as error:
        raise LadderError(f"{path}: does not fit the other files ({error}); build the ladder again") from None
    if ladder.fingerprint != manifest.base_model.fingerprint:
        raise LadderError(f"{path}: base_model.fingerprint is not that of the tensors; build the ladder again")
    _check_config(files[CONFIG_NAME], ladder, folder / CONFIG_NAME)
    return ladder


def _read_files(folder: Path) -> tuple[_Manifest, dict[str, bytes]]:
    """Return the manifest, and the content of the files that it names, after a check of their SHA-256."""
    path = folder / LADDER_NAME
    manifest = _read_manifest(read_file(path, LARGEST_JSON), path)
    needed = {CONFIG_NAME, WEIGHTS_NAME}
    if not needed <= manifest.files.keys() <= needed | {LEARNED_NAME}:
        raise LadderError(
            f"{path}: files must name {CONFIG_NAME}, {WEIGHTS_NAME} and, if at all, {LEARNED_NAME}, and nothing else; "
            "build the ladder again"
        )
    return manifest, {name: _read_file(folder / name, digest) for name, digest in manifest.files.items()}


def _module(name: str, ranks: list[int], tensors: dict[str, Tensor], extra: Mapping[str, Tensor]) -> LadderModule:
    """Take the factors of one module out of `tensors`, and return the module."""
    try:
        down, up = (tensors.pop(f"{PREFIX}{name}.lora_{side}.weight") for side in "AB")
    except KeyError as error:
        raise LadderError(f"{WEIGHTS_NAME} lacks {error}") from None
    return checked_module(name, up, down, extra.get(f"{SIGMA}{name}"), ranks)


def _check_config(content: bytes, ladder: LadderContents, path: Path) -> None:
    """Refuse an `adapter_config.json` by which PEFT would compute another function than the ladder at full rank."""
    found, expected = parse_json(content, path), peft_config(ladder)
    if differing := [name for name in MEANING if found.get(name) != expected[name]]:
        raise LadderError(
            f"{path}: {', '.join(differing)} do not fit the ladder in {LADDER_NAME}; build the ladder again"
        )


def _read_file(path: Path, digest: str) -> bytes:
    content = read_file(path)
    if hashlib.sha256(content).hexdigest() != digest:
        raise LadderError(
            f"{path}: was cut off or altered (its SHA-256 is not the one in {LADDER_NAME}); build the ladder again, or "
            f"remove {LADDER_NAME} to use the folder as a plain PEFT adapter"
        )
    return content


def _read_manifest(content: bytes, path: Path) -> _Manifest:
    try:
        return _Manifest.model_validate(parse_json(content, path), strict=True)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "file"
        if where == "format_version" and "input" in problem:
            raise LadderError(
                f"{path}: format_version is {problem['input']!r}, this release reads {FORMAT_VERSION}; build the "
                "ladder again, or use the release that wrote it"
            ) from None
        raise LadderError(f"{path}: {where}: {problem['msg']}; build the ladder again") from None


def write(ladder: LadderContents, folder: Path) -> None:
    """Write a ladder to `folder`, all files in one step; see `whole_folder`.

    Raises:
        LadderError: The folder cannot be written.
    """
    _write(folder, ladder_files(ladder))


def write_adapter(ladder: LadderContents, folder: Path) -> None:
    """Write a ladder at full rank to `folder`, as a plain PEFT adapter, all files in one step.

    Raises:
        LadderError: The folder cannot be written.
    """
    _write(folder, peft_files(ladder))


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    try:
        write_folder(folder, files, owned_files)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise LadderError(f"{folder}: cannot be written ({error})") from None
