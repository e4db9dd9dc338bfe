"""What the engine needs to know about a model: which KV decisions it allows, how prompts may run, its positions."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from chunkwise_lora.engines.transformers.checks import GenerateOptions
from chunkwise_lora.engines.transformers.positions import tabled_positions
from chunkwise_lora.engines.transformers.versions import PLAIN_LAYERS, cache_name

TEXT_INPUTS = frozenset({"input_ids", "attention_mask", "position_ids"})
"""Inputs that `generate` cuts along the tokens when a prompt runs in several passes."""

LENGTH_FREE_ROPE = frozenset({"default", "linear", "llama3", "yarn", "proportional"})
"""Kinds of rotary embedding that give a position the same angles in a pass of any length."""

_ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention"})
_OUTPUTS_PER_PASS = ("output_hidden_states", "output_attentions")


@dataclass(frozen=True)
class ModelTraits:
    """Facts about a model that hold for all of its calls."""

    config: PreTrainedConfig
    carries_out_kv: bool
    """Whether the engine's cache can carry out KV decisions in this model."""
    kv_notes: tuple[str, ...]
    """Which KV decisions are not carried out, and why."""
    positions: float
    """Number of positions in the model's table of positions; infinite if positions are computed."""
    takes_cache: bool
    """Whether the model accepts the engine's cache. Models that need another kind of cache, such as recurrent models,
    keep their own."""
    cuts_text: bool
    """Whether a prompt of text gives the same result in one pass and in several passes that share a cache."""
    parameters: tuple[str, ...]
    """Names of the parameters of the model's `forward`."""
    text_model: str
    """Name of the module that computes the hidden states of a pass's tokens; empty for the model itself."""
    picks_logits: bool
    """Whether the model takes indices of the tokens whose logits it returns."""
    head: str
    """Name of the module that computes logits from them."""

    @property
    def cache_name(self) -> str | None:
        """The parameter of the model that takes its cache; None if it has none."""
        return cache_name(self.parameters)

    @property
    def vocab_size(self) -> int:
        """Entries of the text model's vocabulary."""
        return int(self.config.get_text_config().vocab_size)

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelTraits:
        """Read the traits of a model."""
        carries_out, notes = _kv_support(model)
        return cls(
            config=model.config,
            carries_out_kv=carries_out,
            kv_notes=tuple(notes),
            positions=tabled_positions(model),
            takes_cache=model._supports_default_dynamic_cache(),
            cuts_text=_cuts_text(model),
            parameters=forward_parameters(model),
            text_model=_name_of(model, model.get_decoder()),
            picks_logits=_picks_logits(model),
            head=_name_of(model, model.get_output_embeddings()),
        )

    def sees_tokens(self, name: str) -> bool:
        """Return whether the module `name` sees the tokens of a pass. A vision tower sees parts of images instead."""
        return name == self.head or not self.text_model or f"{name}.".startswith(f"{self.text_model}.")

    def prompt_passes_are_safe(self, options: GenerateOptions) -> bool:
        """Return whether the prompts of a call of `generate` may run in several passes.

        They may if that is known to be the same computation: the model allows it for text, the call has no other
        inputs, no padding, and asks for no outputs of every pass.
        """
        if not self.cuts_text or any(getattr(options, name) for name in _OUTPUTS_PER_PASS):
            return False
        return options.model_inputs() <= TEXT_INPUTS and not _pads(options.attention_mask)


def forward_parameters(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters of a module's `forward`, without `self`."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def _picks_logits(model: PreTrainedModel) -> bool:
    parameter = inspect.signature(type(model).forward).parameters.get("logits_to_keep")
    return parameter is not None and "Tensor" in str(parameter.annotation)


def _name_of(model: PreTrainedModel, module: nn.Module | None) -> str:
    return next((name for name, other in model.named_modules() if other is module), "")


def _cuts_text(model: PreTrainedModel) -> bool:
    config = model.config.get_text_config(decoder=True)
    cached = {type(layer) for layer in DynamicCache(config=config).layers}
    return (
        _mixes_tokens_by_attention_only(model)
        and cached <= PLAIN_LAYERS
        and set(_layer_types(config)) <= _ATTENTION_LAYERS
        and set(_rope_types(config)) <= LENGTH_FREE_ROPE
    )


def _kv_support(model: PreTrainedModel) -> tuple[bool, list[str]]:
    config = model.config.get_text_config(decoder=True)
    name = type(model).__name__
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return False, ["not carried out: ALiBi ties attention to the order of the cache"]
    if "position_ids" not in forward_parameters(model):
        return False, [f"not carried out: {name} derives positions from the cache"]
    kinds = set(_layer_types(config))
    if other := sorted(kinds - _ATTENTION_LAYERS):
        return False, [f"not carried out: layers of type {', '.join(other)} are not supported"]
    if not _mixes_tokens_by_attention_only(model):
        return False, [f"not carried out: the attention of {name} may depend on the order of the cache"]
    if "sliding_attention" in kinds or (not kinds and getattr(config, "sliding_window", None) is not None):
        return True, ["sliding-window layers keep transformers' own cache, which the window already bounds"]
    return True, []


def _layer_types(config: PreTrainedConfig) -> list[str]:
    return list(getattr(config, "layer_types", None) or ())


def _rope_types(config: PreTrainedConfig) -> Iterator[str]:
    """Yield the kinds of rotary embedding, of which types of layer may have one each."""
    for name in ("rope_parameters", "rope_scaling"):
        parameters = getattr(config, name, None) or {}
        for each in (parameters, *parameters.values()):
            if isinstance(each, Mapping):
                yield each.get("rope_type", each.get("type", "default"))


def _mixes_tokens_by_attention_only(model: PreTrainedModel) -> bool:
    """Return whether tokens affect later tokens only through transformers' attention functions and causal masks."""
    if not model._supports_attention_backend or model._is_stateful:
        return False
    causal = [getattr(module, "is_causal", None) for module in model.get_decoder().modules()]
    return True in causal and False not in causal


def _pads(mask: Tensor | None) -> bool:
    return mask is not None and not bool(mask.all())
