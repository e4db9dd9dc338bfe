"""Finds the tensor of llama.cpp for each module of a ladder, or tells why there is none."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from gguf import MODEL_ARCH_NAMES, TensorNameMap, get_tensor_name_map

from chunkwise_lora.errors import LadderError
from chunkwise_lora.ladder.contents import LadderContents
from chunkwise_lora.ladder.gguf.base import GgufBase
from chunkwise_lora.ladder.module import LadderModule

NAMED = 4
"""How many modules an error names for each reason."""

REMEDY = "merge the adapter into the model (merge_and_unload in PEFT) and convert the whole model instead"


def place(ladder: LadderContents, base: GgufBase) -> dict[str, LadderModule]:
    """Return the ladder's modules by the names of llama.cpp's tensors, with the rows of `up` in llama.cpp's order.

    Raises:
        LadderError: A part of the ladder has no place in a GGUF adapter, or does not fit the base model. The error
            names every reason and the first modules.
    """
    if ladder.saved_modules:
        raise LadderError(
            "a GGUF adapter cannot hold parameters that the adapter replaces, as this one does: "
            f"{_some(list(ladder.saved_modules))}; {REMEDY}"
        )
    names = _name_map(base)
    placed: dict[str, LadderModule] = {}
    refused: dict[str, list[str]] = {}
    for name, module in ladder.modules.items():
        plain_name = re.sub(r"(language|text)_model\.", "", name)  # models of text and images nest the text model
        stem = names.get_name(plain_name)
        tensor = f"{stem}.weight"
        reason = _no_place(base, name, stem) or _other_shape(base, tensor, module)
        if tensor in placed:
            reason = f"another module has the same tensor {tensor}"
        if reason:
            refused.setdefault(reason, []).append(name)
        else:
            placed[tensor] = _reordered(base, name, tensor, module)
    if refused:
        reasons = "; ".join(f"{_some(modules)}: {reason}" for reason, modules in refused.items())
        raise LadderError(
            f"a GGUF adapter for {base.source} cannot hold all modules of this adapter. {reasons}. If this is the "
            f"right base model, {REMEDY}"
        )
    return placed


def _name_map(base: GgufBase) -> TensorNameMap:
    for architecture, name in MODEL_ARCH_NAMES.items():
        if name == base.architecture.name:
            return get_tensor_name_map(architecture, base.blocks)
    raise LadderError(
        f"the installed package gguf does not know the architecture {base.architecture.name}; install a newer one: "
        "pip install --upgrade gguf"
    )


def _no_place(base: GgufBase, name: str, stem: str | None) -> str:
    """Why llama.cpp cannot have a LoRA on the module, or an empty string. `stem` is llama.cpp's name for it."""
    if ".experts." in name:
        return "llama.cpp has one tensor for all experts of a layer, which cannot have a LoRA per expert"
    if stem is None:
        return f"llama.cpp has no tensor for this name in a {base.architecture.name} model of {base.blocks} layers"
    if stem == "token_embd":
        return "this is a LoRA on the embeddings, not on a linear module"
    if stem == "output" and base.tied:
        return "the base model's output layer is its embedding matrix, for which llama.cpp has no tensor of its own"
    return ""


def _other_shape(base: GgufBase, tensor: str, module: LadderModule) -> str:
    """How the module's shape differs from the base model's, or an empty string."""
    shape = (module.up.shape[0], module.down.shape[1])
    if base.shapes is None:
        fits = base.width in shape  # every linear module of these architectures reads or writes the hidden state
        return "" if fits else f"the shape {shape} does not fit the base model's hidden size {base.width}"
    if tensor not in base.shapes:
        return f"the base model has no tensor {tensor}"
    fits = base.shapes[tensor] == shape
    return "" if fits else f"the shape {shape} is not that of the base model's tensor, {base.shapes[tensor]}"


def _reordered(base: GgufBase, name: str, tensor: str, module: LadderModule) -> LadderModule:
    order = base.architecture.row_orders.get(tensor.split(".")[-2])
    if order is None:
        return module
    try:
        rows = order(module.up.shape[0], base.heads, base.kv_heads)
    except RuntimeError:  # PyTorch cannot form these shapes
        raise LadderError(
            f"{name}: its {module.up.shape[0]} outputs cannot be divided into the {base.heads} query heads and "
            f"{base.kv_heads} key-value heads of {base.source}; give the base model that the adapter was trained on"
        ) from None
    return replace(module, up=module.up[rows])


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
