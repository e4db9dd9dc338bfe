"""The attention function of models with ladders: it reads INT8 entries directly and avoids emulated half precision."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from chunkwise_lora.backends.emulation import emulates
from chunkwise_lora.engines.transformers.cache import ChunkWiseLayer
from chunkwise_lora.engines.transformers.cache.stepping import StepRefused

NAME = "chunkwise"
"""The name under which transformers knows this attention implementation."""


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Compute attention as transformers' `sdpa` does, in decode steps by a kernel in C or Triton if there is one.

    A `ChunkWiseLayer` marks the tensors that it returns. If they arrive here unchanged, the function reads the layer
    itself, so that INT8 entries need not be converted first, and gives the layer the queries for its KV policies.

    Args:
        module: The attention module.
        query: (batch, query heads, tokens, head_dim).
        key: (batch, heads, slots, head_dim), as the cache returned it.
        value: (batch, heads, slots, head_dim), as the cache returned it.
        attention_mask: (batch, 1, tokens, slots) or None.
        options: What transformers passes, such as `scaling` and `dropout`.

    Returns:
        (batch, tokens, query heads, head_dim), and None in place of attention weights.
    """
    layer = getattr(key, "layer", None)
    plain = (
        not options.get("dropout")
        and options.get("position_bias") is None
        and options.get("softcap") is None
        and options.get("is_causal") is not False
    )
    if getattr(value, "layer", None) is layer and isinstance(layer, ChunkWiseLayer):
        scaling = options.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        layer.note_reading(query, attention_mask, scaling)
        if plain and (output := layer.attend(query, attention_mask, scaling)) is not None:
            return output, None
        if layer.uses_tables:
            raise StepRefused("its attention has dropout, a bias or a cap")
        key, value = layer.read()
    floating = attention_mask is not None and attention_mask.is_floating_point()
    if not plain or floating or not emulates(query.dtype, query.device):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    wide = nn.functional.scaled_dot_product_attention(
        query.float(),
        key.float(),
        value.float(),
        attention_mask,
        is_causal=attention_mask is None and query.shape[2] > 1,
        scale=options.get("scaling"),
        enable_gqa=True,  # keys and values are not repeated for every query head
    )
    return wide.transpose(1, 2).contiguous().to(query.dtype), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
