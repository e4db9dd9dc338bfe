"""GPU kernels for the adapter product of one linear layer: shrink, gate and expand, each only up to the rank in use.

For token t with adapter a, weights w over a's rungs and the slice of the layer's output that starts at `offset`:

    y[t, offset:offset + out] += up_a (g * (down_a x[t])),    g[j] = sum_i w[i] * (ranks_a[i] > j)

One batch may mix adapters, rungs, cross-fades, scales, tokens without an adapter, prefill and decode. The work is
planned once per forward pass and shared by all layers: a `Schedule` sorts the tokens by adapter and highest rung and
cuts them into blocks. A layer's `AdapterTable` holds the addresses of each adapter's own factors, so adapters of
different rank need no padding. Every layer takes two launches, for any batch:

    shrink  x (tokens, in)       ->  gated hidden (tokens, rank), in float32
    expand  hidden               ->  added to y (tokens, out)

Both skip blocks without an adapter, slices that the adapter does not change, and directions at or above the block's
highest rank. A direction below that rank is computed even if its gate is 0.

CUDA graphs: grids and memory depend on shapes alone (tokens of the pass, slots, the table's largest rank), no call
waits for the GPU, and `Schedule.update`, `AdapterTable.set` and `AdapterTable.remove` write in place. So a captured
pass stays valid for every content of its schedule and its tables until a table grows. Sums have a fixed order, so the
same pass gives the same bits.

This module needs Triton, which CUDA builds of PyTorch bring. On CPU tensors it runs in Triton's interpreter
(`TRITON_INTERPRET=1`, set before Triton is first imported), for tests.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(a, b, sum, WIDEN: tl.constexpr):
    """sum + a @ b in float32; WIDEN for Triton's interpreter, which multiplies no bfloat16."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sum, input_precision="ieee")


@triton.jit(do_not_specialize=["tokens"])  # else a new number of tokens compiles it again while serving
def shrink_kernel(
    x,  # (tokens, in)
    hidden,  # (splits, slices, tokens, MAX_RANK) float32, by place in the order
    addresses,  # (slots, slices, 2)
    ranks,  # (slots, slices, rungs)
    blocks,  # (blocks, 4)
    order,  # (tokens,)
    weights,  # (tokens, rungs)
    x_stride,
    in_features,
    tokens,
    SLICES: tl.constexpr,
    RUNGS: tl.constexpr,
    MAX_RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """hidden = g * (down x): one split of the inputs, BLOCK_R directions, one block of tokens and one slice."""
    split, first_direction = tl.program_id(0) % SPLITS, tl.program_id(0) // SPLITS * BLOCK_R
    block, slice = blocks + 4 * tl.program_id(1), tl.program_id(2)
    slot, rung = tl.load(block + 2), tl.load(block + 3)
    if slot < 0:
        return
    entry = slot * SLICES + slice
    rank = tl.load(ranks + entry * RUNGS + rung)
    if first_direction >= rank:
        return

    member = tl.arange(0, BLOCK_T)
    place, in_block = tl.load(block) + member, member < tl.load(block + 1)
    row = tl.load(order + place, mask=in_block, other=0)
    direction = first_direction + tl.arange(0, BLOCK_R)
    in_rank = direction < rank

    down = tl.multiple_of(tl.load(addresses + 2 * entry).to(tl.pointer_type(x.dtype.element_ty)), 16)
    x_rows = x + row.to(tl.int64)[:, None] * x_stride
    down_rows = down + direction[None, :] * in_features
    size = tl.cdiv(in_features, SPLITS * BLOCK_K) * BLOCK_K
    end = tl.minimum((split + 1) * size, in_features)
    projected = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(split * size, end, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        inside = column < end
        x_tile = tl.load(x_rows + column[None, :], mask=in_block[:, None] & inside[None, :], other=0.0)
        down_tile = tl.load(down_rows + column[:, None], mask=inside[:, None] & in_rank[None, :], other=0.0)
        projected = dot(x_tile, down_tile, projected, WIDEN)

    gates = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for i in range(0, rung + 1):
        weight = tl.load(weights + row * RUNGS + i, mask=in_block, other=0.0)
        gates += tl.where((tl.load(ranks + entry * RUNGS + i) > direction)[None, :], weight[:, None], 0.0)
    target = hidden + ((split * SLICES + slice) * tokens + place)[:, None] * MAX_RANK + direction[None, :]
    tl.store(target, gates * projected, mask=in_block[:, None] & in_rank[None, :])


@triton.jit(do_not_specialize=["tokens"])
def expand_kernel(
    y,  # (tokens, total out)
    hidden,  # (splits, slices, tokens, MAX_RANK) float32, by place in the order
    addresses,  # (slots, slices, 2)
    ranks,  # (slots, slices, rungs)
    blocks,  # (blocks, 4)
    order,  # (tokens,)
    spans,  # (slices, 2): offset and width
    y_stride,
    tokens,
    SLICES: tl.constexpr,
    RUNGS: tl.constexpr,
    MAX_RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """y += up hidden: BLOCK_N outputs of one block of tokens and one slice."""
    block, slice = blocks + 4 * tl.program_id(1), tl.program_id(2)
    slot, rung = tl.load(block + 2), tl.load(block + 3)
    if slot < 0:
        return
    entry = slot * SLICES + slice
    rank = tl.load(ranks + entry * RUNGS + rung)
    offset, width = tl.load(spans + 2 * slice), tl.load(spans + 2 * slice + 1)
    first_column = tl.program_id(0) * BLOCK_N
    if (rank == 0) | (first_column >= width):
        return
    if ALIGNED:
        offset, width = tl.multiple_of(offset, 16), tl.multiple_of(width, 16)

    member = tl.arange(0, BLOCK_T)
    place, in_block = tl.load(block) + member, member < tl.load(block + 1)
    row = tl.load(order + place, mask=in_block, other=0)
    column = first_column + tl.arange(0, BLOCK_N)
    inside = column < width

    up = tl.multiple_of(tl.load(addresses + 2 * entry + 1).to(tl.pointer_type(y.dtype.element_ty)), 16)
    added = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for start in range(0, rank, BLOCK_R):
        direction = start + tl.arange(0, BLOCK_R)
        in_rank = direction < rank
        gated = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
        for split in tl.static_range(SPLITS):
            source = hidden + ((split * SLICES + slice) * tokens + place)[:, None] * MAX_RANK + direction[None, :]
            gated += tl.load(source, mask=in_block[:, None] & in_rank[None, :], other=0.0)
        up_tile = tl.load(
            up + direction[:, None] * width + column[None, :], mask=in_rank[:, None] & inside[None, :], other=0.0
        )
        added = dot(gated.to(up_tile.dtype), up_tile, added, WIDEN)

    target = y + row.to(tl.int64)[:, None] * y_stride + offset + column[None, :]
    mask = in_block[:, None] & inside[None, :]
    tl.store(target, (tl.load(target, mask=mask, other=0.0) + added).to(y.dtype.element_ty), mask=mask)
