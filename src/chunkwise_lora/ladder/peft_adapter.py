"""Reads PEFT LoRA adapters from a folder or the hub, and refuses what is not plain LoRA."""

from __future__ import annotations

import math
import os
import re
import reprlib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from chunkwise_lora.errors import LadderError, first_line, shown
from chunkwise_lora.ladder.checks import check_factors, check_name, check_tensor
from chunkwise_lora.ladder.folder import is_ladder
from chunkwise_lora.ladder.patterns import ModulePatterns
from chunkwise_lora.ladder.peft_files import CONFIG_NAME, PREFIX, WEIGHTS_NAME
from chunkwise_lora.ladder.reading import LARGEST_JSON, parse_json, parse_tensors, read_file
from chunkwise_lora.ladder.whole_folder import read_folder

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
"""Fields of `LoraConfig` with which an adapter is more than the product s B A of a linear module, and their names."""

PLAIN_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Initialisations that do not change the base weights. PiSSA, OLoRA, CorDA, LoftQ and others change them."""

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

LARGEST_SCALE = 1e30
"""Ranks and alphas are below this, so that a scale never overflows."""

LONGEST_BASE = 4096
"""Bound on the characters of the base model's name, which may be a path."""

MOST_SAVED = 1000
"""Bound on the entries of `modules_to_save`."""

WRAPPERS = re.compile(
    r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|^module\.(?=base_model\.)"
)
"""Matches what torch.compile, FSDP, activation checkpointing and DDP add to the names of parameters."""


@dataclass(frozen=True)
class PeftAdapter:
    """A plain LoRA adapter."""

    factors: dict[str, tuple[Tensor, Tensor, float]]
    """Per module: lora_A (r, in), lora_B (out, r) and the scale s."""
    saved_modules: dict[str, Tensor]
    """Parameters that the adapter replaces (PEFT's `modules_to_save`), by their name in the base model."""
    base_model: str | None
    """Name or path of the base model, as the adapter states it."""
    of_ladder: bool = False
    """Whether the folder holds a ladder, whose weights at full rank these are."""

    @classmethod
    def load(cls, adapter: str | Path, revision: str | None = None) -> PeftAdapter:
        """Read an adapter from a folder, or by its name on the hub.

        Raises:
            LadderError: A file is missing or damaged, the weights are pickled, or the adapter is not plain LoRA.
        """
        (raw_config, config_path, raw_weights, weights_path), of_ladder = read_folder(
            Path(adapter), lambda: (_read_files(adapter, revision), is_ladder(adapter)), self_checking=False
        )
        config = parse_json(raw_config, config_path)
        _refuse_unsupported(config, config_path)
        _refuse_wrong_types(config, config_path)
        ranks, alphas = (
            ModulePatterns(config.get(name), f"{config_path}: {name}") for name in ("rank_pattern", "alpha_pattern")
        )
        tensors = parse_tensors(raw_weights, weights_path)
        for name, tensor in tensors.items():
            check_name(f"{weights_path}", name)
            check_tensor(f"{weights_path}: {name}", tensor, dtypes=DTYPES)
        sides, saved = _split(tensors, config, weights_path)
        factors = {}
        for name, pair in sides.items():
            rank, alpha = ranks.get(name, config["r"]), alphas.get(name, config["lora_alpha"])
            scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            factors[name] = (*_factors(f"{weights_path}: {name}", pair, rank, scale), scale)
        return cls(factors, saved, config.get("base_model_name_or_path"), of_ladder)


def _read_files(adapter: str | Path, revision: str | None) -> tuple[bytes, Path, bytes, Path]:
    config, weights = _locate(adapter, revision)
    return read_file(config, LARGEST_JSON), config, read_file(weights), weights


def _locate(adapter: str | Path, revision: str | None) -> tuple[Path, Path]:
    if not str(adapter):
        raise LadderError("the adapter's path is empty; give the folder of a PEFT adapter, or a name on the hub")
    folder = Path(adapter)
    if os.path.isdir(folder):  # Path.is_dir can raise
        config, weights, pickled = (folder / name for name in (CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME))
        if _is_missing(config):
            inside = sorted(shown(path.parent.name) for path in islice(folder.glob(f"*/{CONFIG_NAME}"), 5))
            where = f"; its folders {', '.join(inside)} hold adapters, give one of these" if inside else ""
            raise LadderError(f"{folder}: no {CONFIG_NAME} here{where or '; give the folder of a PEFT adapter'}")
        if _is_missing(weights):
            why = (
                f"{PICKLE_NAME} is a pickle, which can run code when loaded; save the adapter again with "
                "save_pretrained(..., safe_serialization=True)"
                if pickled.exists()
                else f"no {WEIGHTS_NAME} here; save the adapter again"
            )
            raise LadderError(f"{folder}: {why}")
        return config, weights
    if os.path.lexists(folder):
        raise LadderError(f"{folder}: is not a folder that can be opened; give the folder of a PEFT adapter")
    from transformers.utils.hub import cached_file

    try:
        config, weights = (cached_file(str(adapter), name, revision=revision) for name in (CONFIG_NAME, WEIGHTS_NAME))
    except (OSError, ValueError) as error:
        raise LadderError(
            f"{shown(adapter)}: there is no such folder, and the hub does not have it ({shown(first_line(error))})"
        ) from None
    return Path(str(config)), Path(str(weights))


def _is_missing(path: Path) -> bool:
    """Whether nothing exists at `path`. A file that exists but cannot be read is refused when it is read."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def _refuse_unsupported(config: dict[str, Any], path: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise LadderError(f"{path}: peft_type is {_short(kind)}; only plain LoRA adapters can become a ladder")
    for name, what in UNSUPPORTED_FIELDS.items():
        if config.get(name):
            raise LadderError(f"{path}: {name} is set; {what} is not supported, only plain LoRA")
    if config.get("bias", "none") != "none":
        raise LadderError(f"{path}: bias = {_short(config['bias'])} trains biases of the base, which is not supported")
    if config.get("init_lora_weights", True) not in PLAIN_INITIALISATIONS:
        raise LadderError(
            f"{path}: init_lora_weights = {_short(config['init_lora_weights'])} changes the base weights; export it as "
            "plain LoRA (PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )


def _refuse_wrong_types(config: dict[str, Any], path: Path) -> None:
    for name, pattern_name, fits, what in (
        ("r", "rank_pattern", _is_rank, "whole number from 1"),
        ("lora_alpha", "alpha_pattern", _is_number, "number"),
    ):
        if not fits(config.get(name)):
            raise LadderError(f"{path}: {name} = {_short(config.get(name))} is not a {what}; correct it")
        pattern = config.get(pattern_name) or {}
        if not isinstance(pattern, dict) or not all(map(fits, pattern.values())):
            raise LadderError(f"{path}: {pattern_name} must map module names to a {what} each; correct it")
    if not isinstance(config.get("use_rslora"), (bool, NoneType)):
        raise LadderError(f"{path}: use_rslora = {_short(config['use_rslora'])} is neither true nor false; correct it")
    base = config.get("base_model_name_or_path")
    if not isinstance(base, (str, NoneType)) or len(base or "") > LONGEST_BASE:
        raise LadderError(
            f"{path}: base_model_name_or_path = {_short(base)} is not a name of at most {LONGEST_BASE} characters; "
            "write the base model's name or null"
        )
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or len(saved) > MOST_SAVED or not all(isinstance(name, str) for name in saved):
        raise LadderError(
            f"{path}: modules_to_save = {_short(saved)} is not a list of at most {MOST_SAVED} module names; correct it"
        )


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < LARGEST_SCALE  # type: ignore[arg-type]


def _is_rank(value: object) -> bool:
    return type(value) is int and 1 <= value < LARGEST_SCALE


def _short(value: object) -> str:
    return reprlib.repr(value)


def _split(
    tensors: dict[str, Tensor], config: dict[str, Any], path: Path
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Split the tensors of an adapter file into the LoRA factors "A" and "B" of each module and replaced parameters."""
    sides: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = WRAPPERS.sub("", key).removeprefix(PREFIX)
        # Some tools keep the adapter's name after lora_A.
        if match := re.fullmatch(r"(.+)\.lora_([AB])(?:\.[^.]+)?\.weight", name):
            if match[2] in sides.setdefault(match[1], {}):
                raise LadderError(
                    f"{path}: {match[1]}.lora_{match[2]} appears twice; export only one adapter into the file"
                )
            sides[match[1]][match[2]] = tensor
            continue
        if name.endswith((".base_layer.weight", ".base_layer.bias")):
            continue  # PEFT adds the base's own parameters where it adapts an output head
        module, _, parameter = name.replace(".modules_to_save", "").rpartition(".")
        if "lora_" in name or not module or not _is_saved(module, config):
            raise LadderError(f"{path}: {key} is not part of a plain LoRA adapter on linear modules; not supported")
        if f"{module}.{parameter}" in saved:
            raise LadderError(f"{path}: {module}.{parameter} appears twice; export only one adapter into the file")
        saved[f"{module}.{parameter}"] = _single(f"{path}: {key}", tensor)
    if not sides:
        raise LadderError(f"{path}: holds no LoRA weights; give the file that save_pretrained of a PEFT model writes")
    return sides, saved


def _single(where: str, tensor: Tensor) -> Tensor:
    """Convert float64 to float32, the widest dtype that a ladder stores."""
    if tensor.dtype == torch.float64:
        tensor = tensor.float()
        check_tensor(f"{where}, in float32,", tensor)
    return tensor


def _is_saved(module: str, config: dict[str, Any]) -> bool:
    """Whether modules_to_save names the module, the end of its name, or a module that contains it (PEFT's rule)."""
    names = config.get("modules_to_save") or ()
    # With ensure_weight_tying, PEFT saves the module tied to a saved one as well.
    return any(f"{name}." in f"{module}." for name in names) or bool(names and config.get("ensure_weight_tying"))


def _factors(where: str, pair: dict[str, Tensor], rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Check lora_A and lora_B of one module and return them."""
    if set(pair) != {"A", "B"}:
        raise LadderError(f"{where} lacks lora_{'B' if 'A' in pair else 'A'}; export the adapter again")
    a, b = pair["A"], pair["B"]
    if a.ndim != 2 or b.ndim != 2:
        raise LadderError(f"{where} is not a linear module (lora_A has {a.ndim} dimensions); not supported")
    if a.shape[0] != rank or b.shape[1] != rank:
        raise LadderError(
            f"{where} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}, but {CONFIG_NAME} says rank {rank}; "
            "correct r or rank_pattern there, or export the adapter again"
        )
    check_factors(where, b, a, scale)
    return a, b
