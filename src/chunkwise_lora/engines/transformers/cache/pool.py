"""Storage of keys and values in INT8."""

from __future__ import annotations

import torch
from torch import Tensor

ROOM = 16
"""Storage grows by at least this number of slots, or by a 32nd of its size, so that few steps copy it."""


class Int8Pool:
    """Keys or values of one layer: INT8 for `int8_heads`, the model's precision for the other heads.

    The tensors have room for more slots than the `used` ones.

    Args:
        template: (batch, heads, slots, head_dim) states whose shape, dtype and device the pool takes over.
        int8_heads: (n,) indices of the heads to store in INT8.
    """

    def __init__(self, template: Tensor, int8_heads: Tensor) -> None:
        batch, heads, _, width = template.shape
        every = torch.arange(heads, device=template.device)
        self.int8_heads = int8_heads
        self.other_heads = every[~torch.isin(every, int8_heads)]
        self.places = torch.empty_like(every, dtype=torch.int32)
        """(heads,) int32 the place of each head: p among the INT8 heads, or -1 - p for place p among the others."""
        self.places[self.int8_heads] = torch.arange(len(self.int8_heads)).to(self.places)
        self.places[self.other_heads] = -1 - torch.arange(len(self.other_heads)).to(self.places)
        self.used = 0
        self.codes = template.new_empty((batch, len(int8_heads), 0, width), dtype=torch.int8)
        self.scales = template.new_empty((batch, len(int8_heads), 0, 1), dtype=torch.bfloat16)
        self.others = template.new_empty((batch, len(self.other_heads), 0, width))

    def append(self, states: Tensor) -> None:
        """Quantise states (batch, heads, slots, head_dim) and add them after the used slots."""
        codes, scales = quantise(states[:, self.int8_heads])
        self.codes = appended(self.codes, self.used, codes)
        self.scales = appended(self.scales, self.used, scales)
        self.others = appended(self.others, self.used, states[:, self.other_heads])
        self.used += states.shape[2]

    def pick(self, slots: Tensor) -> None:
        """Keep only `slots` (batch, n), in that order, and free the room after them."""
        self.codes, self.scales, self.others = (take(t, slots) for t in (self.codes, self.scales, self.others))
        self.used = slots.shape[1]

    def select(self, sequences: Tensor) -> None:
        """Keep only `sequences` of the batch, in that order."""
        self.codes, self.scales, self.others = (t[sequences] for t in (self.codes, self.scales, self.others))

    def read(self, dtype: torch.dtype) -> Tensor:
        """Return (batch, heads, slots, head_dim) all states in `dtype`."""
        codes, scales, others = (t[:, :, : self.used] for t in (self.codes, self.scales, self.others))
        states = (codes * scales.float()).to(dtype)
        if not len(self.other_heads):
            return states
        both = states.new_empty((len(states), len(self.int8_heads) + len(self.other_heads), *states.shape[2:]))
        both[:, self.int8_heads], both[:, self.other_heads] = states, others.to(dtype)
        return both

    @property
    def used_nbytes(self) -> int:
        """Bytes of the slots in use."""
        return sum(tensor[:, :, : self.used].nbytes for tensor in (self.codes, self.scales, self.others))

    @property
    def nbytes(self) -> int:
        """Bytes of storage, with room for later tokens."""
        return sum(tensor.untyped_storage().nbytes() for tensor in (self.codes, self.scales, self.others))


def quantise(states: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise (..., head_dim) per token and head; return INT8 codes (..., head_dim), bfloat16 scales (..., 1)."""
    states = states.float()
    scales = (states.abs().amax(-1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny).bfloat16()
    return (states / scales.float()).round().clamp(-127, 127).to(torch.int8), scales


def take(states: Tensor, slots: Tensor) -> Tensor:
    """Return (batch, heads, n, head_dim) the given slots (batch, n) of states (batch, heads, slots, head_dim)."""
    if len(slots) == 1:
        return states.index_select(2, slots[0])
    return states.gather(2, slots[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))


def appended(storage: Tensor, used: int, states: Tensor) -> Tensor:
    """Return `storage` (batch, heads, room, width) with `states` after its `used` slots, enlarged if it is full."""
    end = used + states.shape[2]
    if end > storage.shape[2]:
        # The first states, often a whole prompt, get no room: the KV policy may soon drop or quantise many of them.
        room = end + max(ROOM, end // 32) if used else end
        larger = storage.new_empty((*storage.shape[:2], room, storage.shape[3]))
        larger[:, :, :used] = storage[:, :, :used]
        storage = larger
    storage[:, :, used:end] = states
    return storage
