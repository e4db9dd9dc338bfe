"""What a generation did: chunks, ranks, KV decisions and bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from chunkwise_lora.coloured_text import ColouredText
from chunkwise_lora.method.plan import ScheduledChunk


@dataclass(frozen=True)
class SequenceTrace:
    """One sequence of a batch."""

    adapter: str | None
    """The adapter's name; None for the base model."""
    tokens: tuple[int, ...]
    """Token ids that the model read, without padding."""
    ranks: tuple[float, ...]
    """(tokens,) the rank of each token: the mean over modules, weighted by cost (in + out)."""
    full_rank: float
    """The rank of the adapter's highest rung."""
    chunks: tuple[ScheduledChunk, ...]
    """All chunks; the last one was still open."""

    @property
    def mean_rank(self) -> float:
        """Mean of `ranks`."""
        return sum(self.ranks) / max(len(self.ranks), 1)

    def first(self, length: int) -> SequenceTrace:
        """What was done for the first `length` tokens."""
        chunks = tuple(one for one in self.chunks if one.chunk.start < length)
        return replace(self, tokens=self.tokens[:length], ranks=self.ranks[:length], chunks=chunks)


@dataclass(frozen=True)
class Trace:
    """What one call of `generate` did."""

    sequences: tuple[SequenceTrace, ...]
    """One per row of the batch."""
    passes: int
    """Forward passes of the model."""
    adapter_bytes_read: int
    """Bytes of adapter weights that the passes read. Weights that a pass reads for several tokens count once."""
    kv_bytes: int
    """Bytes of the cache in use at the end, over all sequences and layers."""
    kv_bytes_reserved: int
    """Bytes of storage that the cache held at the end, with room for later tokens."""
    kv_bytes_full: int
    """Bytes that the same tokens would take in the model's precision, without room for later tokens."""
    kv_notes: tuple[str, ...]
    """Which KV decisions the engine did not carry out, and why."""
    notes: tuple[str, ...]
    """What did not run by plan, but in PEFT at full rank."""
    scheduler_seconds: float
    """Seconds spent on planning, over all passes."""

    @property
    def mean_ranks(self) -> dict[str, float]:
        """By adapter name, the mean rank of all tokens that ran with it. Sequences without an adapter have no entry."""
        ranks: dict[str, list[float]] = {}
        for sequence in self.sequences:
            if sequence.adapter is not None:
                ranks.setdefault(sequence.adapter, []).extend(sequence.ranks)
        return {adapter: sum(values) / max(len(values), 1) for adapter, values in ranks.items()}

    def coloured(self, tokenizer: Any = None, prompt_tokens: int | Sequence[int] = 0) -> ColouredText:
        """The texts coloured by rank, for notebooks.

        Args:
            tokenizer: The tokenizer of the model, or the model of llama-cpp-python; None shows token ids.
            prompt_tokens: How many tokens of each sequence, or of all, are the prompt, which is shown in italics.
        """
        return ColouredText(self, tokenizer, prompt_tokens)

    def _repr_html_(self) -> str:
        return self.coloured()._repr_html_()
