"""Which fast paths of the engine may run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FastPaths:
    """Fast paths, all on by default. Without them, results are the same up to rounding."""

    kernels: bool = True
    """Kernels for the adapter product and the attention of decode steps: in C on a CPU with a C compiler, in Triton on
    a GPU."""
    attention: bool = True
    """Our attention function, which reads INT8 entries without converting them. It replaces only `sdpa`. Without it, KV
    policies are not carried out."""
    products: bool = True
    """Linear layers computed in float32 from the same weights, on a CPU that emulates the model's half precision, and
    the output head without a copy of its weight."""
    graphs: bool = True
    """Whole decode steps as CUDA graphs, on a GPU, with the kernels."""
