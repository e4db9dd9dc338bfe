"""The adapter product in C, for passes of few tokens on a CPU; others run as `torch_products`."""

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
"""Up to so many tokens of a pass the kernels are faster than PyTorch's products of matrices."""


class NativeLayer(Layer):
    """A layer with the factors of the loaded adapters, as tensors and as addresses."""

    def __init__(self, products: TorchLayer) -> None:
        super().__init__(products.name, products.in_features, products.columns)
        self.products = products
        self._slices: dict[str, Array[native.Slice]] = {}
        self._adapters: tuple[str, ...] | None = None
        self._array: Array[native.Layer]

    def set(self, adapter: str) -> None:
        """Take the adapter's factors as they are now, or forget them where there are none."""
        self._adapters = None
        self._slices.pop(adapter, None)
        factors = self.products.factors.get(adapter)
        if factors:
            self._slices[adapter] = native.slices_of(
                [(*one.slices[-1], torch.tensor(one.ranks), one.columns.offset) for one in factors]
            )

    def of(self, adapters: tuple[str, ...]) -> Array[native.Layer]:
        """What each of these adapters, one per segment of a pass, has here."""
        if adapters != self._adapters:
            self._array = native.layers_of([self._slices.get(adapter) for adapter in adapters])
            self._adapters = adapters
        return self._array


class NativePass(PreparedPass):
    """The segments of a pass, as tensors and, where the kernels run it, as addresses."""

    def __init__(self, products: TorchPass) -> None:
        super().__init__(products.plan)
        self.products = products
        self.array: Array[native.Segment] | None = None
        if products.plan.tokens <= FEW_TOKENS:
            segments = [(one.rung, one.weights, one.rows) for one in products.segments]
            self.array = native.segments_of(segments, products.plan.tokens)


class NativeBackend(Backend[NativeLayer, NativePass]):
    """One call per layer for all modules and segments, on a CPU with a C compiler."""

    name = "native"

    def __init__(self, device: torch.device, dtype: torch.dtype, limits: Limits | None = None) -> None:
        super().__init__(device, dtype, limits)
        kernels = native.kernels(dtype)
        assert kernels is not None  # `supports` says so
        self._kernels = kernels
        self._products = TorchBackend(device, dtype, limits)
        self._layers: dict[str, NativeLayer] = {}

    @classmethod
    def supports(cls, device: torch.device, dtype: torch.dtype, limits: Limits | None) -> bool:
        """On a CPU, in an element type that the kernels know, with a working C compiler."""
        return device.type == "cpu" and native.kernels(dtype) is not None

    @property
    def adapters(self) -> frozenset[str]:
        """Keys of the loaded adapters."""
        return self._products.adapters

    def add_layer(self, name: str, in_features: int, columns: Sequence[Columns]) -> NativeLayer:
        """Make a layer known."""
        layer = self._layers[name] = NativeLayer(self._products.add_layer(name, in_features, columns))
        return layer

    def load(self, adapter: str, modules: Mapping[str, Sequence[LadderModule | None]]) -> None:
        """Bring an adapter to the device."""
        self._products.load(adapter, modules)
        for layer in self._layers.values():
            layer.set(adapter)

    def unload(self, adapter: str) -> None:
        """Free an adapter."""
        self._products.unload(adapter)
        for layer in self._layers.values():
            layer.set(adapter)

    def prepare(self, plan: PassPlan) -> NativePass:
        """Note the addresses of the segments."""
        return NativePass(self._products.prepare(plan))

    def apply(self, layer: NativeLayer, y: Tensor, x: Tensor, prepared: NativePass) -> Tensor:
        """Add all segments and modules in one call, where the kernels can take the tensors."""
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
