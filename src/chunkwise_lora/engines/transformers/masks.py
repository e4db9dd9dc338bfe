"""Attention masks over the slots of a cache. After drops, a token's slot is no longer its column in the input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from chunkwise_lora.engines.transformers import versions
from chunkwise_lora.engines.transformers.cache import ChunkWiseCache


def mask_over_slots(
    config: PreTrainedConfig, cache: ChunkWiseCache, slots: Tensor, inputs: dict[str, Any]
) -> Tensor | dict[str, Tensor | None]:
    """Return the attention mask to give to the model.

    Args:
        config: The model's configuration.
        cache: The cache of the pass.
        slots: (batch, slots + tokens) bool: the slots that each sequence uses, then the tokens of the pass.
        inputs: The model's keyword arguments.

    Returns:
        `slots`, or, if some layers slide over a window of the input's columns, one mask per type of layer.
    """
    if not any(cache.is_sliding):
        return slots
    input_ids: Tensor = inputs["input_ids"]
    shared = {
        "config": config.get_text_config(),
        "inputs_embeds": torch.empty(
            (*input_ids.shape, 0), dtype=cache.chunkwise_layers[0].dtype, device=input_ids.device
        ),
        versions.CACHE: cache,
    }
    return {
        "full_attention": create_causal_mask(attention_mask=slots, **shared),
        "sliding_attention": create_sliding_window_causal_mask(attention_mask=inputs.get("attention_mask"), **shared),
    }
