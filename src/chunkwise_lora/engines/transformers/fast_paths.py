"""Which fast paths of the engine may run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FastPaths:
    """Each may be switched off; results are the same up to rounding."""

    kernels: bool = True
    """C kernels for the adapter product and the attention of decode steps, on a CPU with a C compiler."""
    attention: bool = True
    """An attention function of our own, which reads INT8 entries as they are. Only in place of transformers' `sdpa`."""
    products: bool = True
    """On a CPU that emulates the model's half precision: linear layers computed in float32, from the same weights."""
