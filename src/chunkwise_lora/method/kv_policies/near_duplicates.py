"""The KV policy `near_duplicates`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from chunkwise_lora.method.kv_policies.base import KVPolicy, register_kv_policy

if TYPE_CHECKING:
    from torch import Tensor


@register_kv_policy("near_duplicates")
@dataclass(frozen=True)
class NearDuplicates(KVPolicy):
    """Keeps the tokens whose keys differ most from the next token's keys. The last token of a chunk always stays.

    `LevelKVPolicy.duplicate_similarity` applies this score with a fixed bound instead of a share. Source: arXiv
    2601.21109, KV-cache policy controller, which drops near-duplicate local keys without defining a measure.
    """

    def score(self, keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
        """Return (tokens,) the negative cosine with the next token's keys, over all layers and heads together."""
        products = (keys[:, :, :-1] * keys[:, :, 1:]).sum((0, 1, 3))
        squares = keys.square().sum((0, 1, 3))
        scores = keys.new_full((keys.shape[2],), float("inf"))
        scores[:-1] = -products / (squares[:-1] * squares[1:]).sqrt().clamp_min(1e-12)
        return scores
