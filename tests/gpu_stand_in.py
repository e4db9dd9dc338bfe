"""Stands for a GPU in tests of the engine: kernels in PyTorch that read the same tensors and addresses.

The Triton kernels themselves run in the interpreter in other tests; it takes a second for what a kernel does in
microseconds.
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from chunkwise_lora.backends import registry
from chunkwise_lora.backends import triton as on_triton
from chunkwise_lora.backends.triton import attention
from chunkwise_lora.backends.triton import backend as triton_backend
from chunkwise_lora.backends.triton.schedule import Schedule, most_blocks
from chunkwise_lora.backends.triton.table import AdapterTable
from chunkwise_lora.engines.transformers.cache.pool import dequantise


def at(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The memory at an address as a tensor."""
    count = torch.Size(shape).numel() * dtype.itemsize
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer((ctypes.c_char * count).from_address(address), dtype=dtype).view(shape)


def hot_pool(pools: list[int], which: int, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    batch, heads, width = shape
    return at(pools[which], (batch, heads, pools[2], width), dtype)


def cold_pool(pools: list[int], which: int, used: int, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """(batch, heads, used, width) keys or values of the cold pool."""
    batch, heads, width = shape
    room, int8 = pools[9], pools[10]
    codes = at(pools[3 + 3 * which], (batch, int8, room, width), torch.int8)
    scales = at(pools[4 + 3 * which], (batch, int8, room, 1), torch.bfloat16)
    others = at(pools[5 + 3 * which], (batch, heads - int8, room, width), dtype)
    states = torch.empty(batch, heads, used, width, dtype=dtype)
    for head, place in enumerate(at(pools[11], (heads,), torch.int32).tolist()):
        if place >= 0:
            states[:, head] = dequantise(codes[:, place, :used], scales[:, place, :used], dtype)
        else:
            states[:, head] = others[:, -1 - place, :used]
    return states


def attend(query: Tensor, pools: Tensor, step: Tensor, heads: int, scaling: float) -> Tensor:
    """`attention.attend`."""
    batch, query_heads, _, width = query.shape
    shape, numbers = (batch, heads, width), pools.tolist()
    cold, hot, mask, stride = step.tolist()
    states = []
    for which in range(2):
        parts = [hot_pool(numbers, which, shape, query.dtype)[:, :, :hot]]
        if cold:
            parts.insert(0, cold_pool(numbers, which, cold, shape, query.dtype))
        states.append(torch.cat(parts, 2).repeat_interleave(query_heads // heads, 1))
    scores = query.float() @ states[0].float().transpose(2, 3) * scaling
    for row in range(batch if mask else 0):
        seen = at(mask + row * stride, (cold + hot,), torch.bool)
        scores[row].masked_fill_(~seen, -torch.inf)
    return (scores.softmax(-1).nan_to_num() @ states[1].float()).to(query.dtype).transpose(1, 2).contiguous()


def append(keys: Tensor, values: Tensor, pools: Tensor, step: Tensor) -> None:
    """`attention.append`."""
    batch, heads, _, width = keys.shape
    for which, states in enumerate((keys, values)):
        pool = hot_pool(pools.tolist(), which, (batch, heads, width), keys.dtype)
        pool[:, :, int(step[1]) - 1] = states[:, :, 0]


def add(table: AdapterTable, y: Tensor, x: Tensor, schedule: Schedule) -> None:
    """`AdapterTable.add`."""
    for start, count, slot, _ in schedule.blocks[: most_blocks(len(x), table.slots)].tolist():
        rows = schedule.order[start : start + count].long()
        for i, pair in enumerate(table.factors[slot] if slot >= 0 else ()):
            if pair is not None:
                down, up = pair
                gates = schedule.weights[rows] @ (table.ranks[slot, i][:, None] > torch.arange(len(down))).float()
                offset, width = table._spans[i].tolist()
                y[rows, offset : offset + width] += ((x[rows] @ down.T) * gates).to(y.dtype) @ up


def install(patch: pytest.MonkeyPatch, kernels: bool = True) -> None:
    """Let the engine take a CPU for a GPU, until the end of the test. Without `kernels`, Triton's interpreter runs."""
    entry = registry._entries["triton"]
    chosen = registry._Entry(entry.load, lambda device, limits: True)
    patch.setattr(registry, "_entries", registry._entries | {"triton": chosen})
    for module in (on_triton, triton_backend):
        patch.setattr(module, "may_run", lambda device, limits: True)
    if not kernels:
        patch.setattr(attention, "PROGRAMS", 2)  # which run one after the other
        return
    patch.setattr(attention, "attend", attend)
    patch.setattr(attention, "append", append)
    patch.setattr(AdapterTable, "add", add)
