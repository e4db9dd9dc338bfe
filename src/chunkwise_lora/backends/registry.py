"""The registry of backends, from which `backend_on` chooses one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch

from chunkwise_lora.backends import triton
from chunkwise_lora.backends.base import AnyBackend, Limits
from chunkwise_lora.errors import EngineError

logger = logging.getLogger(__name__)

MayRun = Callable[[torch.device, Limits | None], bool]


@dataclass(frozen=True)
class _Entry:
    load: Callable[[], type[AnyBackend]]
    may_run: MayRun


_entries: dict[str, _Entry] = {}


def register_backend(
    name: str, load: Callable[[], type[AnyBackend]], may_run: MayRun = lambda device, limits: True
) -> None:
    """Register a backend for `backend_on`, which tries the backend that was registered last first.

    Args:
        name: Name of the backend.
        load: Imports the class and returns it. If it raises an ImportError, a warning names what is missing, and the
            next backend is tried.
        may_run: Whether the backend comes into question for a device and limits, decided before it is imported.
    """
    _entries[name] = _Entry(load, may_run)


def _built_in(module: str, class_name: str) -> Callable[[], type[AnyBackend]]:
    return lambda: getattr(import_module(f"chunkwise_lora.backends.{module}"), class_name)


register_backend("torch", _built_in("torch_products", "TorchBackend"))
register_backend("native", _built_in("native.backend", "NativeBackend"))
register_backend("triton", _built_in("triton.backend", "TritonBackend"), triton.may_run)


def backend_on(
    device: torch.device, dtype: torch.dtype, limits: Limits | None = None, name: str | None = None
) -> AnyBackend:
    """Return the fastest registered backend that runs on a device, or the backend called `name`.

    Raises:
        EngineError: No backend has this name, or it does not run here.
    """
    if name is not None and name not in _entries:
        raise EngineError(f"backend {name!r} is unknown; choose one of {', '.join(_entries)}")
    for candidate in [name] if name else reversed(_entries):
        entry = _entries[candidate]
        if not entry.may_run(device, limits):
            continue
        try:
            kind = entry.load()
        except ImportError as error:
            logger.warning("the %s backend cannot be imported: %s", candidate, error)
            continue
        if kind.supports(device, dtype, limits):
            return kind(device, dtype, limits)
    if name is not None:
        raise EngineError(f"backend {name} does not run on {device} in {dtype}; choose another one, or give no name")
    raise EngineError(f"no backend runs on {device} in {dtype}; register one that does")
