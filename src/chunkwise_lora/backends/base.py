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

from chunkwise_lora.backends import native
from chunkwise_lora.backends.segments import FEW_TOKENS, Factors, Part
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
            from chunkwise_lora.backends.triton.backend import TritonAdditions
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
        self._kernels = native.kernels(dtype) if device.type == "cpu" else None
        self._native_parts: Array[native.Part] = (native.Part * 0)()
        self._native_layers: dict[str, Array[native.Layer]] = {}
        """Per layer what the adapters of `_mixed` have there, one after the other."""
        self._mixed: list[str] = []

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
        self._native_layers.clear()

    def drop(self, adapter: str) -> None:
        """Free an adapter."""
        self.ladders.pop(adapter, None)
        self._native_layers.clear()

    def plan(self, parts: Sequence[Part]) -> None:
        """Say what all layers add from now on in this pass."""
        super().plan(parts)
        if self._kernels is not None and self.tokens <= FEW_TOKENS:
            self._native_parts = (native.Part * len(parts))(*(native_part(part, self.tokens) for part in parts))
            mixed = [part.adapter for part in parts]
            if mixed != self._mixed:
                self._mixed = mixed
                self._native_layers.clear()

    def _add(self, layer: str, y: Tensor, x: Tensor) -> None:
        if (
            self._kernels is not None
            and len(x) == self.tokens <= FEW_TOKENS
            and x.dtype == y.dtype == self._dtype
            and x.is_contiguous()
            and y.is_contiguous()
        ):
            self._kernels.add_parts(y, x, self._native_layer(layer), self._native_parts)
            return
        for part in self.parts:
            if (ladder := self.ladders.get(part.adapter, {}).get(layer)) is not None:
                _add_products(y, x, ladder, part.on(x.device))

    def _native_layer(self, layer: str) -> Array[native.Layer]:
        found = self._native_layers.get(layer)
        if found is None:
            ladders = [self.ladders.get(adapter, {}).get(layer) for adapter in self._mixed]
            found = (native.Layer * len(ladders))(
                *(native.Layer(one.native, len(one.native)) if one else native.Layer() for one in ladders)
            )
            self._native_layers[layer] = found
        return found


def native_part(part: Part, tokens: int) -> native.Part:
    """A part of a pass over so many tokens as the C kernels read it; its tensors are contiguous and must live on."""
    weights, rows = part.weights, part.rows
    return native.Part(
        None if weights is None else weights.data_ptr(),
        None if rows is None else rows.data_ptr(),
        part.rung,
        0 if weights is None else weights.shape[1],
        tokens if rows is None else len(rows),
    )


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
        """The same for the C kernels."""


def _add_products(y: Tensor, x: Tensor, ladder: LayerLadder, part: Part) -> None:
    """What a part adds, as two matrix products per module, on any device."""
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
