"""Storage of keys and values in INT8."""

from __future__ import annotations

import torch
from torch import Tensor

ROOM = 16
"""Storage gets room for this number of slots or for a 20th of its slots, whichever is more."""


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

    def append(self, states: Tensor, room: int) -> None:
        """Quantise states (batch, heads, slots, head_dim) and add them after the used slots.

        Storage that is too small is enlarged, with room for more slots.
        """
        codes, scales = quantise(states if not len(self.other_heads) else states[:, self.int8_heads])
        self.codes = appended(self.codes, self.used, codes, room)
        self.scales = appended(self.scales, self.used, scales, room)
        self.others = appended(self.others, self.used, states[:, self.other_heads], room)
        self.used += states.shape[2]

    def pick(self, slots: Tensor) -> None:
        """Keep only `slots` (batch, n), in that order, and free the room after them."""
        self.codes, self.scales, self.others = (take(t, slots) for t in (self.codes, self.scales, self.others))
        self.used = slots.shape[1]

    def select(self, sequences: Tensor) -> None:
        """Keep only `sequences` of the batch, in that order."""
        self.codes, self.scales, self.others = (t[sequences] for t in (self.codes, self.scales, self.others))

    def read(self, hot: Tensor) -> Tensor:
        """Return (batch, heads, slots, head_dim) all states, followed by `hot` (batch, heads, hot slots, head_dim)."""
        codes, scales, others = (t[:, :, : self.used] for t in (self.codes, self.scales, self.others))
        states = hot.new_empty((*hot.shape[:2], self.used + hot.shape[2], hot.shape[3]))
        states[:, :, self.used :] = hot
        if not len(self.other_heads):
            states[:, :, : self.used] = dequantise(codes, scales, hot.dtype)
        else:
            states[:, self.int8_heads, : self.used] = dequantise(codes, scales, hot.dtype)
            states[:, self.other_heads, : self.used] = others.to(hot.dtype)
        return states

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
    wide = states.float()
    peaks = torch.maximum(wide.amax(-1, keepdim=True), -wide.amin(-1, keepdim=True))
    scales = (peaks / 127).clamp_min(torch.finfo(torch.float32).tiny).bfloat16()
    return (wide / scales.float()).round_().clamp_(-127, 127).to(torch.int8), scales


def dequantise(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return codes (..., head_dim) times scales (..., 1) in `dtype`."""
    return codes * scales if dtype == torch.bfloat16 else (codes * scales.float()).to(dtype)


def take(states: Tensor, slots: Tensor) -> Tensor:
    """Return (batch, heads, n, head_dim) the given slots (batch, n) of states (batch, heads, slots, head_dim)."""
    if len(slots) == 1:
        return states.index_select(2, slots[0])
    return states.gather(2, slots[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))


def appended(storage: Tensor, used: int, states: Tensor, room: int) -> Tensor:
    """Return `storage` (batch, heads, slots, width) with `states` after its `used` slots.

    Storage that is too small is enlarged, with `room` for more slots.
    """
    end = used + states.shape[2]
    if end <= storage.shape[2]:
        storage[:, :, used:end] = states
        return storage
    parts = [storage[:, :, :used], states.to(storage.dtype)]
    if used and room:  # the first states, often a whole prompt, get none: KV decisions may soon remove many of them
        parts.append(storage.new_empty((*storage.shape[:2], room, storage.shape[3])))
    return torch.cat(parts, dim=2)


def enlarged(storage: Tensor, used: int, room: int) -> Tensor:
    """Return `storage` (batch, heads, slots, width) with its `used` slots and room for more."""
    return torch.cat([storage[:, :, :used], storage.new_empty((*storage.shape[:2], room, storage.shape[3]))], dim=2)
