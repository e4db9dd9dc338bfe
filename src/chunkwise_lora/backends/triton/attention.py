"""Attention of one token per sequence over a KV cache on a GPU, split over the slots. Importing this needs Triton.

A layer's cache has a *hot* pool in the model's precision and, behind it, maybe a *cold* pool in INT8. Every byte of a
slot in use is read once, and only for sequences that see the slot. The kernels find storage and sizes in two tensors:

    pools  (POOLS,) int64   where the storage of a layer lies: it changes only when the storage does
    step   (STEP,) int64    what changes with every pass, for all layers: slots in use, and the mask

So a CUDA graph that was captured with these tensors serves any cache: they are filled again before each replay.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from chunkwise_lora.backends.triton.attention_kernels import append_kernel, attend_kernel, combine_kernel

POOLS = 12
"""Numbers per layer: addresses of hot keys, hot values; hot room; addresses of the codes, scales and other heads of
cold keys, then of cold values; cold room; number of INT8 heads; address of the places of heads (int32)."""
STEP = 4
"""Cold slots in use; hot slots in use; address of the mask (uint8), 0 if all slots are seen; bytes per row of it."""

BLOCK_SLOTS = 64
"""Slots that a program reads at once."""
PROGRAMS = 1024
"""About the number of programs that keep a GPU busy. The slots are split so that there are as many."""
MOST_SPLITS = 64


def attend(query: Tensor, pools: Tensor, step: Tensor, heads: int, scaling: float) -> Tensor:
    """Return (batch, 1, query heads, head_dim): attention of one token per sequence to the slots in use.

    Args:
        query: (batch, query heads, 1, head_dim), in the dtype of the hot pool; the last dimension contiguous.
        pools: (POOLS,) int64, the layer's storage. Every pool is contiguous: hot (batch, heads, room, head_dim), codes
            (batch, INT8 heads, room, head_dim) int8, scales (batch, INT8 heads, room) bfloat16, other heads like hot.
        step: (STEP,) int64.
        heads: KV heads; they divide the query heads.
        scaling: Factor of the scores.
    """
    batch, query_heads, _, width = query.shape
    splits = max(1, min(MOST_SPLITS, triton.next_power_of_2(PROGRAMS // (batch * heads))))
    group, block_width = query_heads // heads, max(16, triton.next_power_of_2(width))
    partial = torch.empty(batch, query_heads, splits, width, device=query.device)
    norms = torch.empty(batch, query_heads, splits, 2, device=query.device)
    output = query.new_empty(batch, 1, query_heads, width)
    with torch.cuda.device_of(query):
        attend_kernel[(batch * heads, splits)](
            query,
            partial,
            norms,
            pools,
            step,
            scaling,
            query.stride(0),
            query.stride(1),
            HEADS=heads,
            GROUP=group,
            WIDTH=width,
            SPLITS=splits,
            BLOCK_G=max(16, triton.next_power_of_2(group)),
            BLOCK_D=block_width,
            BLOCK_N=BLOCK_SLOTS,
            WIDEN=query.device.type == "cpu",  # the interpreter
        )
        combine_kernel[(batch * query_heads,)](partial, norms, output, WIDTH=width, SPLITS=splits, BLOCK_D=block_width)
    return output


def append(keys: Tensor, values: Tensor, pools: Tensor, step: Tensor) -> None:
    """Write keys and values (batch, heads, 1, head_dim) of a new token into the last hot slot in use.

    Their last dimension is contiguous, and their dtype that of the hot pool.
    """
    batch, heads, _, width = keys.shape
    with torch.cuda.device_of(keys):
        append_kernel[(batch * heads,)](
            keys,
            values,
            pools,
            step,
            keys.stride(0),
            keys.stride(1),
            values.stride(0),
            values.stride(1),
            HEADS=heads,
            WIDTH=width,
            BLOCK_D=triton.next_power_of_2(width),
        )


def on_device(numbers: Sequence[int], target: Tensor) -> None:
    """Copy numbers to `target`, an int64 tensor of the same length, without waiting for its device."""
    source = torch.tensor(numbers, dtype=torch.int64)
    if target.is_cuda:
        # PyTorch reuses pinned memory only after the copy: the next call cannot overwrite this one's numbers.
        source = source.pin_memory()
    target.copy_(source, non_blocking=True)
