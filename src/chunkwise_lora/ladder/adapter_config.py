"""Checks the fields of `adapter_config.json`, a file of unknown origin, before anything is computed with them."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from torch import Tensor

from chunkwise_lora.errors import LadderError

PLAIN_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Initialisations that do not change the base weights. PiSSA, OLoRA, CorDA, LoftQ and others change them."""

BASE_CHANGES = {
    "kasa_config": "KaSA changes the weights of the base model",
    "layer_replication": "layer replication adds layers to the base model",
    "arrow_config": "Arrow routing needs other adapters on the base model",
    "megatron_config": "Megatron's layers come from a package that the file names",
}
"""Fields with which PEFT does more than to add modules to the base model, and what."""

LARGEST_SCALE = 1e30
"""Ranks and alphas are below this, so that a scale never overflows."""

LONGEST_BASE = 4096
"""Bound on the characters of the base model's name, which may be a path."""

LARGEST_SPARE_RANK = 1024
"""Up to this rank, `r` may be above all ranks of the tensors: `rank_pattern` may give every module its own."""

MOST_SAVED = 1000
"""Bound on the entries of `modules_to_save`."""


def check_config(config: dict[str, Any], path: Path) -> None:
    """Check that the config is that of a LoRA adapter, and that the fields used here have the right types.

    Raises:
        LadderError: It is not; the message names file and field.
    """
    if config.get("peft_type") != "LORA":
        raise LadderError(f"{path}: peft_type is {short(config.get('peft_type'))}; only LoRA adapters are supported")
    for name, pattern_name, fits, what in (
        ("r", "rank_pattern", _is_rank, "whole number from 1"),
        ("lora_alpha", "alpha_pattern", _is_number, "number"),
    ):
        if not fits(config.get(name)):
            raise LadderError(f"{path}: {name} = {short(config.get(name))} is not a {what}; correct it")
        pattern = config.get(pattern_name) or {}
        if not isinstance(pattern, dict) or not all(map(fits, pattern.values())):
            raise LadderError(f"{path}: {pattern_name} must map module names to a {what} each; correct it")
    if not isinstance(config.get("use_rslora"), (bool, NoneType)):
        raise LadderError(f"{path}: use_rslora = {short(config['use_rslora'])} is neither true nor false; correct it")
    base = config.get("base_model_name_or_path")
    if not isinstance(base, (str, NoneType)) or len(base or "") > LONGEST_BASE:
        raise LadderError(
            f"{path}: base_model_name_or_path = {short(base)} is not a name of at most {LONGEST_BASE} characters; "
            "write the base model's name or null"
        )
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or len(saved) > MOST_SAVED or not all(isinstance(name, str) for name in saved):
        raise LadderError(
            f"{path}: modules_to_save = {short(saved)} is not a list of at most {MOST_SAVED} module names; correct it"
        )


def refuse_changed_base(config: Mapping[str, Any], where: str) -> None:
    """Refuse an adapter for which PEFT changes the base model. `where` names the config in errors.

    Raises:
        LadderError: The adapter is such a one; the message names the remedies.
    """
    whole = "load it with peft.PeftModel.from_pretrained, and give that model to ChunkWiseModel"
    if config.get("init_lora_weights", True) not in PLAIN_INITIALISATIONS:
        raise LadderError(
            f"{where}: init_lora_weights = {short(config['init_lora_weights'])} changes the base weights; {whole}, or "
            "save it as plain LoRA (save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )
    for name, why in BASE_CHANGES.items():
        if config.get(name):
            raise LadderError(f"{where}: {name} is set, and {why}; {whole}")


def check_sizes(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> None:
    """Check that PEFT, which first makes the modules and then fills them, makes none that no tensor of the file fills.

    Raises:
        LadderError: A rank or a list of tokens is far longer than the tensors. `where` names the config in errors.
    """
    rows = {name: len(tensor) for name, tensor in tensors.items() if tensor.ndim}
    most = max(LARGEST_SPARE_RANK, *(count for name, count in rows.items() if ".lora_" in name))
    rank = max(config["r"], *(config.get("rank_pattern") or {}).values(), 0)
    if rank > most:
        raise LadderError(f"{where}: the rank {rank} is not that of any tensor of the adapter; correct it")
    tokens = config.get("trainable_token_indices") or []
    trained = max((count for name, count in rows.items() if name.endswith("trainable_tokens_delta")), default=0)
    for indices in tokens.values() if isinstance(tokens, dict) else [tokens]:
        if not isinstance(indices, list) or len(indices) > trained:
            raise LadderError(
                f"{where}: trainable_token_indices does not name the {trained} tokens of the adapter; correct it"
            )


def is_replaced(module: str, config: Mapping[str, Any]) -> bool:
    """Whether modules_to_save names the module, the end of its name, or a module that contains it (PEFT's rule)."""
    names = config.get("modules_to_save") or ()
    # With ensure_weight_tying, PEFT saves the module tied to a saved one as well.
    return any(f"{name}." in f"{module}." for name in names) or bool(names and config.get("ensure_weight_tying"))


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < LARGEST_SCALE  # type: ignore[arg-type]


def _is_rank(value: object) -> bool:
    return type(value) is int and 1 <= value < LARGEST_SCALE


def short(value: object) -> str:
    """Return a value from a file as a short text for an error."""
    return reprlib.repr(value)
