"""The engine for transformers models."""

from chunkwise_lora.engines.transformers.cache import ChunkWiseCache
from chunkwise_lora.engines.transformers.layers import FastPaths
from chunkwise_lora.engines.transformers.model import ChunkWiseModel
from chunkwise_lora.engines.transformers.session import BASE, Session

__all__ = ["BASE", "ChunkWiseCache", "ChunkWiseModel", "FastPaths", "Session"]
