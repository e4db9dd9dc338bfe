"""Reads ladders of format 1: `ladder.json`, `ladder-<hash>.safetensors` and, if calibrated, `chunkwise_config.json`.

Earlier releases wrote this format. Saving such a ladder writes format 2.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from chunkwise_lora.errors import ConfigError, LadderError
from chunkwise_lora.ladder.contents import Build, Contents
from chunkwise_lora.ladder.module import checked_module, checked_parameter
from chunkwise_lora.ladder.reading import parse_tensors, read_file, read_json
from chunkwise_lora.ladder.tensors import LEARNED, read_learned
from chunkwise_lora.method.config import ChunkWiseConfig

MANIFEST_NAME = "ladder.json"
POLICY_NAME = "chunkwise_config.json"
TENSORS_NAME = r"ladder-[0-9a-f]{12}\.safetensors"
SAVED = "saved_modules/"


class _BaseModel(BaseModel):
    name_or_path: str | None
    fingerprint: str


class _Manifest(BaseModel):
    """What `ladder.json` holds."""

    model_config = ConfigDict(extra="forbid", strict=False)

    format_version: int
    build: Build
    base_model: _BaseModel
    tensors: str = Field(pattern=f"^{TENSORS_NAME}$")
    sha256: str
    ranks: dict[str, tuple[int, ...]]


def is_format_1(folder: str | Path) -> bool:
    """Return whether the folder holds a ladder of format 1."""
    return os.path.lexists(os.path.join(folder, MANIFEST_NAME))


def read(folder: Path, kind: type[Contents]) -> Contents:
    """Read a ladder of format 1, as an object of the class `kind`.

    Raises:
        LadderError: A file is missing, cut off or altered.
        ConfigError: The policy is damaged.
    """
    path = folder / MANIFEST_NAME
    manifest = _read_manifest(path)
    if manifest.format_version != 1:
        raise LadderError(
            f"{path}: format_version is {manifest.format_version}, but a {MANIFEST_NAME} has format 1; build the "
            "ladder again"
        )
    tensors_path = folder / manifest.tensors
    content = read_file(tensors_path)
    if hashlib.sha256(content).hexdigest() != manifest.sha256:
        raise LadderError(
            f"{tensors_path}: was cut off or altered (its SHA-256 is not the one in {MANIFEST_NAME}); build the "
            "ladder again"
        )
    tensors = parse_tensors(content, tensors_path)
    try:
        modules = {
            name: checked_module(
                name, tensors.pop(f"{name}/up"), tensors.pop(f"{name}/down"), tensors.pop(f"{name}/sigma"), ranks
            )
            for name, ranks in manifest.ranks.items()
        }
        saved = {
            name.removeprefix(SAVED): checked_parameter(name, tensor)
            for name, tensor in tensors.items()
            if name.startswith(SAVED)
        }
        if unknown := [name for name in tensors if not name.startswith((SAVED, LEARNED))]:
            raise LadderError(f"{unknown[0]} is not a tensor of a ladder")
        policy = read_policy(folder)
        base = manifest.base_model
        ladder = kind(modules, base.name_or_path, manifest.build, saved, read_learned(tensors), policy)
    except KeyError as error:
        raise LadderError(f"{tensors_path}: lacks the tensor {error}; build the ladder again") from None
    except LadderError as error:
        raise LadderError(f"{folder}: {MANIFEST_NAME} and {tensors_path.name} do not fit together ({error})") from None
    if ladder.fingerprint != base.fingerprint:
        raise LadderError(f"{path}: base_model.fingerprint is not that of the tensors; build the ladder again")
    return ladder


def read_policy(folder: str | Path) -> ChunkWiseConfig | None:
    """Return the policy in `chunkwise_config.json`, or None if there is no such file.

    Raises:
        LadderError: The file cannot be read.
        ConfigError: It does not hold a policy.
    """
    path = Path(folder) / POLICY_NAME
    if not os.path.lexists(path):
        return None
    return parse_policy(read_json(path), str(path))


def parse_policy(values: dict[str, Any], where: str) -> ChunkWiseConfig:
    """Return the policy in parsed JSON. `where` names file and field in errors.

    Raises:
        ConfigError: A value is impossible, or a name is unknown.
    """
    try:
        return ChunkWiseConfig.model_validate(values)
    except (ConfigError, ValidationError) as error:
        raise ConfigError(f"{where}: {error}") from None


def owned_files(folder: Path) -> list[str]:
    """Return the names of the files of a ladder of format 1, in the order in which they may be removed.

    The manifest comes last, because it names the file of the tensors.
    """
    try:
        return [_read_manifest(folder / MANIFEST_NAME).tensors, POLICY_NAME, MANIFEST_NAME]
    except LadderError:
        return [POLICY_NAME]


def _read_manifest(path: Path) -> _Manifest:
    content = read_json(path)
    try:
        return _Manifest.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "file"
        raise LadderError(f"{path}: {where}: {problem['msg']}; build the ladder again") from None
