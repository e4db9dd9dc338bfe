"""The C backend: adapter products and decode attention in C, compiled on first use if there is a C compiler.

On a CPU, PyTorch's products of one row with a skinny matrix take more time for the calls than for the arithmetic. Its
attention of one token over a half-precision cache runs far below memory speed, and it does not read INT8. Without a
compiler PyTorch computes all of this.
"""

from chunkwise_lora.backends.native.host import give_memory_back
from chunkwise_lora.backends.native.structs import Layer, Segment, Slice
from chunkwise_lora.backends.native.wrappers import (
    AttentionPools,
    Kernels,
    PoolTensors,
    Structures,
    kernels,
    layers_of,
    segments_of,
    slices_of,
)

__all__ = [
    "AttentionPools",
    "Kernels",
    "Layer",
    "PoolTensors",
    "Segment",
    "Slice",
    "Structures",
    "give_memory_back",
    "kernels",
    "layers_of",
    "segments_of",
    "slices_of",
]
