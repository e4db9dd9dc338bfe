"""What a scheduler gives to an engine: a plan for the next tokens, and a record of each chunk."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from chunkwise_lora.method.chunking import Chunk
from chunkwise_lora.method.kv_policy import KVDecision
from chunkwise_lora.method.selection import Selection


@dataclass(frozen=True)
class Plan:
    """What an engine does for the next tokens of one sequence."""

    weights: np.ndarray
    """(tokens, rungs) float32, the weight of each rung for each token."""
    decisions: list[KVDecision]
    """KV decisions to carry out, in order, once these tokens are in the cache."""


@dataclass(frozen=True)
class ScheduledChunk:
    """A chunk and everything that was decided for it."""

    chunk: Chunk
    selection: Selection
    kv: KVDecision | None = None
    """None while the chunk is open, or if it holds only attention sinks."""
