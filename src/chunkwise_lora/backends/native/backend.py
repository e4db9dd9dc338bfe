"""The adapter product in C on a CPU.

It runs passes of few tokens, and, in bfloat16 on processors that multiply bfloat16 numbers directly, all passes. Other
passes run in PyTorch (`torch_products`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from chunkwise_lora.backends import native
from chunkwise_lora.backends.base import Backend, Columns, Layer, Limits, PreparedPass
from chunkwise_lora.backends.torch_products import TorchAdapter, TorchBackend, TorchPass
from chunkwise_lora.ladder import LadderModule
from chunkwise_lora.method.segments import PassPlan

FEW_TOKENS = 32
"""Largest number of tokens of a pass for which the kernels are faster than PyTorch's matrix products."""

MOST_MIXTURES = 32
"""Largest number of mixtures of adapters whose addresses are kept for the next pass."""


class NativeAdapter:
    """The factors of an adapter as addresses. It never changes, and keeps the factors in memory."""

    def __init__(self, factors: TorchAdapter) -> None:
        self.slices: Mapping[str, native.Structures[native.Slice]] = {
            layer: native.slices_of(
                [(*module.slices[-1], torch.tensor(module.ranks), module.columns.offset) for module in modules]
            )
            for layer, modules in factors.items()
            if modules
        }
        """By name of the layer."""


NOTHING = NativeAdapter({})
"""An adapter that is not loaded."""


class Addresses:
    """The addresses of the adapters of a pass, one per segment, layer by layer. Passes of several threads can share it.

    An array of a layer is made when the layer first runs. If two threads make it at once, both arrays are the same.
    """

    def __init__(self, adapters: Sequence[NativeAdapter]) -> None:
        self._adapters = adapters
        self._layers: dict[str, native.Structures[native.Layer]] = {}

    def of(self, layer: str) -> native.Structures[native.Layer]:
        """Return the slices that each segment's adapter has in a layer."""
        found = self._layers.get(layer)
        if found is None:
            slices = [adapter.slices.get(layer) for adapter in self._adapters]
            found = self._layers[layer] = native.layers_of(slices)
        return found


class NativePass(PreparedPass):
    """The segments of a pass, as tensors and, if the kernels run it, as addresses."""

    def __init__(self, products: TorchPass, addresses: Addresses, has_blocks: bool) -> None:
        super().__init__(products.plan)
        self.products = products
        self.addresses = addresses
        self.has_few_tokens = products.plan.tokens <= FEW_TOKENS
        self.array: native.Structures[native.Segment] | None = None
        if self.has_few_tokens or has_blocks:
            segments = [(segment.rung, segment.weights, segment.rows) for segment in products.segments]
            self.array = native.segments_of(segments, products.plan.tokens)


class NativeBackend(Backend[Layer, NativePass]):
    """Makes one call per layer for all modules and segments, on a CPU with a C compiler."""

    name = "native"

    def __init__(self, device: torch.device, dtype: torch.dtype, limits: Limits | None = None) -> None:
        super().__init__(device, dtype, limits)
        kernels = native.kernels(dtype)
        assert kernels is not None  # checked by `supports`
        self._kernels = kernels
        self._products = TorchBackend(device, dtype, limits)
        self._adapters: dict[str, NativeAdapter] = {}
        self._addresses: dict[tuple[NativeAdapter, ...], Addresses] = {}
        """The addresses of recent passes. A batch usually runs the same adapters in every pass."""

    @classmethod
    def supports(cls, device: torch.device, dtype: torch.dtype, limits: Limits | None) -> bool:
        """Return whether this is a CPU with working kernels for the element type."""
        return device.type == "cpu" and native.kernels(dtype) is not None

    @property
    def adapters(self) -> frozenset[str]:
        """Keys of the loaded adapters."""
        return self._products.adapters

    def add_layer(self, name: str, in_features: int, columns: Sequence[Columns]) -> Layer:
        """Register a layer."""
        return self._products.add_layer(name, in_features, columns)

    def load(self, adapter: str, modules: Mapping[str, Sequence[LadderModule | None]]) -> None:
        """Store an adapter's factors and their addresses."""
        self._products.load(adapter, modules)
        self._adapters[adapter] = NativeAdapter(self._products.factors(adapter))
        self._addresses = {}

    def unload(self, adapter: str) -> None:
        """Free an adapter once no prepared pass uses it."""
        self._products.unload(adapter)
        self._adapters.pop(adapter, None)
        self._addresses = {}

    def prepare(self, plan: PassPlan) -> NativePass:
        """Store the addresses of the segments and of their adapters."""
        adapters = tuple([self._adapters.get(key, NOTHING) for key in plan.adapters])
        addresses = self._addresses.get(adapters)
        if addresses is None:
            if len(self._addresses) >= MOST_MIXTURES:
                self._addresses = {}
            addresses = self._addresses[adapters] = Addresses(adapters)
        return NativePass(self._products.prepare(plan), addresses, self._kernels.has_blocks)

    def apply(self, layer: Layer, y: Tensor, x: Tensor, prepared: NativePass) -> Tensor:
        """Add all segments and modules in one call if the kernels can read the tensors, or else by PyTorch."""
        if (
            prepared.array is not None
            and (prepared.has_few_tokens or layer.in_features % 2 == 0)
            and x.dtype == y.dtype == self.dtype
            and x.is_contiguous()
            and y.is_contiguous()
            and not y.requires_grad
        ):
            self._kernels.add_segments(y, x, prepared.addresses.of(layer.name), prepared.array)
            return y
        return self._products.apply(layer, y, x, prepared.products)
