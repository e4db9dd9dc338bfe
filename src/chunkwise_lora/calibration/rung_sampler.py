"""Rung samplers: they choose the rungs at which a gradient descent runs a text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from chunkwise_lora.method.scheduler import RuntimeScheduler

CHUNK = 16
"""Tokens that share a random rung. The rungs change within a sequence, as they do under a policy."""
MAX_SHIFT = 1
"""Largest shift of a planned sequence, in rungs. It trains the rungs next to the planned ones, too."""


class RungSampler(Protocol):
    """Chooses a rung for every token."""

    def __call__(self, tokens: Tensor, generator: torch.Generator) -> Tensor:
        """Sample (sequences, tokens) int64 rungs for token ids (sequences, tokens)."""
        ...


@dataclass(frozen=True)
class RandomRungs:
    """Samples a uniformly random rung for every chunk of tokens."""

    lowest: int
    """Lowest rung that is sampled."""
    end: int
    """One more than the highest rung that is sampled."""
    chunk: int = CHUNK
    """Tokens that share a rung."""

    def __call__(self, tokens: Tensor, generator: torch.Generator) -> Tensor:
        """Sample (sequences, tokens) int64 rungs for token ids (sequences, tokens)."""
        sequences, length = tokens.shape
        of_chunks = torch.randint(self.lowest, self.end, (sequences, -(-length // self.chunk)), generator=generator)
        return of_chunks.repeat_interleave(self.chunk, dim=1)[:, :length]


@dataclass(frozen=True)
class PlannedRungs:
    """Takes the rungs that a policy plans, and shifts all rungs of a sequence by the same random step of -1, 0 or 1."""

    new_scheduler: Callable[[], RuntimeScheduler]
    """Makes the scheduler of a new sequence."""
    lowest: int
    """Lower rungs are raised to this one."""
    end: int
    """Rungs are lowered to at most one less than this."""

    def __call__(self, tokens: Tensor, generator: torch.Generator) -> Tensor:
        """Sample (sequences, tokens) int64 rungs for token ids (sequences, tokens)."""
        planned = np.stack([self.new_scheduler().step(row).weights.argmax(1) for row in tokens.tolist()])
        shift = torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, (len(tokens), 1), generator=generator)
        return (torch.from_numpy(planned) + shift).clamp(self.lowest, self.end - 1)
