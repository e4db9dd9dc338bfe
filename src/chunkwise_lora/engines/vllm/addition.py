"""What layers add for adapters: the seam between the plug-in and ways of computing. Knows nothing of vLLM.

`additions_on` chooses by device, once per engine: on GPUs the Triton kernels (triton_addition.py), or else part by part
in C kernels and plain products.
"""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from ctypes import Array
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from chunkwise_lora.engines import native
from chunkwise_lora.engines.gating import FEW_TOKENS, Factors, Part
from chunkwise_lora.ladder import LadderModule

logger = logging.getLogger("vllm.chunkwise")  # below vLLM's own, so that it is shown as vLLM's is


@dataclass(frozen=True)
class Columns:
    """Where one module of a merged layer, such as the query's, stands in the layer's output."""

    offset: int
    width: int


class Additions(ABC):
    """The adapters of a model's layers on one device, and what the current forward pass runs of them."""

    def __init__(self) -> None:
        self.tokens = 0
        """Tokens of the pass."""
        self.parts: Sequence[Part] = ()
        """What runs of the adapters; nothing until the pass is planned."""

    @property
    @abstractmethod
    def adapters(self) -> Mapping[str, object]:
        """The adapters that were put, by id."""

    @abstractmethod
    def layer(self, name: str, in_features: int, columns: Sequence[Columns]) -> None:
        """Make a layer known. Adapters may have one module for each of its columns."""

    @abstractmethod
    def put(self, adapter: str, modules: Mapping[str, Sequence[LadderModule | None]]) -> None:
        """Bring an adapter to the device: per layer a module for each of the layer's columns, or none."""

    @abstractmethod
    def drop(self, adapter: str) -> None:
        """Free an adapter, if it was put. Parts that still name it add nothing."""

    def begin(self, tokens: int) -> None:
        """A new pass begins: until it is planned, no adapter runs."""
        self.tokens, self.parts = tokens, ()

    def plan(self, parts: Sequence[Part]) -> None:
        """Say what all layers add from now on in this pass. No token is in two parts."""
        self.parts = parts

    def add(self, layer: str, y: Tensor, x: Tensor) -> None:
        """In place, y (tokens, width) += what the pass runs for x (tokens, in). Rows past the pass's are padding."""
        if len(x) > self.tokens:
            y, x = y[: self.tokens], x[: self.tokens]
        if self.parts:
            self._add(layer, y, x)

    @abstractmethod
    def _add(self, layer: str, y: Tensor, x: Tensor) -> None: ...


def additions_on(device: torch.device, dtype: torch.dtype, max_tokens: int, max_adapters: int) -> Additions:
    """The way to add that is fastest on `device`.

    Args:
        device: Where the layers are.
        dtype: What they compute in, with few exceptions.
        max_tokens: Of a pass.
        max_adapters: That are put at a time.
    """
    if device.type == "cuda" and os.environ.get("CHUNKWISE_TRITON") != "0":
        try:
            from chunkwise_lora.engines.vllm.triton_addition import TritonAdditions
        except ImportError as error:
            logger.warning("ChunkWise LoRA adds adapters by plain products, which are slower than Triton: %s", error)
        else:
            return TritonAdditions(device, dtype, max_tokens, max_adapters)
    return PartAdditions(device, dtype)


class PartAdditions(Additions):
    """Part by part: in C kernels where they run, or else as products of matrices, on any device."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.ladders: dict[str, dict[str, LayerLadder]] = {}
        """By adapter and layer."""
        self._columns: dict[str, Sequence[Columns]] = {}
        self._device, self._dtype = device, dtype

    @property
    def adapters(self) -> Mapping[str, object]:
        """The adapters that were put, by id."""
        return self.ladders

    def layer(self, name: str, in_features: int, columns: Sequence[Columns]) -> None:
        """Make a layer known."""
        self._columns[name] = columns

    def put(self, adapter: str, modules: Mapping[str, Sequence[LadderModule | None]]) -> None:
        """Bring an adapter to the device."""
        self.ladders[adapter] = {
            layer: LayerLadder(of_layer, self._columns[layer], self._device, self._dtype)
            for layer, of_layer in modules.items()
        }

    def drop(self, adapter: str) -> None:
        """Free an adapter."""
        self.ladders.pop(adapter, None)

    def _add(self, layer: str, y: Tensor, x: Tensor) -> None:
        for part in self.parts:
            ladder = self.ladders.get(part.adapter, {}).get(layer)
            if ladder is not None:
                add_ladder(y, x, ladder, part)


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
