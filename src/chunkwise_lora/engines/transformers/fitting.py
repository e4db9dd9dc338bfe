"""Checks that an adapter fits a model: its modules by name and shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from chunkwise_lora.errors import EngineError
from chunkwise_lora.ladder.peft_files import PREFIX


def refuse_other_base(base: nn.Module, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Refuse an adapter that was trained on another model, as far as the shapes of its linear layers tell.

    What this cannot judge, PEFT refuses when it loads the adapter.

    Args:
        base: A model, with or without PEFT's modules.
        tensors: The adapter's tensors by PEFT's names.
        config: Fields of the adapter's `LoraConfig`.

    Raises:
        EngineError: The model does not have a module that the adapter changes, or it has another shape.
    """
    trained_on = config.get("base_model_name_or_path")
    remedy = f"load the base model{f' (the adapter was trained on {trained_on})' if trained_on else ''}"
    if config.get("use_bdlora"):
        return  # its factors are block-diagonal
    fused = any(hasattr(module, "num_experts") for module in base.modules())
    for key, down in tensors.items():
        name = key.removeprefix(PREFIX)
        up = tensors.get(key.replace(".lora_A.weight", ".lora_B.weight"))
        if not name.endswith(".lora_A.weight") or up is None or down.ndim != 2:
            continue
        name = name.removesuffix(".lora_A.weight")
        if fused and "experts" in name:
            continue  # PEFT converts these names
        try:
            module = base.get_submodule(name)
        except AttributeError:
            raise EngineError(
                f"the adapter changes {name}, which {type(base).__name__} does not have; {remedy}"
            ) from None
        if next(module.parameters(), None) is None:
            kind = type(module).__name__
            raise EngineError(f"the adapter changes {name}, which is a {kind}, not a linear layer; {remedy}")
        shape, wanted = linear_shape(module), (up.shape[0], down.shape[1])
        if shape is not None and shape != wanted:
            raise EngineError(f"{name}: the adapter is for (out, in) = {wanted}, the model has {shape}; {remedy}")


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return (out, in) of any kind of linear layer, quantised ones and LoRA layers included; None for others."""
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    features = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if None in features:
        return None
    return int(features[0]), int(features[1])  # type: ignore[arg-type]


def only_device_of(model: nn.Module) -> torch.device:
    """Return the device of a model that lies on one device.

    Raises:
        EngineError: It is spread over devices, or parts of it are offloaded.
    """
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) > 1 or torch.device("meta") in devices:
        raise EngineError(
            f"the model lies on {' and '.join(sorted(map(str, devices)))} (meta means offloaded), but must lie on one "
            "device here; load it without device_map, or with a device_map that names one device"
        )
    return devices.pop()


def device_of(module: nn.Module, default: torch.device) -> torch.device:
    """Return the device on which a module computes."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)  # set by accelerate if weights are spread over devices or offloaded
        for one in getattr(hook, "hooks", [hook]):
            if getattr(one, "execution_device", None) is not None:
                return torch.device(one.execution_device)
    weight = next(module.parameters(), None)
    return default if weight is None else weight.device
