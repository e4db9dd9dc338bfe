"""Converts tensors to the bytes of a safetensors file, and learned values to named tensors and back."""

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
    """Return the content of a safetensors file that holds `tensors`."""
    seen: set[int] = set()
    stored = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        # safetensors refuses tensors that share storage, such as those of tied modules.
        stored[name] = tensor.contiguous().clone() if storage in seen else tensor.contiguous()
        seen.add(storage)
    return save(stored, {"format": "pt"})


def learned_tensors(learned: LearnedComplexity) -> dict[str, Tensor]:
    """Return what calibration learned as float32 tensors by name."""
    return {
        f"{LEARNED}{field.name}": torch.from_numpy(np.asarray(getattr(learned, field.name), np.float32))
        for field in fields(LearnedComplexity)
    }


def read_learned(tensors: Mapping[str, Tensor]) -> LearnedComplexity | None:
    """Return what calibration learned, from the tensors that `learned_tensors` named, or None if there are none.

    Raises:
        LadderError: A tensor is missing, or has a wrong dtype, shape or value.
    """
    learned = {name.removeprefix(LEARNED): tensor for name, tensor in tensors.items() if name.startswith(LEARNED)}
    if not learned:
        return None
    wanted = {field.name for field in fields(LearnedComplexity)}
    if learned.keys() != wanted:
        raise LadderError(
            f"{LEARNED} must hold {', '.join(sorted(wanted))}, not {shown(', '.join(sorted(learned)))}; calibrate again"
        )
    for name, tensor in learned.items():
        if tensor.numel() or name in ("weights", "means"):  # a table of token ids may be empty
            check_tensor(f"{LEARNED}{name}", tensor, (len(SIGNALS) if name in ("weights", "means") else None,))
    return LearnedComplexity(**{name: tensor.float().reshape(-1).numpy() for name, tensor in learned.items()})
