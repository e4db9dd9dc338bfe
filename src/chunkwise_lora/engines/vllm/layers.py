"""What vLLM's LoRA layers call to add the adapters of a forward pass to their output.

vLLM's layers keep doing what is theirs, the base product and the communication between tensor-parallel ranks; only the
adapters' part is ours. It stands behind a custom operator, so that a compiled model does not bake a plan in.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Array
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from chunkwise_lora.engines import native
from chunkwise_lora.engines.gating import FEW_TOKENS, Factors, Part
from chunkwise_lora.ladder import LadderModule


@dataclass
class Step:
    """What all layers add in the current forward pass."""

    parts: list[Part] = field(default_factory=list)
    tokens: int = 0
    """Tokens that were planned; a pass may hold more, as padding."""


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

    @property
    def nbytes(self) -> int:
        """Bytes of factors."""
        return sum(factor.nbytes for _, factors in self.slices for factor in factors.slices[-1])


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
        output = hidden @ up
        target = y[:, columns.offset : columns.offset + columns.width]
        if part.rows is None:
            target += output
        else:
            target.index_add_(0, part.rows, output.to(y.dtype))


class LadderLayer:
    """All adapters of one layer. Stands where vLLM's layers expect what they call their punica wrapper."""

    def __init__(self, name: str, columns: Sequence[Columns], step: Step) -> None:
        self.name = name
        """The key in vLLM's forward context."""
        self.columns = columns
        self.ladders: dict[str, LayerLadder] = {}
        """By adapter id."""
        self._step = step

    def add_lora_linear(self, y: Tensor, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """vLLM's call: add to y (tokens, width), in place, what the adapters give for x (tokens, in)."""
        if torch.compiler.is_compiling():
            torch.ops.vllm.chunkwise_add_ladders(y, x, self.name)
        else:
            self.add(y, x)
        return y

    def add(self, y: Tensor, x: Tensor) -> None:
        """Add what the current step says."""
        step = self._step
        if len(x) > step.tokens:
            x, y = x[: step.tokens], y[: step.tokens]
        for part in step.parts:
            ladder = self.ladders.get(part.adapter)
            if ladder is not None:
                add_ladder(y, x, ladder, part)


def _add_ladders(y: Tensor, x: Tensor, layer: str) -> None:
    get_forward_context().no_compile_layers[layer].add(y, x)


def _add_ladders_fake(y: Tensor, x: Tensor, layer: str) -> None:
    pass


if not hasattr(torch.ops.vllm, "chunkwise_add_ladders"):
    direct_register_custom_op(
        op_name="chunkwise_add_ladders",
        op_func=_add_ladders,
        mutates_args=["y"],
        fake_impl=_add_ladders_fake,
    )
