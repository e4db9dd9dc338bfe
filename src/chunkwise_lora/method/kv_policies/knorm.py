"""The KV policy `knorm`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from chunkwise_lora.method.kv_policies.base import KVPolicy, register_kv_policy

if TYPE_CHECKING:
    from torch import Tensor


@register_kv_policy("knorm")
@dataclass(frozen=True)
class Knorm(KVPolicy):
    """Keeps the tokens whose keys have the smallest L2 norm: they tend to receive the most attention.

    Source: Devoto et al., A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression (arXiv 2406.11430).
    """

    def score(self, keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
        """Return (layers, heads, tokens) the negative norms of the keys."""
        return -keys.norm(dim=-1)
