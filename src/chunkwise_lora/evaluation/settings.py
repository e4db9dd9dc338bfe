"""How much an evaluation does."""

from __future__ import annotations

from dataclasses import dataclass

from chunkwise_lora.evaluation.data import NEW_TOKENS
from chunkwise_lora.evaluation.processes import ALONE, Processes


@dataclass(frozen=True)
class EvaluationSettings:
    """How much of the data is evaluated, and how."""

    limit: int | None = None
    """Largest number of windows of text, or of examples; None takes all."""
    stride: int | None = None
    """Tokens from the start of one window of text to the start of the next; by default windows do not overlap."""
    new_tokens: int = NEW_TOKENS
    """Largest number of tokens of an answer."""
    batch: int = 16
    """Windows or prompts that run together."""
    processes: Processes = ALONE
    """The processes that share the work. All of them must evaluate the same, and get the same results."""
