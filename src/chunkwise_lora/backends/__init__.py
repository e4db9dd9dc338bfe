"""Backends compute what adapters add to a layer. They do not depend on engines."""

from chunkwise_lora.backends.base import AnyBackend, Backend, Columns, Layer, Limits, PreparedPass
from chunkwise_lora.backends.registry import backend_on, register_backend

__all__ = ["AnyBackend", "Backend", "Columns", "Layer", "Limits", "PreparedPass", "backend_on", "register_backend"]
