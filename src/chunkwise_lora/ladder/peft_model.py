"""Reads the LoRA adapters of a PEFT model in memory: which parts are plain LoRA, and the factors of these parts.

A layer is plain if it adds s B A x to the output of a linear layer of any kind (`nn.Linear`, `Conv1D`, quantised), and
nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from peft import PeftModel, PeftType
from peft.tuners.lora import Embedding, LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper, _ConvNd
from peft.tuners.lora.tp_layer import LoraParallelLinear
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from chunkwise_lora.errors import LadderError
from chunkwise_lora.ladder.adapter_config import refuse_changed_base
from chunkwise_lora.ladder.adapter_files import DTYPES
from chunkwise_lora.ladder.checks import check_factors, check_layout
from chunkwise_lora.ladder.peft_adapter import PeftAdapter, single_precision

REPLACED = "replaced module"
"""What `other_parts` calls a module of `modules_to_save`. It is the only other part that a ladder can hold."""

VARIANTS = {
    "ALora": "activated LoRA",
    "Arrow": "Arrow routing",
    "BdLora": "BD-LoRA",
    "Dora": "DoRA",
    "Kasa": "KaSA",
    "MiCA": None,
    "Montecl": "MonteCLoRA",
    "QALora": "QALoRA",
    "Velora": None,
}
"""How the names of PEFT's classes of LoRA variants begin, and what the variants are called. None: the variant changes
only how an adapter is trained."""


def plain_layers(model: PeftModel, adapter: str) -> dict[str, LoraLayer]:
    """Return the layers on which `adapter` is plain LoRA, by the name of the module in the base model."""
    return {name: layer for name, layer in _lora_layers(model, adapter) if not _difference(layer, adapter)}


def other_parts(model: PeftModel, adapter: str) -> dict[str, str]:
    """Return all parts of `adapter` that are not plain LoRA: what each one is, by module (or parameter) of the base."""
    parts: dict[str, str] = {}
    for name, layer in _lora_layers(model, adapter):
        if what := _difference(layer, adapter):
            parts[f"{name}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else name] = what
    for name, wrapper in _wrappers(model, adapter):
        tokens = isinstance(wrapper, TrainableTokensWrapper)
        parts[name] = "trainable tokens" if tokens else REPLACED
    return parts | dict.fromkeys(_trained_biases(model, adapter), "trained bias")


def base_parameters(model: PeftModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters of the base model that loading an adapter's tensors would overwrite, by the tensor's key.

    These are trained biases, and embeddings below an adapter, which PEFT stores in case the vocabulary was resized.

    Args:
        model: The model, after `add_adapter`.
        tensors: The adapter's tensors by the keys that PEFT gives them in its file.
    """
    state = model.state_dict()  # an adapter's own keys hold its name here, and not in the file
    return {key: state[key] for key in tensors if key in state}


def plain_adapter(model: PeftModel, adapter: str) -> PeftAdapter:
    """Return the plain layers of `adapter`: copies of their factors, on the CPU. It holds no replaced modules.

    Raises:
        LadderError: The adapter has no plain layer, or its weights are not finite, not in memory or not complete.
    """
    layers = plain_layers(model, adapter)
    if not layers:
        raise LadderError(f"adapter {adapter!r} has no plain LoRA layer, so it has no ladder")
    factors = {name: _factors(name, layer, adapter) for name, layer in layers.items()}
    return PeftAdapter(factors, {}, model.peft_config[adapter].base_model_name_or_path)


def whole_adapter(model: PeftModel, adapter: str | None) -> PeftAdapter:
    """Return all of `adapter`: its plain layers as `plain_adapter` does, and its replaced modules.

    Without a name, this is the model's active adapter.

    Raises:
        LadderError: This is no `PeftModel`, it does not hold the adapter, or the adapter has parts that a ladder cannot
            hold.
    """
    if not isinstance(model, PeftModel):
        raise LadderError(
            f"a {type(model).__name__} is no adapter; give a folder, a name on the hub or a peft.PeftModel"
        )
    adapter = model.active_adapter if adapter is None else adapter
    if adapter not in model.peft_config:
        raise LadderError(f"the model has no adapter {adapter!r}; it has {', '.join(map(repr, model.peft_config))}")
    config = model.peft_config[adapter]
    if config.peft_type != PeftType.LORA:
        raise LadderError(f"adapter {adapter!r} is of type {config.peft_type}; only LoRA can become a ladder")
    refuse_changed_base(config.to_dict(), f"adapter {adapter!r}")
    refused = {name: what for name, what in other_parts(model, adapter).items() if what != REPLACED}
    if refused:
        name, what = next(iter(refused.items()))
        more = f" and {len(refused) - 1} other modules" if len(refused) > 1 else ""
        raise LadderError(
            f"a ladder holds plain LoRA only, but adapter {adapter!r} has {what} on {name}{more}; "
            "ChunkWiseModel(model) runs these parts at full rank"
        )
    return replace(plain_adapter(model, adapter), saved_modules=_replaced_parameters(model, adapter))


def _lora_layers(model: PeftModel, adapter: str) -> Iterator[tuple[str, LoraLayer]]:
    """Yield the LoRA layers of an adapter. Those inside a replaced or an attention module are part of that module."""
    around = [name for name, _ in _wrappers(model, adapter)]
    around += [name for name, module in _modules(model) if isinstance(module, MultiheadAttention)]
    inside = tuple(f"{name}." for name in around)
    for name, module in _modules(model):
        is_lora = isinstance(module, LoraLayer) and (adapter in module.lora_A or adapter in module.lora_embedding_A)
        if is_lora and not name.startswith(inside):
            yield name, module


def _wrappers(model: PeftModel, adapter: str) -> Iterator[tuple[str, AuxiliaryTrainingWrapper]]:
    for name, module in _modules(model):
        if isinstance(module, AuxiliaryTrainingWrapper) and adapter in module._adapters:
            yield name, module


def _modules(model: PeftModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of the base model. A layer that PEFT has wrapped has the name that it had before."""
    for name, module in model.base_model.model.named_modules():  # get_base_model() needs an adapter
        yield name.replace(".base_layer", ""), module


def _difference(layer: LoraLayer, adapter: str) -> str | None:
    """Return what an adapter's layer is in words, or None if it is plain LoRA."""
    for kind, what in (
        (ParamWrapper, "LoRA on a bare parameter"),
        (Embedding, "LoRA on an embedding"),
        (_ConvNd, "LoRA on a convolution"),
        (MultiheadAttention, "LoRA on a fused attention module"),
        (LoraParallelLinear, "LoRA on a tensor-parallel layer"),
    ):
        if isinstance(layer, kind):
            return what
    if getattr(layer.get_base_layer(), "_hf_tp_plan", None) is not None:
        return "LoRA on a tensor-parallel layer"
    if layer.lora_bias.get(adapter):
        return "LoRA with a bias"
    if not type(layer).__module__.startswith("peft.tuners.lora."):
        return f"the custom LoRA layer {type(layer).__name__}"
    if adapter not in layer.lora_variant:
        return None
    variant = type(layer.lora_variant[adapter]).__name__
    known = [what for start, what in VARIANTS.items() if variant.startswith(start)]
    return known[0] if known else f"the LoRA variant {variant}"


def _trained_biases(model: PeftModel, adapter: str) -> Iterator[str]:
    """Yield the modules whose bias belongs to the adapter's state (PEFT's `bias`)."""
    which = model.peft_config[adapter].bias
    if which == "none":
        return
    adapted = {name for name, _ in _lora_layers(model, adapter)}
    for name, module in _modules(model):
        if isinstance(getattr(module, "bias", None), nn.Parameter) and (which == "all" or name in adapted):
            yield name


def _factors(name: str, layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor, float]:
    """Return copies of lora_A (r, in) and lora_B (out, r), and the scale."""
    a, b = (_copy(name, side[adapter].weight) for side in (layer.lora_A, layer.lora_B))
    scale = float(layer.scaling[adapter])
    check_factors(name, b, a, scale)
    return a, b, scale


def _replaced_parameters(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """Return copies of the parameters of the adapter's `modules_to_save`, by their name in the base model."""
    return {
        f"{name}.{key}": single_precision(name, _copy(name, tensor))
        for name, wrapper in _wrappers(model, adapter)
        if isinstance(wrapper, ModulesToSaveWrapper)
        for key, tensor in wrapper.modules_to_save[adapter].state_dict().items()
    }


def _copy(name: str, tensor: Tensor) -> Tensor:
    if tensor.device.type == "meta":
        raise LadderError(
            f"{name}: the adapter's weights are offloaded; give ChunkWiseModel the base model and the adapter, "
            "or load the model without offloading"
        )
    check_layout(name, tensor, dtypes=DTYPES)
    return tensor.detach().cpu().clone()
