"""Checks that every ladder and adapter must pass. Each raises a `LadderError` that says what to do.

`where` names in the message what is checked: a file and the tensor or field in it, or a module.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from chunkwise_lora.errors import LadderError, shown

STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes in which a ladder can be stored."""

LARGEST = 1e16
"""Bound on the Frobenius norms |up| and |down| and on |up| |down|, which is a bound on the norm of the product.

float32 ends at 3.4e38. With this bound the squares of singular values (1e32) can be summed over a million directions,
and up @ down @ x stays finite for every x below 1e22. Trained adapters have norms below 1e4.
"""

MOST_RUNGS = 256
"""Bound on the rungs of a ladder.

A plan holds one weight per token and rung, and a module holds one row of gates per rung. Calibration makes at most 65
rungs; rungs closer than 1/256 of the full rank cannot be told apart.
"""

LONGEST_NAME = 512
"""Bound on the characters of a module's or parameter's name. The longest in the transformers library have about 100."""

DEEPEST_NAME = 64
"""Bound on the parts of a name between its dots."""

SHARDED = (
    "Sharded training (DeepSpeed ZeRO-3, FSDP) leaves such tensors; gather the parameters before saving (ZeRO-3: "
    "stage3_gather_16bit_weights_on_model_save, or zero_to_fp32.py)"
)
"""Cause and remedy of tensors that are empty or flat."""


def check_name(where: str, name: str) -> None:
    """Check that the name of a module or parameter is printable and of bounded length."""
    if not name or not name.isprintable() or len(name) > LONGEST_NAME or name.count(".") >= DEEPEST_NAME:
        raise LadderError(
            f"{where}: '{shown(name)}' is not the name of a module or parameter (printable, at most {LONGEST_NAME} "
            f"characters and {DEEPEST_NAME} parts); save the adapter again from its model"
        )


def check_tensor(
    where: str, tensor: Tensor, shape: Sequence[int | None] | None = None, dtypes: Sequence[torch.dtype] = STORED_DTYPES
) -> None:
    """Check that a tensor has one of `dtypes`, `shape` (None: any size), no empty dimension and only finite numbers."""
    check_layout(where, tensor, shape, dtypes)
    low, high = tensor.aminmax()  # one pass without a copy; NaN propagates
    if not (low.isfinite() and high.isfinite()):
        raise LadderError(f"{where} holds NaN or infinity; train or export the adapter again")


def check_layout(
    where: str, tensor: Tensor, shape: Sequence[int | None] | None = None, dtypes: Sequence[torch.dtype] = STORED_DTYPES
) -> None:
    """Check that a tensor has one of `dtypes`, `shape` (None: any size) and no empty dimension."""
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise LadderError(f"{where} has dtype {tensor.dtype}; save it in one of {names}")
    sizes = list(tensor.shape)
    if 0 in sizes:
        raise LadderError(f"{where} is empty (shape {sizes}). {SHARDED}")
    if shape is not None and (
        len(sizes) != len(shape) or any(want not in (None, size) for want, size in zip(shape, sizes, strict=True))
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise LadderError(f"{where} has shape {sizes}, not [{wanted}]; save it again")


def check_factors(where: str, up: Tensor, down: Tensor, scale: float = 1.0) -> None:
    """Check that scale * up @ down, for up (out, r) and down (r, in), and all sums in it stay far from overflow.

    A scale below 1 counts as 1, because up may also be stored without the scale.
    """
    if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
        raise LadderError(
            f"{where}: the factors have shapes {tuple(up.shape)} and {tuple(down.shape)}, not (out, r) and (r, in); "
            "save the adapter again"
        )
    norms = [float(torch.linalg.vector_norm(factor, dtype=torch.float64)) for factor in (up, down)]
    if not all(map(math.isfinite, norms)):  # sums of squares of float32 are finite in float64
        raise LadderError(f"{where}: the factors hold NaN or infinity; train or export the adapter again")
    norms[0] *= max(1.0, abs(scale))
    if max(*norms, norms[0] * norms[1]) > LARGEST:
        raise LadderError(
            f"{where}: the factors have norms {norms[0]:.3g} (with the scale) and {norms[1]:.3g}; each, and their "
            f"product, must be at most {LARGEST:g} to compute in float32; train or scale the adapter again"
        )


def check_sigma(where: str, sigma: Tensor, rank: int) -> None:
    """Check that sigma holds (rank,) numbers that are not negative and whose squares can be summed."""
    check_tensor(where, sigma, (rank,), (torch.float32,))
    low, high = sigma.aminmax()
    if low < 0 or high > LARGEST:
        raise LadderError(
            f"{where} must lie from 0 to {LARGEST:g}, not {low:.3g} to {high:.3g}; build the ladder again"
        )


def check_ranks(where: str, ranks: Sequence[int], rank: int) -> None:
    """Check a module's rank on each rung: whole numbers from 0 that never fall; the last one is `rank`."""
    if not 1 <= len(ranks) <= MOST_RUNGS:
        raise LadderError(f"{where}: {len(ranks)} rungs, not 1 to {MOST_RUNGS}; build the ladder with fewer rungs")
    whole = all(type(k) is int for k in ranks)
    if not whole or ranks[0] < 0 or ranks[-1] != rank or any(a > b for a, b in pairwise(ranks)):
        raise LadderError(
            f"{where}: ranks {shown(list(ranks))} must rise from at least 0 to the full rank {rank}; "
            "build the ladder again"
        )
