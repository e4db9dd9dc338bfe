"""A scheduler whose plan is decided beforehand, for measurements and baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from chunkwise_lora.method.plan import Plan, ScheduledChunk


@dataclass
class FixedScheduler:
    """Gives every token of one sequence the rung that was chosen for it. It has no chunks and no KV decisions."""

    token_rungs: np.ndarray
    """(tokens,) int, the rung of each token."""
    rungs: int
    """Number of rungs of the ladder."""
    scale: float = 1.0
    """Factor on the adapter's output, for all tokens."""
    chunks: list[ScheduledChunk] = field(default_factory=list, init=False)
    """Always empty."""
    position: int = field(default=0, init=False)
    """Number of tokens planned so far."""

    def step(self, tokens: Sequence[int], entropies: Sequence[float | None] | None = None) -> Plan:
        """Return the plan of the next tokens; only their number matters."""
        start, self.position = self.position, self.position + len(tokens)
        weights = self.scale * np.eye(self.rungs, dtype=np.float32)[self.token_rungs[start : self.position]]
        return Plan(weights, [])
