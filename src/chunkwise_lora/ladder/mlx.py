"""Converts adapters of mlx-lm, which computes y = W x + scale * lora_b^T lora_a^T x, to PEFT's form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from chunkwise_lora.errors import LadderError, shown

SIDES = {".lora_a": ".lora_A.weight", ".lora_b": ".lora_B.weight"}
"""The ends of mlx-lm's names, with lora_a (in, r) and lora_b (r, out), and of PEFT's, which are transposed."""

REMEDY = "fuse it into its base model (mlx_lm.fuse), or train it with PEFT"


def is_mlx(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether an adapter's tensors have the names that mlx-lm gives them."""
    return any(name.endswith(tuple(SIDES)) for name in tensors)


def from_mlx(
    config: dict[str, Any], tensors: Mapping[str, Tensor], config_path: Path
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return fields of PEFT's `LoraConfig` and tensors by PEFT's names, without PEFT's prefix.

    Raises:
        LadderError: The adapter is not plain LoRA on linear modules, or its scale is not certain.
    """
    if config.get("fine_tune_type", "lora") != "lora" or config.get("use_dora"):
        raise LadderError(f"{config_path}: an adapter of mlx-lm that is not LoRA cannot be converted; {REMEDY}")
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict) or "alpha" in parameters or not {"rank", "scale"} <= parameters.keys():
        raise LadderError(
            f"{config_path}: an adapter of mlx-lm needs lora_parameters with rank and scale, and without alpha, whose "
            f"meaning has changed between its releases; {REMEDY}"
        )
    rank, scale = parameters["rank"], parameters["scale"]
    if type(rank) is not int or type(scale) not in (int, float):
        raise LadderError(f"{config_path}: rank and scale in lora_parameters are not numbers; correct them")
    converted, modules = {}, set()
    for name, tensor in tensors.items():
        module, dot, side = name.rpartition(".")
        if dot + side not in SIDES or tensor.ndim != 2:
            raise LadderError(
                f"{config_path}: {shown(name)} {list(tensor.shape)} is not LoRA of mlx-lm on a linear module; {REMEDY}"
            )
        converted[module + SIDES[dot + side]] = tensor.T.contiguous()
        modules.add(module)
    base = config.get("model")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base if isinstance(base, str) else None,
        "r": rank,
        "lora_alpha": scale * rank,
        "target_modules": sorted(modules),
    }, converted
