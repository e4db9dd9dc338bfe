"""The engine for transformers models."""

from chunkwise_lora.engines.transformers.cache import ChunkWiseCache
from chunkwise_lora.engines.transformers.fast_paths import FastPaths
from chunkwise_lora.engines.transformers.loading import load_base
from chunkwise_lora.engines.transformers.model import BASE, ChunkWiseModel

__all__ = ["BASE", "ChunkWiseCache", "ChunkWiseModel", "FastPaths", "load_base"]
