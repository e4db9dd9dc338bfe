"""Runs passes over a `ChunkWiseCache` as a model with two attention layers would, without a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from chunkwise_lora.engines.transformers.cache import NO_TOKEN, ChunkWiseCache
from models import build


def new_cache(int8_head_share: float = 1.0, record_queries: bool = False) -> ChunkWiseCache:
    return ChunkWiseCache(build("llama").config, int8_head_share, carries_out=True, record_queries=record_queries)


def run_pass(
    cache: ChunkWiseCache,
    tokens: np.ndarray,
    keys: Sequence[Tensor] | Tensor,
    queries: Sequence[Tensor] | Tensor | None = None,
) -> np.ndarray:
    """Add columns with tokens (batch, n) to all layers. Values are twice the keys.

    Args:
        cache: The cache.
        tokens: (batch, n) positions, `NO_TOKEN` for padding.
        keys: For each layer, (batch, heads, n, head_dim).
        queries: For each layer, (batch, query heads, n, head_dim); by default the keys.

    Returns:
        (batch, slots) bool, the slots that the last token sees.
    """
    new = tokens != NO_TOKEN
    cache.slot_mask(new)
    visible = cache._slots.visible(new)
    mask = torch.from_numpy(visible)[:, None, None].expand(-1, 1, tokens.shape[1], -1)
    for index, layer in enumerate(cache.chunkwise_layers):
        cache.update(keys[index], 2 * keys[index], index)
        layer.note_reading((keys if queries is None else queries)[index], mask, 0.5)
    cache.check_used(tokens.shape[1])
    cache.note(tokens)
    return visible
