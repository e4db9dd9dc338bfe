"""The adapter product in plain PyTorch. It runs on every device, and faster backends fall back to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from chunkwise_lora.backends.base import Backend, Columns, Layer, Limits, PreparedPass
from chunkwise_lora.backends.emulation import Widened, emulates
from chunkwise_lora.ladder import LadderModule
from chunkwise_lora.method.segments import PassPlan, Segment


class Factors:
    """The factors of one module on a device, and their slices for every rung."""

    def __init__(self, module: LadderModule, columns: Columns, device: torch.device, dtype: torch.dtype) -> None:
        down = module.down.to(device, dtype).contiguous()
        up = module.up.to(device, dtype).T.contiguous()  # transposed, so that a rung is a contiguous slice
        self.columns = columns
        self.ranks = module.ranks
        self.slices = [(down[:k], up[:k]) for k in module.ranks]
        """Per rung: views (k, in) and (k, out) of the factors."""
        self.table = module.gate_table().to(device)
        """(rungs, r) float32"""


TorchAdapter = Mapping[str, Sequence[Factors]]
"""The factors of an adapter: by name of the layer, one per adapted module. It never changes, so passes can share it."""

NOTHING: TorchAdapter = {}
"""An adapter that is not loaded."""


class DeviceSegment:
    """A segment with its tensors on a device, and the factors of its adapter."""

    def __init__(self, segment: Segment, adapter: TorchAdapter, device: torch.device) -> None:
        self.adapter, self.rung = adapter, segment.rung
        self.weights = None if segment.weights is None else torch.from_numpy(segment.weights).to(device)
        """(tokens, rungs)"""
        self.rows = None if segment.rows is None else torch.from_numpy(segment.rows).to(device)
        """(tokens,)"""
        self._gates: dict[tuple[int, ...], Tensor] = {}

    def gates(self, factors: Factors) -> Tensor | None:
        """Return (tokens, k) float32 gates of a module, or None if all are 1. Modules with equal ranks share them."""
        if self.weights is None:
            return None
        gates = self._gates.get(factors.ranks)
        if gates is None:
            gates = self._gates[factors.ranks] = self.weights @ factors.table[:, : factors.ranks[self.rung]]
        return gates


class TorchPass(PreparedPass):
    """The segments of a pass on a device."""

    def __init__(self, plan: PassPlan, adapters: Mapping[str, TorchAdapter], device: torch.device) -> None:
        super().__init__(plan)
        self.segments = [
            DeviceSegment(segment, adapters.get(segment.adapter, NOTHING), device) for segment in plan.segments
        ]
        self.widened = Widened()
        """Inputs in float32, on a CPU that emulates half precision."""


class TorchBackend(Backend[Layer, TorchPass]):
    """Computes two matrix products per segment and module."""

    name = "torch"

    def __init__(self, device: torch.device, dtype: torch.dtype, limits: Limits | None = None) -> None:
        super().__init__(device, dtype, limits)
        self._columns: dict[str, tuple[Columns, ...]] = {}
        """By name of the layer."""
        self._adapters: dict[str, TorchAdapter] = {}

    @classmethod
    def supports(cls, device: torch.device, dtype: torch.dtype, limits: Limits | None) -> bool:
        """Return True: PyTorch runs everywhere."""
        return True

    @property
    def adapters(self) -> frozenset[str]:
        """Keys of the loaded adapters."""
        return frozenset(self._adapters)

    def add_layer(self, name: str, in_features: int, columns: Sequence[Columns]) -> Layer:
        """Register a layer."""
        layer = Layer(name, in_features, columns)
        self._columns[name] = layer.columns
        return layer

    def load(self, adapter: str, modules: Mapping[str, Sequence[LadderModule | None]]) -> None:
        """Copy an adapter to the device."""
        self._adapters[adapter] = {
            name: [
                Factors(module, columns, self.device, self.dtype)
                for columns, module in zip(self._columns[name], of_layer, strict=True)
                if module is not None
            ]
            for name, of_layer in modules.items()
        }

    def unload(self, adapter: str) -> None:
        """Free an adapter once no prepared pass uses it."""
        self._adapters.pop(adapter, None)

    def factors(self, adapter: str) -> TorchAdapter:
        """Return the factors of an adapter; nothing if it is not loaded."""
        return self._adapters.get(adapter, NOTHING)

    def prepare(self, plan: PassPlan) -> TorchPass:
        """Copy the segments to the device."""
        return TorchPass(plan, self._adapters, self.device)

    def apply(self, layer: Layer, y: Tensor, x: Tensor, prepared: TorchPass) -> Tensor:
        """Add the adapter product, segment by segment and module by module."""
        if y.requires_grad:
            y = y.clone()
        shape = y.shape
        y, x = y.reshape(-1, shape[-1]), x.reshape(-1, x.shape[-1])
        if emulates(x.dtype, x.device):
            x = prepared.widened.of(x)
        for segment in prepared.segments:
            rows = x if segment.rows is None else x[segment.rows]
            for factors in segment.adapter.get(layer.name, ()):
                if factors.ranks[segment.rung]:
                    _add(y, rows, segment, factors)
        return y.view(shape)


def _add(y: Tensor, x: Tensor, segment: DeviceSegment, factors: Factors) -> None:
    """Add one module's product for x (segment's tokens, in) to y (all tokens, width), in place."""
    down, up = (factor.to(x.dtype) for factor in factors.slices[segment.rung])
    gates = segment.gates(factors)
    hidden = nn.functional.linear(x, down)
    if gates is not None:
        hidden = (hidden * gates).to(x.dtype)
    columns = factors.columns
    target = y if columns.width == y.shape[1] else y[:, columns.offset : columns.offset + columns.width]
    if segment.rows is None and hidden.dtype == up.dtype == y.dtype:
        target.addmm_(hidden, up)
        return
    output = (hidden @ up).to(y.dtype)  # PyTorch takes twice as long to add a wider dtype
    if segment.rows is None:
        target += output
    else:
        target.index_add_(0, segment.rows, output)
