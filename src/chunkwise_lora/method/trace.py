"""What a generation did: chunks, ranks, KV decisions and bytes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from chunkwise_lora.method.scheduler import ScheduledChunk


@dataclass(frozen=True)
class SequenceTrace:
    """One sequence of a batch."""

    adapter: str | None
    """None for the base model."""
    tokens: tuple[int, ...]
    """Token ids that were run, without padding."""
    ranks: tuple[float, ...]
    """Each token's rank, averaged over modules by cost and over rungs by gate."""
    chunks: tuple[ScheduledChunk, ...]

    @property
    def mean_rank(self) -> float:
        """Mean of `ranks`."""
        return sum(self.ranks) / max(len(self.ranks), 1)


@dataclass(frozen=True)
class Trace:
    """A whole call of generate."""

    sequences: tuple[SequenceTrace, ...]
    passes: int
    """Forward passes of the model."""
    adapter_bytes_read: int
    """Bytes of adapter factors that the passes read, counted once per pass."""
    kv_bytes: int
    """Bytes of storage that the cache held at the end, all sequences and layers, with its room for tokens to come."""
    kv_bytes_full: int
    """Bytes that a full-precision cache would have held."""
    kv_notes: tuple[str, ...]
    """Which KV decisions were left undone, and why."""
    scheduler_seconds: float
    """Time spent in planning, over all passes."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)
