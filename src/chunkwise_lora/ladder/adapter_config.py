"""Checks the fields of `adapter_config.json`, a file of unknown origin, before anything is computed with them."""

from __future__ import annotations

import reprlib
from pathlib import Path
from types import NoneType
from typing import Any

from chunkwise_lora.errors import LadderError

PLAIN_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Initialisations that do not change the base weights. PiSSA, OLoRA, CorDA, LoftQ and others change them."""

LARGEST_SCALE = 1e30
"""Ranks and alphas are below this, so that a scale never overflows."""

LONGEST_BASE = 4096
"""Bound on the characters of the base model's name, which may be a path."""

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


def refuse_changed_base(config: dict[str, Any], path: Path) -> None:
    """Refuse an adapter that fits only a base model that was changed when the adapter was made.

    Raises:
        LadderError: The adapter is such a one; the message names the remedies.
    """
    if config.get("init_lora_weights", True) not in PLAIN_INITIALISATIONS:
        raise LadderError(
            f"{path}: init_lora_weights = {short(config['init_lora_weights'])} changes the base weights; export it as "
            "plain LoRA (PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < LARGEST_SCALE  # type: ignore[arg-type]


def _is_rank(value: object) -> bool:
    return type(value) is int and 1 <= value < LARGEST_SCALE


def short(value: object) -> str:
    """Return a value from a file as a short text for an error."""
    return reprlib.repr(value)
