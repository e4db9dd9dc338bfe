"""The adapters of one linear layer on a GPU, each in a slot with its own memory, and the kernel launches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from chunkwise_lora.backends.base import Columns
from chunkwise_lora.backends.triton import DTYPES
from chunkwise_lora.backends.triton.kernels import expand_kernel, shrink_kernel
from chunkwise_lora.backends.triton.schedule import Schedule, most_blocks, tiles_of
from chunkwise_lora.errors import EngineError
from chunkwise_lora.ladder import LadderModule


def adjacent(widths: Sequence[int]) -> list[Columns]:
    """Return columns of these widths, one after the other."""
    return [Columns(sum(widths[:i]), width) for i, width in enumerate(widths)]


class Directions(NamedTuple):
    """The directions of one slice, like those of a `LadderModule`, for example of a shard of a module."""

    down: Tensor
    """(r, in)"""
    up: Tensor
    """(out, r)"""
    ranks: Sequence[int]
    """The rank on each rung. Ranks never fall, and are at most r."""


class AdapterTable:
    """The adapters of one linear layer, each in a slot with its own memory."""

    def __init__(
        self,
        in_features: int,
        columns: Sequence[Columns],
        *,
        slots: int,
        max_rank: int,
        rungs: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        """An empty table.

        Args:
            in_features: Number of columns of x.
            columns: Columns of y for each slice: one slice for a plain layer, three for packed query, key and value.
            slots: Largest number of adapters at a time.
            max_rank: Largest rank of an adapter. It takes memory in each pass, but not for each adapter.
            rungs: Number of rungs of the schedules that this table is used with. Adapters may have fewer.
            device: The device of the layer.
            dtype: Dtype of x, y and the factors: float16, bfloat16 or float32.

        Raises:
            EngineError: The dtype is another one, or slices overlap.
        """
        spans = sorted((where.offset, where.width) for where in columns)
        if any(start + width > following for (start, width), (following, _) in pairwise(spans)):
            raise EngineError(f"the columns {spans} (offset, width) of a layer's modules overlap")
        if dtype not in DTYPES:
            raise EngineError(f"the Triton kernels take float16, bfloat16 and float32, not {dtype}")
        self.in_features, self.columns = in_features, tuple(columns)
        self.slots, self.max_rank, self.rungs = slots, max_rank, rungs
        self.out_features = max(start + width for start, width in spans)
        """Smallest number of columns of y."""
        self.device, self.dtype = torch.device(device), dtype
        self.factors: list[list[tuple[Tensor, Tensor] | None]] = [[None] * len(columns) for _ in range(slots)]
        """Per slot and slice: down (r, in) and up (r, out), or None."""
        with torch.inference_mode(False):  # so that slots can be set outside of inference mode, too
            self.addresses = torch.zeros(slots, len(columns), 2, dtype=torch.int64, device=device)
            """(slots, slices, 2) int64: addresses of `down` and `up`."""
            self.ranks = torch.zeros(slots, len(columns), rungs, dtype=torch.int32, device=device)
            """(slots, slices, rungs) int32; zeros where a slot or a slice has no adapter."""
        self._spans = torch.tensor([[where.offset, where.width] for where in columns], dtype=torch.int32, device=device)
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
        """Return a table of the size that `adapters` need.

        Args:
            adapters: Per slot the slices of one adapter; None for an empty slot or slice. Every slice needs an adapter
                in at least one slot, from which its width is taken.
            rungs: By default the largest number of rungs of an adapter.
            device: The device of the layer.
            dtype: Dtype of x, y and the factors.
        """
        slices = [[part for part in parts if part] for parts in zip(*filter(None, adapters), strict=True)]
        if not slices or not all(slices):
            raise EngineError(
                "a slice without an adapter in any slot has no known width; build an empty table, then set"
            )
        found = [part for parts in slices for part in parts]
        table = cls(
            found[0].down.shape[1],
            adjacent([parts[0].up.shape[0] for parts in slices]),
            slots=len(adapters),
            max_rank=max(1, *(len(part.down) for part in found)),
            rungs=max(len(part.ranks) for part in found) if rungs is None else rungs,
            device=device,
            dtype=dtype,
        )
        for slot, adapter in enumerate(adapters):
            if adapter is not None:
                table.set(slot, adapter)
        return table

    def grow(self, max_rank: int, rungs: int, slots: int) -> None:
        """Make room for adapters of a larger rank or more rungs, or for more adapters.

        Kernels are compiled again in the next pass, and passes captured earlier are no longer valid.
        """
        if slots > self.slots:
            added = slots - self.slots
            with torch.inference_mode(False):
                self.addresses, self.ranks = (
                    torch.cat([tensor, tensor.new_zeros(added, *tensor.shape[1:])])
                    for tensor in (self.addresses, self.ranks)
                )
            self.factors += [[None] * len(self.columns) for _ in range(added)]
            self.slots = slots
        if rungs > self.rungs:
            with torch.inference_mode(False):
                last = self.ranks[..., -1:].expand(-1, -1, rungs - self.rungs)
                self.ranks, self.rungs = torch.cat([self.ranks, last], dim=-1), rungs
        self.max_rank = max(self.max_rank, max_rank)

    @property
    def nbytes(self) -> int:
        """Bytes of all factors, addresses and ranks on the device."""
        factors = [tensor for slot in self.factors for pair in slot if pair for tensor in pair]
        return sum(tensor.nbytes for tensor in (*factors, self.addresses, self.ranks, self._spans))

    def set(self, slot: int, adapter: Sequence[LadderModule | Directions | None]) -> None:
        """Put an adapter into a slot, and free the adapter that was there.

        Factors that already lie on the device in the table's dtype and layout (`down` contiguous, `up` the transpose
        of a contiguous tensor) are not copied. Call it on the stream that runs the layer. A rung above an adapter's
        last one counts as its last one.

        Args:
            slot: 0 to slots - 1.
            adapter: For each slice, its directions, or None if the adapter does not change it.

        Raises:
            EngineError: The adapter does not fit the table.
        """
        self._check(slot, adapter)
        pairs: list[tuple[Tensor, Tensor] | None] = [None] * len(self.columns)
        addresses = torch.zeros(len(self.columns), 2, dtype=torch.int64)
        ranks = torch.zeros(len(self.columns), self.rungs, dtype=torch.int32)
        for i, part in enumerate(adapter):
            if part is not None:
                pairs[i] = down, up = self._stored(part.down), self._stored(part.up.T)
                addresses[i] = torch.tensor([down.data_ptr(), up.data_ptr()])
                ranks[i] = torch.tensor([*part.ranks, *[part.ranks[-1]] * (self.rungs - len(part.ranks))])
        self._write(slot, pairs, addresses, ranks)

    def remove(self, slot: int) -> None:
        """Empty a slot and free its factors. Tokens that still name it get no adapter."""
        slices = len(self.columns)
        ranks = torch.zeros(slices, self.rungs, dtype=torch.int32)
        self._write(slot, [None] * slices, torch.zeros(slices, 2, dtype=torch.int64), ranks)

    def add(self, y: Tensor, x: Tensor, schedule: Schedule) -> None:
        """Add the product of the scheduled adapters for x to y, in place. If `schedule.idle`, the call can be skipped.

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
        tiles, slices, blocks = tiles_of(tokens), len(self.columns), most_blocks(tokens, self.slots)
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
        with torch.cuda.device_of(x):
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
            expand_kernel[(triton.cdiv(max(where.width for where in self.columns), tiles.outputs), blocks, slices)](
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
        if len(adapter) != len(self.columns):
            raise EngineError(f"an adapter of {len(adapter)} slices does not fit a layer of {len(self.columns)}")
        for part, where in zip(adapter, self.columns, strict=True):
            if part is None:
                continue
            rank, ranks = len(part.down), list(part.ranks)
            if part.down.shape != (rank, self.in_features) or part.up.shape != (where.width, rank):
                raise EngineError(
                    f"factors {tuple(part.down.shape)} and {tuple(part.up.shape)} do not fit a slice of "
                    f"{self.in_features} to {where.width} features"
                )
            if rank > self.max_rank or len(ranks) > self.rungs:
                raise EngineError(
                    f"an adapter of rank {rank} and {len(ranks)} rungs does not fit a table of up to rank "
                    f"{self.max_rank} and {self.rungs} rungs; raise its max_rank or rungs"
                )
            if not ranks or ranks != sorted(ranks) or ranks[0] < 0 or ranks[-1] > rank:
                raise EngineError(f"ranks {ranks} must rise from at least 0 to at most {rank}")

    def _stored(self, factor: Tensor) -> Tensor:
        factor = factor.detach().to(self.device, self.dtype).contiguous()
        return factor if factor.data_ptr() % 16 == 0 else factor.clone()  # the kernels read 16 bytes at a time

    def _write(self, slot: int, pairs: list[tuple[Tensor, Tensor] | None], addresses: Tensor, ranks: Tensor) -> None:
        self.ranks[slot].copy_(ranks)
        self.addresses[slot].copy_(addresses)
        self.factors[slot] = pairs
