"""The KV cache of the transformers engine."""

from chunkwise_lora.engines.transformers.cache.cache import ChunkWiseCache
from chunkwise_lora.engines.transformers.cache.layer import ChunkWiseLayer
from chunkwise_lora.engines.transformers.cache.pool import Int8Pool, quantise
from chunkwise_lora.engines.transformers.cache.slots import NO_TOKEN

__all__ = ["NO_TOKEN", "ChunkWiseCache", "ChunkWiseLayer", "Int8Pool", "quantise"]
