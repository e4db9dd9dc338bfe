"""Checks that a ladder fits a model: its linear layers by name and shape, and the modules that it replaces."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from chunkwise_lora.errors import EngineError
from chunkwise_lora.ladder import RankLadder


def fitting_linear(model: PreTrainedModel, name: str, ladder: RankLadder) -> nn.Module:
    """Return the linear layer `name`, which the ladder adapts.

    Raises:
        EngineError: The model has no such layer, or it has another shape.
    """
    trained_on = f" (the adapter was trained on {ladder.base_model})" if ladder.base_model else ""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise EngineError(
            f"the ladder adapts {name}, which {type(model).__name__} does not have; load the base model{trained_on}"
        ) from None
    shape = linear_shape(module)
    if shape is None:
        raise EngineError(f"{name} is a {type(module).__name__}, not a linear layer; ladders fit linear layers only")
    factors = ladder.modules[name]
    wanted = (factors.up.shape[0], factors.down.shape[1])
    if shape != wanted:
        raise EngineError(
            f"{name}: the ladder is for (out, in) = {wanted}, the model has {shape}; load the base model{trained_on}"
        )
    return module


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return (out, in) of any kind of linear layer, quantised ones included; None for other modules."""
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(str(module.out_features)), int(str(module.in_features))
    return None


def replaced_copies(model: PreTrainedModel, ladder: RankLadder) -> dict[str, nn.Module]:
    """Return copies of the modules that the adapter replaces, with the adapter's parameters, by module name.

    Raises:
        EngineError: The model has no such parameter, or it has another shape.
    """
    copies: dict[str, nn.Module] = {}
    for name, tensor in ladder.saved_modules.items():
        module_name, _, parameter = name.rpartition(".")
        try:
            original = model.get_submodule(module_name)
            shape = original.get_parameter(parameter).shape
        except AttributeError:
            raise EngineError(
                f"the adapter replaces {name}, which {type(model).__name__} does not have; load the base model that "
                "the adapter was trained on"
            ) from None
        if shape != tensor.shape:
            raise EngineError(
                f"{name}: the adapter holds {tuple(tensor.shape)}, the model {tuple(shape)}; load the base model that "
                "the adapter was trained on"
            )
        module = copies.setdefault(module_name, copy.deepcopy(original))
        value = tensor.to(device_of(model, original), original.get_parameter(parameter).dtype)
        setattr(module, parameter, nn.Parameter(value, requires_grad=False))
    return copies


def device_of(model: PreTrainedModel, module: nn.Module) -> torch.device:
    """Return the device on which a module computes."""
    hook = getattr(module, "_hf_hook", None)  # set by accelerate if weights are offloaded
    execution = getattr(hook, "execution_device", None)
    if execution is not None:
        return torch.device(execution)
    weight = next(module.parameters(), None)
    return model.device if weight is None else weight.device
