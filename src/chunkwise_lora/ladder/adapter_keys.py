"""Brings the names of an adapter's tensors into the form that PEFT writes, whatever tool wrote them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chunkwise_lora.errors import LadderError, shown
from chunkwise_lora.ladder.adapter_config import is_replaced
from chunkwise_lora.ladder.checks import check_name
from chunkwise_lora.ladder.peft_files import PREFIX

WRAPPERS = re.compile(
    r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|^module\.(?=base_model\.)"
)
"""Matches what torch.compile, FSDP, activation checkpointing and DDP add to the names of parameters."""

NAMED = re.compile(
    r"(?P<key>.+\.(?:lora_[AB](?=\.[^.]+\.)|lora_embedding_[AB]|lora_magnitude_vector(?!\.weight$)|trainable_tokens_delta))"
    r"\.(?P<adapter>[^.]+)(?P<end>(?:\.weight|\.bias)?)"
)
"""Matches keys that hold the adapter's name, which PEFT leaves out when it saves an adapter."""

FIRST_TOOLS = {".lora_down.weight": ".lora_A.weight", ".lora_up.weight": ".lora_B.weight"}
"""How the first LoRA tools call the factors, and how PEFT does."""

FLAT = re.compile(r"lora_(?:te\d?|unet|transformer)_\w+\.")
"""Matches names of modules in which underscores stand for dots, so that the modules cannot be told."""


def peft_keys(tensors: Mapping[str, Tensor], config: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter file by the keys that PEFT gives them. `path` names the file in errors.

    Prefixes of wrappers and the adapter's name are removed, PEFT's prefix is added where it is missing, lora_down and
    lora_up become lora_A and lora_B, and copies of the base's own modules are left out.

    Raises:
        LadderError: The file holds several adapters, one tensor twice, or names that are not those of modules.
    """
    keys, adapters = {}, set()
    for key in tensors:
        check_name(str(path), key)
        if FLAT.match(key):
            raise LadderError(
                f"{path}: {shown(key)} does not tell the module, because underscores stand for dots in it (kohya's "
                "tools); convert the adapter to PEFT's format"
            )
        name = PREFIX + WRAPPERS.sub("", key).removeprefix(PREFIX)
        if match := NAMED.fullmatch(name):
            name = match["key"] + match["end"] * ("magnitude" not in match["key"])
            adapters.add(match["adapter"])
        keys[key] = name
    if len(adapters) > 1:
        raise LadderError(
            f"{path}: holds the adapters {shown(', '.join(sorted(adapters)))}; save each one into its own folder with "
            "save_pretrained(..., selected_adapters=[...])"
        )
    wrapper = re.compile(rf"\.modules_to_save(?:\.{re.escape(next(iter(adapters), 'default'))})?(?=\.)")
    result: dict[str, Tensor] = {}
    for key, name in keys.items():
        if ".original_module." not in name and not _is_alpha(name, tensors[key], config, path):
            _put(result, wrapper.sub("", name), tensors[key], path)
    return result


def _is_alpha(name: str, tensor: Tensor, config: Mapping[str, Any], path: Path) -> bool:
    """Whether this is a module's alpha, as the first tools store it; then it must be that of the config."""
    if not name.endswith(".alpha") or tensor.numel() != 1:
        return False
    if float(tensor) != config["lora_alpha"] or config.get("alpha_pattern"):
        raise LadderError(
            f"{path}: {shown(name)} is {float(tensor):g}, but adapter_config.json says lora_alpha = "
            f"{config['lora_alpha']:g}; correct lora_alpha or alpha_pattern there, and remove the alphas here"
        )
    return True


def _put(result: dict[str, Tensor], name: str, tensor: Tensor, path: Path) -> None:
    for old, new in FIRST_TOOLS.items():
        if name.endswith(old):
            name = name.removesuffix(old) + new
    # PEFT stores a replaced module twice if the vocabulary was resized.
    if name in result and ("lora_" in name or not torch.equal(result[name], tensor)):
        raise LadderError(f"{path}: {shown(name)} appears twice; export only one adapter into the file")
    result[name] = tensor


def resized_embeddings(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> list[str]:
    """Return the embeddings and output heads that PEFT stores whole because the vocabulary was resized for training.

    They are the modules that no field of the config names, and whose weight is a matrix of the same shape as that of
    another embedding or head in the file.

    Args:
        tensors: The tensors by PEFT's keys.
        config: The fields of `adapter_config.json`.
    """
    weights = {
        name.removeprefix(PREFIX).removesuffix(".weight"): tuple(tensor.shape)
        for name, tensor in tensors.items()
        if name.endswith(".weight") and "lora_" not in name and tensor.ndim == 2
    }
    shapes = Counter(weights.values())
    return [
        module
        for module, shape in weights.items()
        if shapes[shape] > 1 and not module.endswith(".base_layer") and not is_replaced(module, config)
    ]
