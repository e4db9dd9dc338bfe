"""The tensors of a ladder's files: as bytes, and what was learned by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from chunkwise_lora.errors import LadderError, shown
from chunkwise_lora.ladder.checks import check_tensor
from chunkwise_lora.method.complexity import SIGNALS, LearnedComplexity

LEARNED = "learned/"
"""Prefix of the tensors that hold what calibration learned."""


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """The content of a safetensors file."""
    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        # safetensors refuses two tensors of one storage, as those of tied modules are.
        own[name] = tensor.contiguous().clone() if storage in seen else tensor.contiguous()
        seen.add(storage)
    return save(own, {"format": "pt"})


def learned_tensors(learned: LearnedComplexity) -> dict[str, Tensor]:
    """What calibration learned, as float32 tensors by name."""
    return {
        f"{LEARNED}{one.name}": torch.from_numpy(np.asarray(getattr(learned, one.name), np.float32))
        for one in fields(LearnedComplexity)
    }


def read_learned(tensors: Mapping[str, Tensor]) -> LearnedComplexity | None:
    """What calibration learned, from the tensors that `learned_tensors` named; None if there are none of them.

    Raises:
        LadderError: One is missing, or has a wrong shape or values.
    """
    learned = {name.removeprefix(LEARNED): tensor for name, tensor in tensors.items() if name.startswith(LEARNED)}
    if not learned:
        return None
    wanted = {one.name for one in fields(LearnedComplexity)}
    if learned.keys() != wanted:
        raise LadderError(
            f"{LEARNED} must hold {', '.join(sorted(wanted))}, not {shown(', '.join(sorted(learned)))}; calibrate anew"
        )
    for name, tensor in learned.items():
        if tensor.numel() or name in ("weights", "means"):  # a table of no tokens is one that knows none
            check_tensor(f"{LEARNED}{name}", tensor, (len(SIGNALS) if name in ("weights", "means") else None,))
    return LearnedComplexity(**{name: tensor.float().reshape(-1).numpy() for name, tensor in learned.items()})
