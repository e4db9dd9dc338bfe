"""The protocol of a backend, and the registry from which `backend_on` chooses one.

A backend computes the adapter product of the gate form, for the segments of a pass:

    y[t, columns] += up (g_t * (down x_t)),    g_t = p_t T

with up (out, r), down (r, in), the weights p_t (rungs,) of token t and the module's gate table T (rungs, r). A layer
may hold several modules that share x, such as query, key and value; each adds to its own columns of y.

An engine uses it in this order: `add_layer` once per layer, `load` and `unload` per adapter, `prepare` once per
forward pass, `apply` in every layer. A backend keeps no state of a pass; that is in what `prepare` returns.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from chunkwise_lora.errors import EngineError
from chunkwise_lora.ladder import LadderModule
from chunkwise_lora.method.segments import PassPlan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Columns:
    """The columns of a layer's output that one module adds to."""

    offset: int
    width: int


@dataclass(frozen=True)
class Limits:
    """What an engine runs at most, for backends that reserve memory."""

    tokens: int
    """Of a pass."""
    adapters: int
    """That are loaded at a time."""


class Layer:
    """A layer of the model, as a backend knows it."""

    def __init__(self, name: str, in_features: int, columns: Sequence[Columns]) -> None:
        self.name = name
        self.in_features = in_features
        self.columns = tuple(columns)
        """One per module."""


class PreparedPass:
    """A plan as a backend runs it on its device."""

    def __init__(self, plan: PassPlan) -> None:
        self.plan = plan


LayerT = TypeVar("LayerT", bound=Layer)
PassT = TypeVar("PassT", bound=PreparedPass)


class Backend(ABC, Generic[LayerT, PassT]):
    """Computes the adapter product on one device. All methods run on the thread of the forward pass.

    Args:
        device: Where the layers are.
        dtype: What they compute in, with few exceptions.
        limits: What a pass holds at most; None where the engine does not know.
    """

    name: ClassVar[str]
    """Its name in the registry."""

    def __init__(self, device: torch.device, dtype: torch.dtype, limits: Limits | None = None) -> None:
        self.device = device
        self.dtype = dtype

    @classmethod
    @abstractmethod
    def supports(cls, device: torch.device, dtype: torch.dtype, limits: Limits | None) -> bool:
        """Whether it runs here. Says in the log why not, where a user could change that."""

    @property
    @abstractmethod
    def adapters(self) -> frozenset[str]:
        """Keys of the loaded adapters."""

    @abstractmethod
    def add_layer(self, name: str, in_features: int, columns: Sequence[Columns]) -> LayerT:
        """Make a layer known, before an adapter is loaded that adapts it; returns what `apply` takes."""

    @abstractmethod
    def load(self, adapter: str, modules: Mapping[str, Sequence[LadderModule | None]]) -> None:
        """Bring an adapter to the device, in place of one with the same key.

        Args:
            adapter: Key of the adapter.
            modules: By name of the layer, a module for each of the layer's columns, or None where there is none.
        """

    @abstractmethod
    def unload(self, adapter: str) -> None:
        """Free an adapter, if it is loaded. Passes that still name it add nothing."""

    @abstractmethod
    def prepare(self, plan: PassPlan) -> PassT:
        """Bring a plan to the device; returns what `apply` takes. It does not wait for the device."""

    @abstractmethod
    def apply(self, layer: LayerT, y: Tensor, x: Tensor, prepared: PassT) -> Tensor:
        """Add the adapter product of a pass to the output of a layer.

        Args:
            layer: From `add_layer`.
            y: (..., width) the layer's output. It is changed in place, unless it requires a gradient.
            x: (..., in_features) the layer's input. Its tokens are those of the prepared plan, in order.
            prepared: From `prepare`.

        Returns:
            y, or a copy with the product added where y requires a gradient or cannot be viewed as (tokens, width).
        """


AnyBackend = Backend[Any, Any]

_registry: dict[str, Callable[[], type[AnyBackend]]] = {}


def register_backend(name: str, load: Callable[[], type[AnyBackend]]) -> None:
    """Let `backend_on` choose a backend. The one registered last is asked first.

    Args:
        name: Its name.
        load: Imports and returns the class; an ImportError means that it cannot run here.
    """
    _registry[name] = load


def _built_in(module: str, kind: str) -> Callable[[], type[AnyBackend]]:
    return lambda: getattr(import_module(f"chunkwise_lora.backends.{module}"), kind)


register_backend("torch", _built_in("torch_products", "TorchBackend"))
register_backend("native", _built_in("native.backend", "NativeBackend"))
register_backend("triton", _built_in("triton.backend", "TritonBackend"))


def backend_on(
    device: torch.device, dtype: torch.dtype, limits: Limits | None = None, name: str | None = None
) -> AnyBackend:
    """The fastest registered backend that runs on a device, or the one of that name.

    Raises:
        EngineError: No backend has this name, or it does not run here.
    """
    if name is not None and name not in _registry:
        raise EngineError(f"backend {name!r} is unknown; choose one of {', '.join(_registry)}")
    for candidate in [name] if name else reversed(_registry):
        try:
            kind = _registry[candidate]()
        except ImportError as error:
            if name or (candidate == "triton" and device.type == "cuda"):
                logger.warning("the %s backend cannot be imported: %s", candidate, error)
            continue
        if kind.supports(device, dtype, limits):
            return kind(device, dtype, limits)
    raise EngineError(f"no backend runs on {device} in {dtype}" if name is None else f"{name} does not run on {device}")
