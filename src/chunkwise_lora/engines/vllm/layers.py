"""What vLLM's LoRA layers call to add the adapters of a forward pass to their output.

vLLM's layers keep doing what is theirs, the base product and the communication between tensor-parallel ranks; only the
adapters' part is ours. It stands behind a custom operator, so that a compiled model does not bake a plan in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from chunkwise_lora.backends.base import Additions, Columns


class LadderLayer:
    """All adapters of one layer. Stands where vLLM's layers expect what they call their punica wrapper."""

    def __init__(self, name: str, columns: Sequence[Columns], additions: Additions) -> None:
        self.name = name
        self.key = f"{name}.chunkwise"
        """Its own in vLLM's forward context."""
        self.columns = columns
        self._additions = additions

    def add_lora_linear(self, y: Tensor, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """vLLM's call: add to y (tokens, width), in place, what the adapters give for x (tokens, in)."""
        if torch.compiler.is_compiling():
            torch.ops.vllm.chunkwise_add_ladders(y, x, self.key)
        else:
            self.add(y, x)
        return y

    def add(self, y: Tensor, x: Tensor) -> None:
        """Add what the current pass says."""
        self._additions.add(self.name, y, x)


def _add_ladders(y: Tensor, x: Tensor, layer: str) -> None:
    get_forward_context().no_compile_layers[layer].add(y, x)


def _add_ladders_fake(y: Tensor, x: Tensor, layer: str) -> None:
    pass


if not hasattr(torch.ops.vllm, "chunkwise_add_ladders"):
    direct_register_custom_op(
        op_name="chunkwise_add_ladders",
        op_func=_add_ladders,
        mutates_args=["y"],
        fake_impl=_add_ladders_fake,
    )
