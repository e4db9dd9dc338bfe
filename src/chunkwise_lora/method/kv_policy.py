"""Component 5: what happens to a closed chunk's keys and values? (arXiv 2601.21109, KV-cache policy controller)

This module makes the decisions. An engine carries them out in its own cache, and reports those that it does not
support.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Literal

from chunkwise_lora.method.chunking import Chunk
from chunkwise_lora.method.config import KVCacheConfig


@dataclass(frozen=True)
class KVDecision:
    """What to do with the cache entries of tokens `start` to `end` (exclusive)."""

    start: int
    end: int
    action: Literal["keep", "int8", "drop"]
    """Keep the entries as they are, store them as INT8, or drop them."""
    duplicate_similarity: float | None = None
    """In addition, drop a token whose keys have a cosine above this with the next token's; see `NearDuplicates`."""
    evict: str | None = None
    """In addition, drop the tokens that this registered KV policy scores lowest."""
    keep_share: float | None = None
    """The share of the tokens that `evict` keeps, in [0, 1]."""

    @property
    def scores_tokens(self) -> bool:
        """Whether a KV policy must score the tokens, which needs the keys, values or queries of the chunk."""
        return self.duplicate_similarity is not None or self.evict is not None

    @property
    def acts(self) -> bool:
        """Whether the decision changes anything in the cache."""
        return self.action != "keep" or self.scores_tokens


class KVCachePolicyController:
    """Decides what happens to the chunks of one sequence.

    A chunk gets the policy of its level when it closes. It is dropped once more than `max_age` tokens follow it. The
    first `sinks` tokens of a sequence are never changed, because all later tokens attend to them (Xiao et al., arXiv
    2309.17453).
    """

    def __init__(self, config: KVCacheConfig) -> None:
        self.config = config
        self._expiries: list[tuple[int, int, int]] = []

    def close(self, chunk: Chunk) -> KVDecision | None:
        """Return the decision for a chunk that has just ended; None if it holds only sinks."""
        assert chunk.end is not None
        start = max(chunk.start, self.config.sinks)
        if start >= chunk.end:
            return None
        policy = self.config.levels[chunk.level]
        if policy.max_age is not None:
            heapq.heappush(self._expiries, (chunk.end + policy.max_age, start, chunk.end))
        action = "keep" if policy.precision == "full" else policy.precision
        return KVDecision(start, chunk.end, action, policy.duplicate_similarity, policy.evict, policy.keep_share)

    def expire(self, position: int) -> list[KVDecision]:
        """Return decisions to drop the chunks that are too old once the token at `position` is in the cache."""
        expired = []
        while self._expiries and self._expiries[0][0] <= position:
            _, start, end = heapq.heappop(self._expiries)
            expired.append(KVDecision(start, end, "drop"))
        return expired
