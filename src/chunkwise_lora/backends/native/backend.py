"""The adapter product in C, for passes of few tokens on a CPU. Other passes run in PyTorch (`torch_products`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ctypes import Array

import torch
from torch import Tensor

from chunkwise_lora.backends import native
from chunkwise_lora.backends.base import Backend, Columns, Layer, Limits, PreparedPass
from chunkwise_lora.backends.torch_products import TorchBackend, TorchLayer, TorchPass
from chunkwise_lora.ladder import LadderModule
from chunkwise_lora.method.segments import PassPlan

FEW_TOKENS = 32
"""Largest number of tokens of a pass for which the kernels are faster than PyTorch's matrix products."""


class NativeLayer(Layer):
    """A layer with the factors of the loaded adapters, as tensors and as addresses."""

    def __init__(self, products: TorchLayer) -> None:
        super().__init__(products.name, products.in_features, products.columns)
        self.products = products
        self._slices: dict[str, Array[native.Slice]] = {}
        self._adapters: tuple[str, ...] | None = None
        self._array: Array[native.Layer]

    def set(self, adapter: str) -> None:
        """Store the addresses of the adapter's current factors, or remove them if it has none here."""
        self._adapters = None
        self._slices.pop(adapter, None)
        factors = self.products.factors.get(adapter)
        if factors:
            self._slices[adapter] = native.slices_of(
                [(*module.slices[-1], torch.tensor(module.ranks), module.columns.offset) for module in factors]
            )

    def of(self, adapters: tuple[str, ...]) -> Array[native.Layer]:
        """Return the slices of these adapters, one adapter per segment of a pass."""
        if adapters != self._adapters:
            self._array = native.layers_of([self._slices.get(adapter) for adapter in adapters])
            self._adapters = adapters
        return self._array


class NativePass(PreparedPass):
    """The segments of a pass, as tensors and, if the kernels run it, as addresses."""

    def __init__(self, products: TorchPass) -> None:
        super().__init__(products.plan)
        self.products = products
        self.array: Array[native.Segment] | None = None
        if products.plan.tokens <= FEW_TOKENS:
            segments = [(segment.rung, segment.weights, segment.rows) for segment in products.segments]
            self.array = native.segments_of(segments, products.plan.tokens)


class NativeBackend(Backend[NativeLayer, NativePass]):
    """Makes one call per layer for all modules and segments, on a CPU with a C compiler."""

    name = "native"

    def __init__(self, device: torch.device, dtype: torch.dtype, limits: Limits | None = None) -> None:
        super().__init__(device, dtype, limits)
        kernels = native.kernels(dtype)
        assert kernels is not None  # checked by `supports`
        self._kernels = kernels
        self._products = TorchBackend(device, dtype, limits)
        self._layers: dict[str, NativeLayer] = {}

    @classmethod
    def supports(cls, device: torch.device, dtype: torch.dtype, limits: Limits | None) -> bool:
        """Return whether this is a CPU with working kernels for the element type."""
        return device.type == "cpu" and native.kernels(dtype) is not None

    @property
    def adapters(self) -> frozenset[str]:
        """Keys of the loaded adapters."""
        return self._products.adapters

    def add_layer(self, name: str, in_features: int, columns: Sequence[Columns]) -> NativeLayer:
        """Register a layer."""
        layer = self._layers[name] = NativeLayer(self._products.add_layer(name, in_features, columns))
        return layer

    def load(self, adapter: str, modules: Mapping[str, Sequence[LadderModule | None]]) -> None:
        """Store an adapter's factors and their addresses."""
        self._products.load(adapter, modules)
        for layer in self._layers.values():
            layer.set(adapter)

    def unload(self, adapter: str) -> None:
        """Free an adapter."""
        self._products.unload(adapter)
        for layer in self._layers.values():
            layer.set(adapter)

    def prepare(self, plan: PassPlan) -> NativePass:
        """Store the addresses of the segments."""
        return NativePass(self._products.prepare(plan))

    def apply(self, layer: NativeLayer, y: Tensor, x: Tensor, prepared: NativePass) -> Tensor:
        """Add all segments and modules in one call if the kernels can read the tensors, or else by PyTorch."""
        if (
            prepared.array is not None
            and x.dtype == y.dtype == self.dtype
            and x.is_contiguous()
            and y.is_contiguous()
            and not y.requires_grad
        ):
            self._kernels.add_segments(y, x, layer.of(prepared.plan.adapters), prepared.array)
            return y
        return self._products.apply(layer.products, y, x, prepared.products)
