"""Which tokens of a pass run together on a GPU: blocks of tokens of one adapter, sorted by their highest rung.

This module does not need Triton.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from chunkwise_lora.errors import EngineError
from chunkwise_lora.method.segments import highest_rungs


class Tiles(NamedTuple):
    """The part of a matrix that one program computes."""

    tokens: int
    directions: int
    inputs: int
    outputs: int
    splits: int
    """Largest number of programs that share the sum over a layer's inputs."""


SMALL_BLOCKS_UP_TO = 256
"""A pass of at most this number of tokens has small blocks and split inputs, so that the whole GPU has work."""

FEW = Tiles(tokens=16, directions=16, inputs=128, outputs=128, splits=16)
MANY = Tiles(tokens=64, directions=32, inputs=64, outputs=128, splits=1)


def tiles_of(tokens: int) -> Tiles:
    """Return the tiles of a pass. They depend only on its number of tokens."""
    return FEW if tokens <= SMALL_BLOCKS_UP_TO else MANY


def most_blocks(tokens: int, slots: int) -> int:
    """Return the largest number of blocks of a pass, for any distribution of its tokens over the adapters."""
    size = tiles_of(tokens).tokens
    return min(tokens, (tokens + min(tokens, slots) * (size - 1)) // size)


class Schedule:
    """The blocks of tokens of a forward pass. All layers share it, and it is filled before each pass."""

    def __init__(self, max_tokens: int, slots: int, rungs: int, device: torch.device | str) -> None:
        """Reserve memory on `device` for passes of up to `max_tokens` tokens, over `slots` adapters of up to `rungs`
        rungs."""
        self.max_tokens, self.slots, self.rungs = max_tokens, slots, rungs
        self.tokens = 0
        """Rows of x in the coming pass, padding included."""
        self.idle = True
        """Whether no token of the coming pass has an adapter, so that all layers may be skipped."""
        most = max(most_blocks(min(max_tokens, SMALL_BLOCKS_UP_TO), slots), most_blocks(max_tokens, slots))
        with torch.inference_mode(False):  # so that passes outside of inference mode may fill it, too
            self.order = torch.zeros(max_tokens, dtype=torch.int32, device=device)
            """(max_tokens,) int32 rows of x, sorted by slot, then highest rung first."""
            self.weights = torch.zeros(max_tokens, rungs, device=device)
            """(max_tokens, rungs) float32 weights over the rungs, by row of x."""
            self.blocks = torch.full((most, 4), -1, dtype=torch.int32, device=device)
            """(blocks, 4) int32: first place in `order`, number of tokens, slot or -1 where unused, highest rung."""

    def update(self, slots: np.ndarray, weights: np.ndarray, tokens: int | None = None) -> None:
        """Fill the schedule for the next pass. This queues copies and does not wait for the GPU.

        Args:
            slots: (n,) integers, each token's slot in the tables; -1 for a token without an adapter.
            weights: (n, rungs) each token's weights over its adapter's rungs. Scales are part of them. Two weights that
                are not 0 make a cross-fade; weights that are all 0 turn the adapter off.
            tokens: Number of rows of x if it is above n, as in a padded pass of a CUDA graph. The other rows get no
                adapter.

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
    """Sort the tokens that have an adapter, and cut the tokens of each adapter into blocks of up to `size`.

    Tokens of neighbouring rungs share a block, which runs up to their highest rung. The highest rungs come first, so
    the longest blocks start first.

    Args:
        slots: (n,) as for `Schedule.update`.
        weights: (n, rungs) as for `Schedule.update`.
        size: Largest number of tokens per block.

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
