"""What the engine needs to know about a model: which KV decisions it allows, its positions and its cache."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class ModelTraits:
    """Facts about a model that hold for all of its calls."""

    config: PreTrainedConfig
    carries_out_kv: bool
    """Whether the engine's cache can carry out KV decisions in this model."""
    kv_notes: tuple[str, ...]
    """Which KV decisions are not carried out, and why."""
    positions: float
    """Number of positions with a learned embedding; infinite if positions are computed."""
    takes_cache: bool
    """Whether the model accepts the engine's cache. Models that need another kind of cache, such as recurrent models,
    keep their own."""
    parameters: tuple[str, ...]
    """Names of the parameters of the model's `forward`."""

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
            positions=_learned_positions(model),
            takes_cache=model._supports_default_dynamic_cache(),
            parameters=forward_parameters(model),
        )


def forward_parameters(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters of a module's `forward`, without `self`."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def _learned_positions(model: PreTrainedModel) -> float:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return math.inf
    tokens = model.get_input_embeddings()
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    # OPT and others keep a few rows before the first position.
    return positions if any(0 <= table.num_embeddings - positions <= 2 for table in tables) else math.inf


def _kv_support(model: PreTrainedModel) -> tuple[bool, list[str]]:
    config = model.config.get_text_config()
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return False, ["not carried out: ALiBi ties attention to the order of the cache"]
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        return False, [f"not carried out: {type(model).__name__} derives positions from the cache"]
    kinds = set(getattr(config, "layer_types", None) or ())
    if other := sorted(kinds - {"full_attention", "sliding_attention"}):
        return False, [f"not carried out: layers of type {', '.join(other)} are not supported"]
    if "sliding_attention" in kinds or (not kinds and getattr(config, "sliding_window", None) is not None):
        return True, ["sliding-window layers keep transformers' own cache, which the window already bounds"]
    return True, []
