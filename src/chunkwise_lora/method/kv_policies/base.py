"""What a KV policy is, and the registry of KV policies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from chunkwise_lora.method.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor


class KVPolicy(ABC):
    """Scores the tokens of a closed chunk, so that those with the lowest scores can leave the KV cache.

    `LevelKVPolicy.evict` names the policy and `LevelKVPolicy.keep_share` says how many tokens stay. All layers and
    heads hold the same tokens, so one decision is made per token: an engine averages the scores over layers and heads.
    A policy has no state. It sees one closed chunk of one sequence, without the attention sinks at the start of the
    sequence, which always stay. Therefore its result does not depend on how the tokens were cut into forward passes.

    A subclass is usually a dataclass whose fields are its settings, with defaults.
    """

    needs_queries: ClassVar[bool] = False
    """Whether the policy reads queries. An engine records queries only for such a policy, because they take memory
    while a chunk is open. An engine that cannot see queries does not carry out the policy, and reports that."""

    @abstractmethod
    def score(self, keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
        """Score the tokens of one closed chunk.

        Args:
            keys: (layers, heads, tokens, head_dim) float32, as the cache holds them, positions included.
            values: (layers, heads, tokens, head_dim) float32.
            queries: (layers, query heads, tokens, head_dim) float32, positions and the model's scaling of attention
                included: `softmax(queries @ keys)` is attention. Query head h reads head h // (query heads // heads).
                Without `needs_queries` it has 0 query heads.

        Returns:
            (..., tokens) scores; higher scores stay. Leading dimensions, such as layers and heads, are averaged.
        """


KV_POLICY_REGISTRY: Registry[KVPolicy] = Registry("KV policy")
register_kv_policy = KV_POLICY_REGISTRY.register


def needs_queries(name: str | None) -> bool:
    """Return whether the registered policy `name` reads queries; None means no policy."""
    return name is not None and KV_POLICY_REGISTRY.create(name).needs_queries
