"""Which tokens of a pass run together on a GPU: blocks of tokens of one adapter, sorted by their highest rung.

Needs no Triton.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from chunkwise_lora.errors import EngineError
from chunkwise_lora.method.segments import highest_rungs


class Tiles(NamedTuple):
    """How much of a matrix one program takes."""

    tokens: int
    directions: int
    inputs: int
    outputs: int
    splits: int
    """Up to so many programs share the sum over a layer's inputs."""


SMALL_BLOCKS_UP_TO = 256
"""Up to so many tokens a pass is taken for decode: small blocks, and inputs split so that all of the GPU reads."""

FEW = Tiles(tokens=16, directions=16, inputs=128, outputs=128, splits=16)
MANY = Tiles(tokens=64, directions=32, inputs=64, outputs=128, splits=1)


def tiles_of(tokens: int) -> Tiles:
    """The tiles of a pass, by its number of tokens alone."""
    return FEW if tokens <= SMALL_BLOCKS_UP_TO else MANY


def most_blocks(tokens: int, slots: int) -> int:
    """Blocks that a pass may need at most, however its tokens are spread over the adapters."""
    size = tiles_of(tokens).tokens
    return min(tokens, (tokens + min(tokens, slots) * (size - 1)) // size)


class Schedule:
    """Which tokens of a forward pass run together, and how far: shared by all layers, refilled before each pass."""

    def __init__(self, max_tokens: int, slots: int, rungs: int, device: torch.device | str) -> None:
        """Reserve memory on `device` for passes of up to `max_tokens` tokens, over `slots` adapters of up to `rungs`
        rungs."""
        self.max_tokens, self.slots, self.rungs = max_tokens, slots, rungs
        self.tokens = 0
        """Rows of x in the coming pass, padding included."""
        self.idle = True
        """Whether no token of the coming pass has an adapter, so that all layers may be skipped."""
        most = max(most_blocks(min(max_tokens, SMALL_BLOCKS_UP_TO), slots), most_blocks(max_tokens, slots))
        self.order = torch.zeros(max_tokens, dtype=torch.int32, device=device)
        """(max_tokens,) int32 rows of x, sorted by slot, then highest rung first."""
        self.weights = torch.zeros(max_tokens, rungs, device=device)
        """(max_tokens, rungs) float32 weights over the rungs, by row of x."""
        self.blocks = torch.full((most, 4), -1, dtype=torch.int32, device=device)
        """(blocks, 4) int32: first place in `order`, number of tokens, slot or -1 where unused, highest rung."""

    def update(self, slots: np.ndarray, weights: np.ndarray, tokens: int | None = None) -> None:
        """Set what the next pass runs. It only queues copies, and does not wait for the GPU.

        Args:
            slots: (n,) integers, each token's slot in the tables; -1 for a token without an adapter.
            weights: (n, rungs) each token's weights over its adapter's rungs. Scales are part of them; two non-zeros
                are a cross-fade; all zeros switch the adapter off.
            tokens: Rows of x where they are more than n, as in a CUDA graph's padded pass; the rest get no adapter.

        Raises:
            EngineError: A shape, a slot or the number of tokens does not fit.
        """
        n = len(slots)
        self.tokens = n if tokens is None else tokens
        if weights.shape != (n, self.rungs) or not n <= self.tokens <= self.max_tokens:
            raise EngineError(
                f"slots {slots.shape} and weights {weights.shape} for a pass of {self.tokens} tokens do not fit a "
                f"schedule of {self.rungs} rungs and up to {self.max_tokens} tokens"
            )
        if n and not -1 <= slots.min() <= slots.max() < self.slots:
            raise EngineError(f"slots must be from -1 to {self.slots - 1}, not {slots.min()} to {slots.max()}")
        order, blocks = plan_blocks(slots, weights, tiles_of(self.tokens).tokens)
        self.idle = not len(order)
        padded = np.full((most_blocks(self.tokens, self.slots), 4), -1, np.int32)
        padded[: len(blocks)] = blocks
        for target, values in (self.order, order), (self.weights, weights), (self.blocks, padded):
            source = torch.from_numpy(np.ascontiguousarray(values)).to(target.dtype)
            if target.is_cuda:
                # PyTorch reuses pinned memory only after the copy: the next update cannot overwrite this one's values.
                source = source.pin_memory()
            target[: len(source)].copy_(source, non_blocking=True)


def plan_blocks(slots: np.ndarray, weights: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Sort the tokens that have an adapter and cut each adapter's into blocks of up to `size`.

    Tokens of neighbouring rungs share a block, which runs to the highest of them; since the highest come first, the
    longest blocks start first.

    Args:
        slots: (n,) as for `Schedule.update`.
        weights: (n, rungs) as for `Schedule.update`.
        size: Tokens per block at most.

    Returns:
        `order` (m,) and `blocks` (b, 4), as in `Schedule`.
    """
    rows = np.flatnonzero((slots >= 0) & weights.any(axis=1))
    top = highest_rungs(weights)
    order = rows[np.lexsort((-top[rows], slots[rows]))]
    slots, top = slots[order], top[order]
    _, first, members = np.unique(slots, return_index=True, return_counts=True)
    place = np.arange(len(order)) - np.repeat(first, members)
    starts = np.flatnonzero(place % size == 0)
    counts = np.diff(starts, append=len(order))
    return order, np.stack([starts, counts, slots[starts], top[starts]], axis=1)
