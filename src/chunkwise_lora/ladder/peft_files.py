"""Converts a ladder to the two files of a plain PEFT adapter, in singular basis.

lora_A is `down`, lora_B is `up`, and lora_alpha is r for every module, so the scale is 1. PEFT, vLLM and other programs
that read PEFT adapters run these files at full rank without support for ladders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from chunkwise_lora.errors import LadderError, shown
from chunkwise_lora.ladder.contents import LadderContents
from chunkwise_lora.ladder.tensors import to_bytes

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""PEFT puts this before the names of the base model's modules."""

MEANING = ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "modules_to_save")
"""Fields of `adapter_config.json` that decide which function the tensors compute."""


def peft_files(ladder: LadderContents) -> dict[str, bytes]:
    """Return the content of `adapter_config.json` and `adapter_model.safetensors` by file name.

    Raises:
        LadderError: The name of the base model cannot be written as UTF-8.
    """
    return {
        CONFIG_NAME: (json.dumps(peft_config(ladder), indent=2) + "\n").encode(),
        WEIGHTS_NAME: to_bytes(peft_tensors(ladder)),
    }


def peft_config(ladder: LadderContents) -> dict[str, Any]:
    """Return the fields of `adapter_config.json`. Modules whose rank is not the highest are in `rank_pattern`."""
    try:
        (ladder.base_model or "").encode()
    except UnicodeEncodeError:
        raise LadderError(
            f"base_model '{shown(ladder.base_model)}' cannot be written as UTF-8; give another with "
            "dataclasses.replace(ladder, base_model=...)"
        ) from None
    ranks = {name: module.rank for name, module in ladder.modules.items()}
    rank = max(ranks.values())
    pattern = _pattern(ranks, rank)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": ladder.base_model,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "target_modules": sorted(ranks),
        "modules_to_save": _replaced_modules(ladder.saved_modules) or None,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
    }


def peft_tensors(ladder: LadderContents) -> dict[str, Tensor]:
    """Return the tensors of `adapter_model.safetensors` by the names that PEFT gives them."""
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in ladder.saved_modules.items()}
    for name, module in ladder.modules.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = module.down
        tensors[f"{PREFIX}{name}.lora_B.weight"] = module.up
    return tensors


def _pattern(ranks: Mapping[str, int], rank: int) -> dict[str, int]:
    """Return PEFT's rank_pattern. A key is a regular expression for the end of a name; the first match counts."""
    ragged = {name for name, module_rank in ranks.items() if module_rank != rank}
    listed = ragged | {name for name in ranks if any(end in ragged for end in _ends(name))}
    longest_first = sorted(listed, key=lambda name: (-name.count("."), name))
    return {name if re.fullmatch(r"[\w.]+", name) else re.escape(name): ranks[name] for name in longest_first}


def _ends(name: str) -> Iterable[str]:
    """The ends of a name that begin after one of its dots."""
    return (name[dot.end() :] for dot in re.finditer(r"\.", name))


def _replaced_modules(parameters: Iterable[str]) -> list[str]:
    """The modules that hold the replaced parameters, without those inside another one of them."""
    modules = {name.rpartition(".")[0] for name in parameters}
    return sorted(name for name in modules if not any(name.startswith(f"{other}.") for other in modules))
