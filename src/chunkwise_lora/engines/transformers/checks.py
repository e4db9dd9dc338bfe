"""Refuses models, prompts and options of `generate` that cannot work, before anything runs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from chunkwise_lora.engines.transformers.positions import check_positions
from chunkwise_lora.errors import EngineError

_ROLLS_BACK = "assisted generation removes tokens from the cache again, and the cache may already have dropped others"

REFUSED_OPTIONS = {
    "assistant_model": _ROLLS_BACK,
    "prompt_lookup_num_tokens": _ROLLS_BACK,
    "assistant_early_exit": _ROLLS_BACK,
    "use_mtp": _ROLLS_BACK,
    "guidance_scale": "classifier-free guidance runs the model twice for every token, but plans expect one pass",
    "custom_generate": "a custom generation loop may change the order of sequences",
    "cache_implementation": "the KV policy owns the cache; choose a preset or kv_cache settings instead",
    "inputs_embeds": "plans are made from token ids; pass input_ids instead",
}

_ARGUMENTS = inspect.signature(GenerationMixin.generate).parameters.keys() | {"tokenizer"}
"""Arguments of `generate` itself. It takes the tokenizer from its keyword arguments, for stop strings."""


class GenerateOptions:
    """The options that apply to a call of `generate`: those of the call, of a generation config, then the model's."""

    def __init__(self, options: Mapping[str, Any], *configs: GenerationConfig | None) -> None:
        self._options = options
        self._configs = configs

    def __getattr__(self, name: str) -> Any:
        if name in self._options:
            return self._options[name]
        values = (getattr(config, name, None) for config in self._configs)
        return next((value for value in values if value is not None), None)

    def model_inputs(self) -> set[str]:
        """Return the names of the call's options that `generate` hands to the model: what is no setting of its own."""
        settings = vars(GenerationConfig()).keys() | _ARGUMENTS
        return {name for name, value in self._options.items() if value is not None} - settings


def refuse_type(name: str, value: object, *kinds: type) -> None:
    """Raise `EngineError` if `value` has another type than `kinds`. None is allowed and means the default."""
    if value is not None and not isinstance(value, kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise EngineError(f"{name} is a {type(value).__name__}; give a {wanted}")


def refuse_model(model: object) -> None:
    """Raise `EngineError` if `model` is not a causal language model of transformers."""
    if not isinstance(model, PreTrainedModel):
        raise EngineError(
            f"the model is a {type(model).__name__}; load one with AutoModelForCausalLM, or give a PeftModel of LoRA"
        )
    if model.config.is_encoder_decoder or not model.can_generate():
        raise EngineError(f"{type(model).__name__} is not a causal language model; load it with AutoModelForCausalLM")


def refuse_options(options: GenerateOptions, use_cache: bool) -> None:
    """Raise `EngineError` for options of `generate` that cannot work with a plan per chunk."""
    for name, reason in REFUSED_OPTIONS.items():
        value = getattr(options, name)
        if name == "cache_implementation" and value == "hybrid":
            continue  # old checkpoints have it, and transformers ignores it
        if name == "guidance_scale" and value == 1:
            continue
        if value is not None and value is not False:
            raise EngineError(f"generate: {name} is not supported: {reason}")
    if (options.num_beams or 1) > 1 and not use_cache:
        raise EngineError("generate: num_beams with use_cache=False is not supported: the cache keeps track of beams")


def check_prompt(model: PreTrainedModel, input_ids: Tensor | None, options: Mapping[str, Any]) -> None:
    """Raise `EngineError` for prompts that are empty, hold unknown ids, or exceed the model's positions."""
    kinds = (torch.int64, torch.int32)
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.dtype not in kinds:
        raise EngineError("input_ids must be a (batch, tokens) tensor of token ids")
    mask = options.get("attention_mask")
    refuse_type("attention_mask", mask, Tensor)
    if mask is not None and mask.shape != input_ids.shape:
        raise EngineError(
            f"attention_mask is {tuple(mask.shape)}, input_ids {tuple(input_ids.shape)}; give both the same shape"
        )
    lengths = input_ids.new_full((len(input_ids),), input_ids.shape[1]) if mask is None else mask.sum(-1)
    if not lengths.numel() or not input_ids.shape[1] or not lengths.all():
        raise EngineError("a prompt is empty; give every sequence at least one token (for example the BOS token)")
    rows = len(model.get_input_embeddings().weight)
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= rows:
        raise EngineError(
            f"input_ids hold {low if low < 0 else high}, outside the model's vocabulary of {rows}; "
            "use the tokenizer of this model"
        )
    check_positions(model, int(lengths.max()))
