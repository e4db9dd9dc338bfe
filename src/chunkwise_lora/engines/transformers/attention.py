"""Attention of models with ladders: INT8 entries are read as they are, and no half precision is emulated."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from chunkwise_lora.backends.emulation import emulates
from chunkwise_lora.engines.transformers.cache import ChunkWiseLayer

NAME = "chunkwise"
"""Its name among transformers' attention implementations."""


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' `sdpa`, but for a decode step over a `ChunkWiseLayer` a kernel where there is one.

    query (batch, heads, tokens, head_dim); key and value as the cache gave them; the output is
    (batch, tokens, heads, head_dim). That a cache's own tensors arrive here tells it that it need not widen INT8.
    """
    layer = getattr(key, "layer", None)
    plain = (
        not options.get("dropout") and options.get("position_bias") is None and options.get("is_causal") is not False
    )
    if getattr(value, "layer", None) is layer and isinstance(layer, ChunkWiseLayer):
        layer.read_by_attention = True
        scaling = options.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        layer.note_queries(query, scaling)
        if plain and layer.attends(query, attention_mask):
            return layer.attend(query, attention_mask, scaling), None
        key, value = layer.read()
    floating = attention_mask is not None and attention_mask.is_floating_point()
    if not plain or floating or not emulates(query.dtype, query.device):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    output = nn.functional.scaled_dot_product_attention(
        query.float(),
        key.float(),
        value.float(),
        attention_mask,
        is_causal=attention_mask is None and query.shape[2] > 1,
        scale=options.get("scaling"),
        enable_gqa=True,  # keys and values are not repeated for every query head
    )
    return output.transpose(1, 2).contiguous().to(query.dtype), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
