"""Decides by the scores of KV policies which tokens of a closed chunk leave the KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from chunkwise_lora.errors import ConfigError
from chunkwise_lora.method.kv_policies import KV_POLICY_REGISTRY
from chunkwise_lora.method.kv_policy import KVDecision

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class ChunkStates:
    """Keys, values and queries of one closed chunk, from layers that have the same shape; see `KVPolicy.score`."""

    keys: Tensor
    """(layers, heads, tokens, head_dim) float32."""
    values: Tensor
    """(layers, heads, tokens, head_dim) float32."""
    queries: Tensor
    """(layers, query heads, tokens, head_dim) float32; 0 query heads if no policy needs them."""


def evicted_tokens(decision: KVDecision, states: Sequence[ChunkStates]) -> np.ndarray:
    """Return which tokens of a closed chunk leave the cache.

    Args:
        decision: The decision for the chunk.
        states: One entry per group of layers that have the same shape; usually one.

    Returns:
        (tokens,) bool, True for a token that is dropped. A token stays if neither `duplicate_similarity` nor `evict`
        drops it. Among equal scores, the later token stays.

    Raises:
        ConfigError: A registered policy returned scores of a wrong shape, or NaN.
    """
    dropped = np.zeros(states[0].keys.shape[2], bool)
    if decision.duplicate_similarity is not None:
        dropped |= token_scores("near_duplicates", states) < -decision.duplicate_similarity
    if decision.evict is not None and decision.keep_share is not None:
        scores = token_scores(decision.evict, states)
        kept = round(decision.keep_share * len(scores))
        dropped[np.argsort(scores, kind="stable")[: len(scores) - kept]] = True
    return dropped


def token_scores(policy: str, states: Sequence[ChunkStates]) -> np.ndarray:
    """Return (tokens,) float32 scores by the registered `policy`, averaged over heads and layers.

    Raises:
        ConfigError: The policy returned scores of a wrong shape, or NaN.
    """
    scorer = KV_POLICY_REGISTRY.create(policy)
    layers, tokens = sum(len(group.keys) for group in states), states[0].keys.shape[2]
    total = np.zeros(tokens, np.float32)
    for group in states:
        scores = scorer.score(group.keys, group.values, group.queries)
        if scores.ndim == 0 or scores.shape[-1] != tokens or not scores.numel():
            raise ConfigError(
                f"KV policy {policy!r}: score returned shape {tuple(scores.shape)} for {tokens} tokens; "
                "return (tokens,), or any leading dimensions before tokens"
            )
        total += scores.reshape(-1, tokens).float().mean(0).cpu().numpy() * np.float32(len(group.keys) / layers)
    if np.isnan(total).any():
        raise ConfigError(f"KV policy {policy!r}: score returned NaN; return a number for every token")
    return total
