"""The protocol of a backend.

A backend computes the adapter product of the gate form, for the segments of a pass:

    y[t, columns] += up (g_t * (down x_t)),    g_t = p_t T

with up (out, r), down (r, in), the weights p_t (rungs,) of token t and the module's gate table T (rungs, r). A layer
may hold several modules that share x, such as query, key and value; each adds to its own columns of y.

An engine uses it in this order: `add_layer` once per layer, `load` and `unload` per adapter, `prepare` once per
forward pass, `apply` in every layer. `prepare` returns the state of a pass; the backend itself keeps none, so several
threads can run passes at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from chunkwise_lora.ladder import LadderModule
from chunkwise_lora.method.segments import PassPlan


@dataclass(frozen=True)
class Columns:
    """The columns of a layer's output that one module adds to."""

    offset: int
    """The first column."""
    width: int
    """Number of columns."""


@dataclass(frozen=True)
class Limits:
    """The largest sizes that an engine uses, for backends that reserve memory."""

    tokens: int
    """Tokens of a pass."""
    adapters: int
    """Adapters that are loaded at the same time."""
    rank: int = 0
    """The largest rank that needs no more memory than is reserved at first. Larger adapters may be loaded, too."""


class Layer:
    """A backend's record of a layer of the model."""

    def __init__(self, name: str, in_features: int, columns: Sequence[Columns]) -> None:
        self.name = name
        self.in_features = in_features
        self.columns = tuple(columns)
        """One entry per module of the layer."""


class PreparedPass:
    """A plan that a backend has prepared for its device."""

    def __init__(self, plan: PassPlan) -> None:
        self.plan = plan


LayerT = TypeVar("LayerT", bound=Layer)
PassT = TypeVar("PassT", bound=PreparedPass)


class Backend(ABC, Generic[LayerT, PassT]):
    """Computes the adapter product on one device.

    Passes may run at once in several threads, each with its own prepared pass. `add_layer`, `load` and `unload` are
    called by one thread at a time, and not while another thread calls `prepare`. A pass that was prepared before may
    still run meanwhile and afterwards.

    Args:
        device: The device of the layers.
        dtype: The dtype of the layers. A few layers, such as routers, may compute in another one.
        limits: The largest sizes that the engine uses; None if it does not know them.
    """

    name: ClassVar[str]
    """Name of the backend in the registry."""

    def __init__(self, device: torch.device, dtype: torch.dtype, limits: Limits | None = None) -> None:
        self.device = device
        self.dtype = dtype

    @classmethod
    @abstractmethod
    def supports(cls, device: torch.device, dtype: torch.dtype, limits: Limits | None) -> bool:
        """Return whether the backend runs on `device` in `dtype`. If not, it logs reasons that a user can remove."""

    @property
    @abstractmethod
    def adapters(self) -> frozenset[str]:
        """Keys of the loaded adapters."""

    @abstractmethod
    def add_layer(self, name: str, in_features: int, columns: Sequence[Columns]) -> LayerT:
        """Register a layer before an adapter for it is loaded, and return the object that `apply` takes.

        Args:
            name: Name of the layer.
            in_features: Width of the layer's input.
            columns: The output columns of each of its modules.
        """

    @abstractmethod
    def load(self, adapter: str, modules: Mapping[str, Sequence[LadderModule | None]]) -> None:
        """Copy an adapter to the device. It replaces an adapter with the same key, in passes prepared from now on.

        Args:
            adapter: Key of the adapter.
            modules: By name of the layer, one module for each entry of the layer's `columns`, or None where the adapter
                has no module.
        """

    @abstractmethod
    def unload(self, adapter: str) -> None:
        """Free an adapter if it is loaded. Passes prepared from now on run without it. A pass that was prepared before
        keeps the factors in memory, or runs without them."""

    @abstractmethod
    def prepare(self, plan: PassPlan) -> PassT:
        """Copy a plan to the device without waiting for it, and return the object that `apply` takes."""

    @abstractmethod
    def apply(self, layer: LayerT, y: Tensor, x: Tensor, prepared: PassT) -> Tensor:
        """Add the adapter product of a pass to the output of a layer.

        Args:
            layer: From `add_layer`.
            y: (..., width) the layer's output. It is changed in place, unless it requires a gradient.
            x: (..., in_features) the layer's input. Its tokens are those of the prepared plan, in order.
            prepared: From `prepare`.

        Returns:
            y, or, if y requires a gradient or cannot be viewed as (tokens, width), a copy with the product added.
        """


AnyBackend = Backend[Any, Any]
