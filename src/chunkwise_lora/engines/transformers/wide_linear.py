"""Linear layers on a CPU that emulates half precision: computed in float32 from the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor, nn

from chunkwise_lora.backends.emulation import emulates
from chunkwise_lora.backends.native import kernels
from chunkwise_lora.backends.native.backend import FEW_TOKENS
from chunkwise_lora.engines.transformers.context import PASS


class WideLinear:
    """Replaces the `forward` of a linear layer, and converts its half-precision weights to float32 in the product.

    The result is the same up to rounding: every product of two halves is exact in float32, and sums are rounded once.
    Outside of a pass of `owner`, the layer's own forward runs.
    """

    def __init__(self, owner: object, module: nn.Linear, use_kernels: bool) -> None:
        self._owner = owner
        self._module = module
        self._forward: Callable[[Tensor], Tensor] = module.forward
        self._use_kernels = use_kernels

    def __call__(self, x: Tensor) -> Tensor:
        """Return (..., out) for x (..., in)."""
        running = PASS.get()
        if running is None or running.owner is not self._owner or torch.is_autocast_enabled(x.device.type):
            return self._forward(x)
        weight, bias = self._module.weight, self._module.bias
        kernel = kernels(x.dtype) if self._use_kernels else None
        few = x.numel() <= FEW_TOKENS * x.shape[-1]
        # The module may have been moved or cast since it was attached.
        if torch.is_grad_enabled() or x.dtype != weight.dtype or not widens(self._module) or (few and kernel is None):
            return nn.functional.linear(x, weight, bias)
        wide = running.widened.of(x)
        if few and kernel is not None:
            return kernel.multiply(wide, weight, bias)
        return nn.functional.linear(wide, weight.float(), None if bias is None else bias.float()).to(x.dtype)


def widens(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether a module is a plain linear layer whose half precision the CPU would emulate."""
    if type(module) is not nn.Linear:
        return False
    weight, bias = module.weight, module.bias
    return (
        type(weight) in (nn.Parameter, Tensor)
        and emulates(weight.dtype, weight.device)
        and weight.is_contiguous()
        and (bias is None or (bias.dtype == weight.dtype and bias.is_contiguous()))
    )
