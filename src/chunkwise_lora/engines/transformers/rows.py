"""Joins the outputs of a module that ran once per adapter, so that each sequence keeps its adapter's output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from chunkwise_lora.errors import EngineError


def join_rows(outputs: Sequence[Any], members: Sequence[Tensor | None], batch: int) -> Any:
    """Return one output of a module for the whole batch.

    Args:
        outputs: The outputs with each adapter, for the whole batch: tensors, None, or tuples or lists of these. The
            first dimension of a tensor counts sequences, or the tokens of all sequences one sequence after the other,
            or is 1 where the output is the same for all sequences.
        members: For each output, the sequences (n,) that keep it; None for all of them.
        batch: Number of sequences.

    Raises:
        EngineError: The outputs do not say which part belongs to which sequence.
    """
    first = outputs[0]
    if isinstance(first, (tuple, list)):
        return type(first)(join_rows(parts, members, batch) for parts in zip(*outputs, strict=True))
    if first is None:
        return None
    if not isinstance(first, Tensor) or not first.ndim or (len(first) % batch and len(first) != 1):
        raise EngineError(
            f"a module with several adapters in one batch returned {_shown(first)}, which cannot be split by sequence; "
            "run one adapter per batch"
        )
    if len(first) == 1 != batch:
        outputs = [output.expand(batch, *output.shape[1:]) for output in outputs]
    joined = torch.empty_like(outputs[0], memory_format=torch.contiguous_format)
    for output, sequences in zip(outputs, members, strict=True):
        if sequences is None:
            return output
        rows = sequences.to(output.device)
        joined.unflatten(0, (batch, -1))[rows] = output.unflatten(0, (batch, -1))[rows].to(joined.dtype)
    return joined


def _shown(output: object) -> str:
    return f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
