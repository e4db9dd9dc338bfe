"""Component 5: what becomes of a closed chunk's keys and values? (paper, KV-cache policy controller)

Decisions only. An engine carries them out, in its own storage, and names those it cannot.
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
    duplicate_similarity: float | None = None
    """Besides: drop a token whose key has a cosine above this with the next token's."""


class KVCachePolicyController:
    """Streams closed chunks of one sequence into decisions.

    A chunk gets its level's policy when it closes, and is dropped when it lies `max_age` tokens behind. The first
    `sinks` tokens, to which attention returns throughout (Xiao et al., arXiv 2309.17453), are left alone.
    """

    def __init__(self, config: KVCacheConfig) -> None:
        self.config = config
        self._expiries: list[tuple[int, int, int]] = []

    def close(self, chunk: Chunk) -> KVDecision | None:
        """The decision for a chunk that has just ended; None where it holds nothing but sinks."""
        assert chunk.end is not None
        start = max(chunk.start, self.config.sinks)
        if start >= chunk.end:
            return None
        policy = self.config.levels[chunk.level]
        if policy.max_age is not None:
            heapq.heappush(self._expiries, (chunk.end + policy.max_age, start, chunk.end))
        action = "keep" if policy.precision == "full" else policy.precision
        return KVDecision(start, chunk.end, action, policy.duplicate_similarity)

    def expire(self, position: int) -> list[KVDecision]:
        """Decisions to drop what is too old once the token at `position` has come."""
        expired = []
        while self._expiries and self._expiries[0][0] <= position:
            _, start, end = heapq.heappop(self._expiries)
            expired.append(KVDecision(start, end, "drop"))
        return expired
