"""Reading a PEFT LoRA adapter from disk: what it holds, or why it is refused."""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from chunkwise_lora.errors import LadderError, first_line
from chunkwise_lora.files import read_text

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"

UNSUPPORTED_FIELDS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "lora_bias": "a bias on lora_B",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "layer_replication": "layer replication",
    "target_parameters": "LoRA on bare parameters (fused experts)",
    "trainable_token_indices": "trainable tokens",
}
"""Fields of `LoraConfig` whose adapters are more than s B A beside a linear module."""

PLAIN_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base weights alone; PiSSA, OLoRA, CorDA, LoftQ and others change them."""

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

LARGEST = 1e30
"""Ranks and alphas are below this, so that a scale never overflows."""


@dataclass(frozen=True)
class PeftAdapter:
    """A plain LoRA adapter."""

    factors: dict[str, tuple[Tensor, Tensor, float]]
    """Per module: lora_A (r, in), lora_B (out, r) and the scale s."""
    saved_modules: dict[str, Tensor]
    """Parameters replaced whole, by their name in the base model."""
    base_model: str | None

    @classmethod
    def load(cls, adapter: str | Path, revision: str | None = None) -> PeftAdapter:
        """Read a folder or a name on the hub.

        Raises:
            LadderError: Missing or damaged files, pickled weights, or anything but plain LoRA.
        """
        config_path, weights_path = _locate(adapter, revision)
        try:
            config = json.loads(read_text(config_path, LadderError))
            if not isinstance(config, dict):
                raise ValueError("not a JSON object")
        except (ValueError, RecursionError) as error:
            raise LadderError(f"{config_path}: not valid JSON ({error})") from None
        _refuse_unsupported(config, config_path)
        _refuse_wrong_types(config, config_path)
        try:
            tensors = load_file(weights_path)
        except (OSError, SafetensorError) as error:
            raise LadderError(f"{weights_path}: cannot be read as safetensors ({error})") from None
        for name, tensor in tensors.items():
            if tensor.dtype not in DTYPES:
                raise LadderError(
                    f"{weights_path}: {name} has dtype {tensor.dtype}; save the adapter in float32 or bfloat16"
                )
            if not torch.isfinite(tensor).all():
                raise LadderError(f"{weights_path}: {name} holds NaN or infinity; train or export the adapter anew")
        return cls(*_split(tensors, config, weights_path), config.get("base_model_name_or_path"))


def _locate(adapter: str | Path, revision: str | None) -> tuple[Path, Path]:
    folder = Path(adapter)
    if os.path.isdir(folder):  # unlike Path's, never an error
        config, weights, pickled = (folder / name for name in (CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME))
        if not config.is_file():
            raise LadderError(f"{folder}: no {CONFIG_NAME} here; give the folder of a PEFT adapter")
        if not weights.is_file():
            why = (
                f"{PICKLE_NAME} is a pickle, which can run code when loaded; save the adapter anew with "
                "save_pretrained(..., safe_serialization=True)"
                if pickled.exists()
                else f"no {WEIGHTS_NAME} here"
            )
            raise LadderError(f"{folder}: {why}")
        return config, weights
    if os.path.exists(folder):
        raise LadderError(f"{folder}: give the folder of a PEFT adapter, not a file in it")
    from transformers.utils.hub import cached_file

    try:
        config, weights = (cached_file(str(adapter), name, revision=revision) for name in (CONFIG_NAME, WEIGHTS_NAME))
    except (OSError, ValueError) as error:
        raise LadderError(f"{adapter}: no such folder, and not to be had from the hub ({first_line(error)})") from None
    return Path(str(config)), Path(str(weights))


def _refuse_unsupported(config: dict[str, Any], path: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise LadderError(f"{path}: peft_type is {kind!r}; only plain LoRA adapters can become a ladder")
    for name, what in UNSUPPORTED_FIELDS.items():
        if config.get(name):
            raise LadderError(f"{path}: {name} is set; {what} is not supported, only plain LoRA")
    if config.get("bias", "none") != "none":
        raise LadderError(f"{path}: bias = {config['bias']!r} trains biases of the base, which is not supported")
    if config.get("init_lora_weights", True) not in PLAIN_INITIALISATIONS:
        raise LadderError(
            f"{path}: init_lora_weights = {config['init_lora_weights']!r} changes the base weights; export it as plain "
            "LoRA (PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )


def _refuse_wrong_types(config: dict[str, Any], path: Path) -> None:
    for name, pattern_name, fits, what in (
        ("r", "rank_pattern", _is_rank, "whole number from 1"),
        ("lora_alpha", "alpha_pattern", _is_number, "number"),
    ):
        if not fits(config.get(name)):
            raise LadderError(f"{path}: {name} = {_short(config.get(name))} is not a {what}")
        pattern = config.get(pattern_name) or {}
        if not isinstance(pattern, dict) or not all(map(fits, pattern.values())):
            raise LadderError(f"{path}: {pattern_name} must map module names to a {what} each")
        for key in pattern:
            try:
                re.compile(key)
            except re.error as error:
                raise LadderError(
                    f"{path}: {pattern_name} has {key!r}, which is no regular expression ({error})"
                ) from None
    if not isinstance(config.get("use_rslora"), (bool, NoneType)):
        raise LadderError(f"{path}: use_rslora = {_short(config['use_rslora'])} is neither true nor false")
    if not isinstance(config.get("base_model_name_or_path"), (str, NoneType)):
        raise LadderError(
            f"{path}: base_model_name_or_path = {_short(config['base_model_name_or_path'])} is not a name"
        )
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise LadderError(f"{path}: modules_to_save = {_short(saved)} is not a list of module names")


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < LARGEST  # type: ignore[arg-type]


def _is_rank(value: object) -> bool:
    return type(value) is int and 1 <= value < LARGEST


def _short(value: object) -> str:
    return reprlib.repr(value)


def _split(
    tensors: dict[str, Tensor], config: dict[str, Any], path: Path
) -> tuple[dict[str, tuple[Tensor, Tensor, float]], dict[str, Tensor]]:
    """Sort the tensors of an adapter file into LoRA factors and replaced parameters."""
    sides: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("base_model.model.")
        if match := re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", name):
            if match[2] in sides.setdefault(match[1], {}):
                raise LadderError(f"{path}: {match[1]}.lora_{match[2]} is there twice; export the adapter anew")
            sides[match[1]][match[2]] = tensor
            continue
        if name.endswith((".base_layer.weight", ".base_layer.bias")):
            continue  # PEFT adds the base's own parameters where it adapts an output head
        module, _, parameter = name.replace(".modules_to_save", "").rpartition(".")
        if "lora_" in name or not _is_saved(module, config):
            raise LadderError(f"{path}: {key} is no part of a plain LoRA adapter on linear modules; not supported")
        saved[f"{module}.{parameter}"] = tensor
    if not sides:
        raise LadderError(f"{path}: holds no LoRA weights")
    return {name: _factors(name, pair, config, path) for name, pair in sides.items()}, saved


def _is_saved(module: str, config: dict[str, Any]) -> bool:
    """PEFT's rule for modules_to_save: a name, or the end of one, with all that the module holds."""
    names = tuple(config.get("modules_to_save") or ())
    parts = module.split(".")
    inside = any(".".join(parts[:end]).endswith(names) for end in range(1, len(parts) + 1))
    # With ensure_weight_tying, PEFT saves the module tied to a saved one as well.
    return bool(names) and (inside or bool(config.get("ensure_weight_tying")))


def _factors(name: str, pair: dict[str, Tensor], config: dict[str, Any], path: Path) -> tuple[Tensor, Tensor, float]:
    if set(pair) != {"A", "B"}:
        raise LadderError(f"{path}: {name} lacks lora_{'B' if 'A' in pair else 'A'}")
    a, b = pair["A"], pair["B"]
    if a.ndim != 2 or b.ndim != 2:
        raise LadderError(f"{path}: {name} is no linear module (lora_A has {a.ndim} dimensions); not supported")
    rank = _by_pattern(config.get("rank_pattern"), name, config["r"])
    if a.shape[0] != rank or b.shape[1] != rank:
        raise LadderError(
            f"{path}: {name} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}, "
            f"but {CONFIG_NAME} says rank {rank}"
        )
    alpha = _by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
    return a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule for rank_pattern and alpha_pattern."""
    from peft.utils.other import get_pattern_key

    patterns = patterns or {}
    return patterns.get(get_pattern_key(list(patterns), name), default)
