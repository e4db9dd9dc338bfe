"""Plain LoRA: the factors of an adapter that is nothing but products s B A of linear modules."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chunkwise_lora.errors import LadderError
from chunkwise_lora.ladder.adapter_config import is_replaced, refuse_changed_base, short
from chunkwise_lora.ladder.adapter_files import AdapterFiles
from chunkwise_lora.ladder.checks import check_factors, check_tensor
from chunkwise_lora.ladder.patterns import ModulePatterns
from chunkwise_lora.ladder.peft_files import CONFIG_NAME, PREFIX

UNSUPPORTED_FIELDS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "lora_bias": "a bias on lora_B",
    "alora_invocation_tokens": "activated LoRA",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "LoRA on bare parameters (fused experts)",
    "trainable_token_indices": "trainable tokens",
}
"""Fields of `LoraConfig` with which an adapter is more than the product s B A of a linear module, and their names."""

REMEDY = "a ladder holds plain LoRA only; give the adapter itself to ChunkWiseModel, which runs the rest at full rank"


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
    def load(cls, adapter: str | Path, revision: str | None = None, subfolder: str | None = None) -> PeftAdapter:
        """Read an adapter from a folder, or by its name on the hub.

        Raises:
            LadderError: A file is missing or damaged, the weights are pickled, or the adapter is not plain LoRA.
        """
        return cls.of(AdapterFiles.load(adapter, revision, subfolder))

    @classmethod
    def of(cls, files: AdapterFiles) -> PeftAdapter:
        """Take the factors out of an adapter's files.

        Raises:
            LadderError: The adapter is not plain LoRA.
        """
        config, path = files.config, files.weights_path
        _refuse_other_kinds(config, files.config_path)
        ranks, alphas = (
            ModulePatterns(config.get(name), f"{files.config_path}: {name}")
            for name in ("rank_pattern", "alpha_pattern")
        )
        sides, saved = _split(files.tensors, config, path)
        factors = {}
        for name, pair in sides.items():
            rank, alpha = ranks.get(name, config["r"]), alphas.get(name, config["lora_alpha"])
            scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            factors[name] = (*_factors(f"{path}: {name}", pair, rank, scale), scale)
        return cls(factors, saved, config.get("base_model_name_or_path"), files.of_ladder)


def _refuse_other_kinds(config: dict[str, Any], path: Path) -> None:
    for name, what in UNSUPPORTED_FIELDS.items():
        if config.get(name):
            raise LadderError(f"{path}: {name} is set ({what}), but {REMEDY}")
    if config.get("bias", "none") != "none":
        raise LadderError(f"{path}: bias = {short(config['bias'])} trains biases of the base, but {REMEDY}")
    refuse_changed_base(config, str(path))


def _split(
    tensors: dict[str, Tensor], config: dict[str, Any], path: Path
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Split the tensors of an adapter file into the LoRA factors "A" and "B" of each module and replaced parameters."""
    sides: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if match := re.fullmatch(r"(.+)\.lora_([AB])\.weight", name):
            sides.setdefault(match[1], {})[match[2]] = tensor
            continue
        if name.endswith((".base_layer.weight", ".base_layer.bias", ".lora_velora_embed")):
            continue  # the base's own parameters, which PEFT adds for an adapted head, and what only training needs
        module, _, _ = name.rpartition(".")
        if "lora_" in name or not module or not is_replaced(module, config):
            raise LadderError(f"{path}: {key} is not part of plain LoRA on linear modules, but {REMEDY}")
        saved[name] = single_precision(f"{path}: {key}", tensor)
    if not sides:
        raise LadderError(f"{path}: holds no LoRA on linear modules, but {REMEDY}")
    return sides, saved


def single_precision(where: str, tensor: Tensor) -> Tensor:
    """Convert float64 to float32, the widest dtype that a ladder stores, and return its other dtypes as they are.

    Raises:
        LadderError: A ladder cannot store the tensor, which `where` names.
    """
    if tensor.dtype == torch.float64:
        where, tensor = f"{where}, in float32,", tensor.float()
    check_tensor(where, tensor)
    return tensor


def _factors(where: str, pair: dict[str, Tensor], rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Check lora_A and lora_B of one module and return them."""
    if set(pair) != {"A", "B"}:
        raise LadderError(f"{where} lacks lora_{'B' if 'A' in pair else 'A'}; export the adapter again")
    a, b = pair["A"], pair["B"]
    if a.ndim != 2 or b.ndim != 2:
        raise LadderError(f"{where} is not a linear module (lora_A has {a.ndim} dimensions), but {REMEDY}")
    if a.shape[0] != rank or b.shape[1] != rank:
        raise LadderError(
            f"{where} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}, but {CONFIG_NAME} says rank {rank}; "
            "correct r or rank_pattern there, or export the adapter again"
        )
    check_factors(where, b, a, scale)
    return a, b
