"""What a layer adds for an adapter: the seam between the plug-in and ways of computing. Knows nothing of vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Array
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from chunkwise_lora.engines import native
from chunkwise_lora.engines.gating import FEW_TOKENS, Factors, Part
from chunkwise_lora.ladder import LadderModule


@dataclass(frozen=True)
class Columns:
    """Where one module of a merged layer, such as the query's, stands in the layer's output."""

    offset: int
    width: int


class LayerLadder:
    """One adapter's factors for one layer on this rank, one module for each of the layer's `columns`, or none."""

    def __init__(
        self,
        modules: Sequence[LadderModule | None],
        columns: Sequence[Columns],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.slices = [
            (where, Factors(module, device, dtype))
            for where, module in zip(columns, modules, strict=True)
            if module is not None
        ]
        self.native: Array[native.Slice] | None = None
        """The same for the C kernels, where they run."""
        if device.type == "cpu" and native.kernels(dtype) is not None:
            self._ranks = [torch.tensor(factors.ranks) for _, factors in self.slices]
            self.native = (native.Slice * len(self.slices))(
                *(
                    native.Slice(
                        factors.slices[-1][0].data_ptr(),
                        factors.slices[-1][1].data_ptr(),
                        ranks.data_ptr(),
                        where.width,
                        where.offset,
                    )
                    for (where, factors), ranks in zip(self.slices, self._ranks, strict=True)
                )
            )


def add_ladder(y: Tensor, x: Tensor, ladder: LayerLadder, part: Part) -> None:
    """In place, y (tokens, width) += up (g * (down x)) for x (tokens, in), in the columns of each module.

    Chooses by device, type and number of tokens; all ways give the same up to rounding.
    """
    if (
        ladder.native is not None
        and len(x) <= FEW_TOKENS
        and x.dtype == y.dtype
        and x.is_contiguous()
        and y.is_contiguous()
        and (kernels := native.kernels(x.dtype)) is not None
    ):
        kernels.add_slices(y, x, ladder.native, part.rung, part.weights, part.rows)
    else:
        _add_products(y, x, ladder, part.on(x.device))


def _add_products(y: Tensor, x: Tensor, ladder: LayerLadder, part: Part) -> None:
    """`add_ladder` as two matrix products per module, on any device."""
    if part.rows is not None:
        x = x[part.rows]
    if ladder.slices[0][1].emulated:
        x = x.float()
    for columns, factors in ladder.slices:
        if not factors.ranks[part.rung]:
            continue
        down, up = (factor.to(x.dtype) for factor in factors.slices[part.rung])
        hidden = nn.functional.linear(x, down)
        if part.weights is not None:
            hidden = (hidden * part.gates(factors)).to(x.dtype)
        target = y[:, columns.offset : columns.offset + columns.width]
        if part.rows is None and hidden.dtype == y.dtype:
            target.addmm_(hidden, up)
            continue
        output = (hidden @ up).to(y.dtype)  # adding a wider one takes PyTorch twice as long
        if part.rows is None:
            target += output
        else:
            target.index_add_(0, part.rows, output)
