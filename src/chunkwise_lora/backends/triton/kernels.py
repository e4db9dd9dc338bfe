"""What a batch's adapters add to one linear layer, on a GPU: shrink, gate, expand, each only up to the rank in use.

For token t with adapter a, weights w over a's rungs and the slice of the layer's output that starts at `offset`:

    y[t, offset:offset + out] += up_a (g * (down_a x[t])),    g[j] = sum_i w[i] * (ranks_a[i] > j)

One batch may mix adapters, rungs, cross-fades, scales, tokens without an adapter, prefill and decode. What runs is
decided once per forward pass and shared by all layers: a `Schedule` sorts the tokens by adapter and highest rung and
cuts them into blocks. A layer's `AdapterTable` holds the addresses of each adapter's own factors, so adapters of
different rank stand side by side without padding. Two launches per layer, whatever the batch holds:

    shrink  x (tokens, in)       ->  gated hidden (tokens, rank), in float32
    expand  hidden               ->  added to y (tokens, out)

Both skip what no token of a block asks for: blocks without an adapter, slices that it leaves alone, directions at or
above the block's highest rank. A gate of zero below that rank is multiplied, as in the formula.

CUDA graphs: grids and memory depend on shapes alone (tokens of the pass, slots, the table's largest rank), nothing
waits for the GPU, and `Schedule.update`, `AdapterTable.set` and `AdapterTable.remove` write in place. So a captured
pass stays valid for every content of its schedule and its tables until a table grows; the plug-in leaves graphs off.
Sums run in a fixed order: the same pass gives the same bits.

This module needs Triton, which CUDA builds of PyTorch bring. On CPU tensors it runs in Triton's interpreter
(`TRITON_INTERPRET=1`, set before Triton is first imported), for tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from chunkwise_lora.errors import EngineError
from chunkwise_lora.ladder import LadderModule
from chunkwise_lora.method.segments import highest_rungs

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


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


class Directions(NamedTuple):
    """The directions of one slice, as a `LadderModule` holds them, where there is no such module: a shard of one."""

    down: Tensor
    """(r, in)"""
    up: Tensor
    """(out, r)"""
    ranks: Sequence[int]
    """The rank on each rung, not falling, at most r."""


class AdapterTable:
    """The adapters of one linear layer, each in a slot with memory of its own."""

    def __init__(
        self,
        in_features: int,
        widths: Sequence[int],
        *,
        slots: int,
        max_rank: int,
        rungs: int,
        device: torch.device | str,
        dtype: torch.dtype,
        offsets: Sequence[int] | None = None,
    ) -> None:
        """An empty table.

        Args:
            in_features: Columns of x.
            widths: Columns of y per slice: one number for a plain layer, three for packed queries, keys and values.
            slots: Adapters at once.
            max_rank: The largest rank that any adapter may have. It costs memory of the pass, not of the adapters.
            rungs: Rungs of the schedules that this table is used with; adapters may have fewer.
            device: Where the layer is.
            dtype: Of x, y and the factors: float16, bfloat16 or float32.
            offsets: Where in y each slice starts; one after the other unless given.

        Raises:
            EngineError: The dtype is another one, or slices overlap.
        """
        starts = [sum(widths[:i]) for i in range(len(widths))] if offsets is None else list(offsets)
        spans = sorted(zip(starts, widths, strict=True))
        if any(start + width > following for (start, width), (following, _) in pairwise(spans)):
            raise EngineError(f"slices at {starts} of widths {list(widths)} overlap")
        if dtype not in DTYPES:
            raise EngineError(f"the Triton kernels take float16, bfloat16 and float32, not {dtype}")
        self.in_features, self.widths = in_features, tuple(widths)
        self.slots, self.max_rank, self.rungs = slots, max_rank, rungs
        self.out_features = max(start + width for start, width in spans)
        """Columns that y needs at least."""
        self.device, self.dtype = torch.device(device), dtype
        self.factors: list[list[tuple[Tensor, Tensor] | None]] = [[None] * len(widths) for _ in range(slots)]
        """Per slot and slice down (r, in) and up (r, out), or None."""
        self.addresses = torch.zeros(slots, len(widths), 2, dtype=torch.int64, device=device)
        """(slots, slices, 2) int64: where `down` and `up` are."""
        self.ranks = torch.zeros(slots, len(widths), rungs, dtype=torch.int32, device=device)
        """(slots, slices, rungs) int32; zeros where a slot or a slice has no adapter."""
        self._spans = torch.tensor([starts, widths], dtype=torch.int32, device=device).T.contiguous()
        self._aligned = all(number % 16 == 0 for span in spans for number in span)

    @classmethod
    def of(
        cls,
        adapters: Sequence[Sequence[LadderModule | Directions | None] | None],
        *,
        rungs: int | None = None,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> AdapterTable:
        """A table that just fits `adapters`: per slot the slices of one adapter, None for an empty slot or slice.

        Every slice needs an adapter in at least one slot, which tells its width. `rungs` is the largest number of
        rungs unless given.
        """
        columns = [[one for one in column if one] for column in zip(*filter(None, adapters), strict=True)]
        if not columns or not all(columns):
            raise EngineError(
                "a slice without an adapter in any slot has no known width; build an empty table, then set"
            )
        some = [one for column in columns for one in column]
        table = cls(
            some[0].down.shape[1],
            [column[0].up.shape[0] for column in columns],
            slots=len(adapters),
            max_rank=max(1, *(len(one.down) for one in some)),
            rungs=max(len(one.ranks) for one in some) if rungs is None else rungs,
            device=device,
            dtype=dtype,
        )
        for slot, adapter in enumerate(adapters):
            if adapter is not None:
                table.set(slot, adapter)
        return table

    def grow(self, max_rank: int, rungs: int) -> None:
        """Make room for adapters of a larger rank or more rungs, where these are larger than before.

        Kernels compile anew in the next pass, and passes captured before are no longer valid.
        """
        if rungs > self.rungs:
            last = self.ranks[..., -1:].expand(-1, -1, rungs - self.rungs)
            self.ranks, self.rungs = torch.cat([self.ranks, last], dim=-1), rungs
        self.max_rank = max(self.max_rank, max_rank)

    @property
    def nbytes(self) -> int:
        """Bytes of all factors, addresses and ranks on the device."""
        factors = [tensor for slot in self.factors for pair in slot if pair for tensor in pair]
        return sum(tensor.nbytes for tensor in (*factors, self.addresses, self.ranks, self._spans))

    def set(self, slot: int, adapter: Sequence[LadderModule | Directions | None]) -> None:
        """Put an adapter in a slot, in place of what was there.

        Factors that already lie on the device in the table's dtype and layout (`down` contiguous, `up` the transpose
        of a contiguous tensor) are not copied. Call it on the stream that runs the layer. A rung above an adapter's
        last one counts as its last one.

        Args:
            slot: 0 to slots - 1.
            adapter: Per slice its directions, or None where the adapter leaves it alone.

        Raises:
            EngineError: The adapter does not fit the table.
        """
        self._check(slot, adapter)
        pairs: list[tuple[Tensor, Tensor] | None] = [None] * len(self.widths)
        addresses = torch.zeros(len(self.widths), 2, dtype=torch.int64)
        ranks = torch.zeros(len(self.widths), self.rungs, dtype=torch.int32)
        for i, one in enumerate(adapter):
            if one is not None:
                pairs[i] = down, up = self._own(one.down), self._own(one.up.T)
                addresses[i] = torch.tensor([down.data_ptr(), up.data_ptr()])
                ranks[i] = torch.tensor([*one.ranks, *[one.ranks[-1]] * (self.rungs - len(one.ranks))])
        self._write(slot, pairs, addresses, ranks)

    def remove(self, slot: int) -> None:
        """Empty a slot and free its factors. Tokens that still name it get nothing."""
        slices = len(self.widths)
        ranks = torch.zeros(slices, self.rungs, dtype=torch.int32)
        self._write(slot, [None] * slices, torch.zeros(slices, 2, dtype=torch.int64), ranks)

    def add(self, y: Tensor, x: Tensor, schedule: Schedule) -> None:
        """Add to y, in place, what the scheduled adapters give for x. Where `schedule.idle`, the call may be left out.

        Args:
            y: (tokens, total out), rows contiguous.
            x: (tokens, in_features), rows contiguous.
            schedule: Updated for exactly these tokens.

        Raises:
            EngineError: Tensors, table and schedule do not fit together.
        """
        tokens = len(x)
        if (
            x.shape != (schedule.tokens, self.in_features)
            or len(y) != tokens
            or y.shape[1] < self.out_features
            or (self.slots, self.rungs) != (schedule.slots, schedule.rungs)
        ):
            raise EngineError(
                f"x {tuple(x.shape)}, y {tuple(y.shape)}, a table of {self.slots} slots, {self.rungs} rungs and "
                f"{self.in_features} to {self.out_features} features, and a schedule of {schedule.slots} slots, "
                f"{schedule.rungs} rungs and {schedule.tokens} tokens do not fit together"
            )
        if not (x.dtype == y.dtype == self.dtype and x.device == y.device == self.ranks.device):
            raise EngineError(
                f"x is {x.dtype} on {x.device}, y {y.dtype} on {y.device}, the table {self.dtype} on "
                f"{self.ranks.device}; they must be the same"
            )
        if x.stride(1) != 1 or y.stride(1) != 1:
            raise EngineError("the rows of x and y must be contiguous")
        if not tokens:
            return
        tiles, slices, blocks = tiles_of(tokens), len(self.widths), most_blocks(tokens, self.slots)
        splits = min(tiles.splits, triton.cdiv(self.in_features, 4 * tiles.inputs))
        hidden = torch.empty(splits, slices, tokens, self.max_rank, device=x.device)
        shared = {
            "SLICES": slices,
            "RUNGS": self.rungs,
            "MAX_RANK": self.max_rank,
            "SPLITS": splits,
            "BLOCK_T": tiles.tokens,
            "BLOCK_R": tiles.directions,
            "WIDEN": x.device.type == "cpu",  # the interpreter
        }
        shrink_kernel[(triton.cdiv(self.max_rank, tiles.directions) * splits, blocks, slices)](
            x,
            hidden,
            self.addresses,
            self.ranks,
            schedule.blocks,
            schedule.order,
            schedule.weights,
            x.stride(0),
            self.in_features,
            tokens,
            BLOCK_K=tiles.inputs,
            **shared,
        )
        expand_kernel[(triton.cdiv(max(self.widths), tiles.outputs), blocks, slices)](
            y,
            hidden,
            self.addresses,
            self.ranks,
            schedule.blocks,
            schedule.order,
            self._spans,
            y.stride(0),
            tokens,
            BLOCK_N=tiles.outputs,
            ALIGNED=self._aligned,
            **shared,
        )

    def _check(self, slot: int, adapter: Sequence[LadderModule | Directions | None]) -> None:
        if not 0 <= slot < self.slots:
            raise EngineError(f"slot {slot} is not one of 0 to {self.slots - 1}")
        if len(adapter) != len(self.widths):
            raise EngineError(f"an adapter of {len(adapter)} slices does not fit a layer of {len(self.widths)}")
        for one, width in zip(adapter, self.widths, strict=True):
            if one is None:
                continue
            rank, ranks = len(one.down), list(one.ranks)
            if one.down.shape != (rank, self.in_features) or one.up.shape != (width, rank):
                raise EngineError(
                    f"factors {tuple(one.down.shape)} and {tuple(one.up.shape)} do not fit a slice of "
                    f"{self.in_features} to {width} features"
                )
            if rank > self.max_rank or len(ranks) > self.rungs:
                raise EngineError(
                    f"an adapter of rank {rank} and {len(ranks)} rungs does not fit a table of up to rank "
                    f"{self.max_rank} and {self.rungs} rungs; raise its max_rank or rungs"
                )
            if not ranks or ranks != sorted(ranks) or ranks[0] < 0 or ranks[-1] > rank:
                raise EngineError(f"ranks {ranks} must rise from at least 0 to at most {rank}")

    def _own(self, factor: Tensor) -> Tensor:
        factor = factor.detach().to(self.device, self.dtype).contiguous()
        return factor if factor.data_ptr() % 16 == 0 else factor.clone()  # the kernels read 16 bytes at a time

    def _write(self, slot: int, pairs: list[tuple[Tensor, Tensor] | None], addresses: Tensor, ranks: Tensor) -> None:
        self.ranks[slot].copy_(ranks)
        self.addresses[slot].copy_(addresses)
        self.factors[slot] = pairs


@triton.jit
def dot(a, b, sum, WIDEN: tl.constexpr):
    """sum + a @ b in float32; WIDEN for Triton's interpreter, which multiplies no bfloat16."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sum, input_precision="ieee")


@triton.jit(do_not_specialize=["tokens"])  # no compilation in the middle of serving
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
