"""What a measurement of llama.cpp runs. This needs no llama.cpp."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """How much is measured, and how."""

    new_tokens: int = 32
    """Tokens that every sequence decodes in a round."""
    rounds: int = 7
    """Rounds of each context."""
    threads: int = 1
    """Threads of llama.cpp."""
    batch: int = 1
    """Sequences. They use the adapters in turn; llama.cpp's own LoRA runs them one after another."""
    factors: str = "float16"
    """Element type of the adapters in ChunkWise: float16, float32 or int8."""
