"""Brings the names of an adapter's tensors into the form that PEFT writes, whatever tool wrote them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from chunkwise_lora.errors import LadderError, shown
from chunkwise_lora.ladder.checks import check_name
from chunkwise_lora.ladder.peft_files import PREFIX

WRAPPERS = re.compile(
    r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|^module\.(?=base_model\.)"
)
"""Matches what torch.compile, FSDP, activation checkpointing and DDP add to the names of parameters."""

NAMED = (
    re.compile(r"(?P<key>.+\.lora_[AB])\.(?P<name>[^.]+)(?P<end>\.(?:weight|bias))"),
    re.compile(r"(?P<key>.+\.lora_embedding_[AB])\.(?P<name>[^.]+)(?P<end>)"),
    re.compile(r"(?P<key>.+\.lora_magnitude_vector)\.(?P<name>(?!weight$)[^.]+)(?:\.weight)?(?P<end>)"),
    re.compile(r"(?P<key>.+\.trainable_tokens_delta)\.(?P<name>[^.]+)(?P<end>)"),
)
"""Match keys that hold the adapter's name, which PEFT leaves out when it saves an adapter."""

ORIGINAL = {".lora_down.weight": ".lora_A.weight", ".lora_up.weight": ".lora_B.weight"}
"""How the first LoRA tools call the factors, and how PEFT does."""


def peft_keys(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter file by the keys that PEFT gives them. `path` names the file in errors.

    Prefixes of wrappers and the adapter's name are removed, PEFT's prefix is added where it is missing, and lora_down
    and lora_up become lora_A and lora_B.

    Raises:
        LadderError: The file holds several adapters, one tensor twice, or names that are not those of modules.
    """
    keys: dict[str, str] = {}
    adapters = set()
    for key in tensors:
        check_name(str(path), key)
        name = PREFIX + WRAPPERS.sub("", key).removeprefix(PREFIX)
        for old, new in ORIGINAL.items():
            name = name.removesuffix(old) + new if name.endswith(old) else name
        for match in filter(None, (pattern.fullmatch(name) for pattern in NAMED)):
            name = match["key"] + match["end"]
            adapters.add(match["name"])
        keys[key] = name
    if len(adapters) > 1:
        raise LadderError(
            f"{path}: holds the adapters {shown(', '.join(sorted(adapters)))}; save each one into its own folder with "
            "save_pretrained(..., selected_adapters=[...])"
        )
    saved = re.compile(rf"\.modules_to_save(?:\.{re.escape(next(iter(adapters), 'default'))})?(?=\.)")
    result: dict[str, Tensor] = {}
    for key, name in keys.items():
        unwrapped = saved.sub("", name)
        if unwrapped in result:
            raise LadderError(f"{path}: {shown(unwrapped)} appears twice; export only one adapter into the file")
        result[unwrapped] = tensors[key]
    return result
