"""Linear layers that add what the current plan gates of an adapter.

The reference semantics, for token t with gates g_t, is `y_t = W x_t + up (g_t * (down x_t))`. What runs is decided once
per forward pass, for all layers: a `Step`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeGuard

import torch
from torch import Tensor, nn

from chunkwise_lora.backends.native import emulates, kernels
from chunkwise_lora.backends.segments import FEW_TOKENS, Factors, Part
from chunkwise_lora.errors import EngineError


@dataclass
class Step:
    """What all gated layers do in one forward pass. Shared by them, refilled before every pass."""

    parts: list[Part] = field(default_factory=list)
    sequences: dict[str, Tensor | None] = field(default_factory=dict)
    """Per adapter, the sequences of the batch that use it; None for all of them."""
    batch: int = 0
    """Sequences of the pass."""
    width: int = 0
    """Tokens of the pass per sequence, padding included."""
    constant: bool = False
    """Whether every token of the generation gets the same gates of its adapter."""
    _widened: tuple[Tensor, int, Tensor] | None = None

    def clear(self) -> None:
        """Between passes no adapter runs, and nothing of a pass is held."""
        self.parts, self.sequences, self._widened = [], {}, None

    def widen(self, x: Tensor) -> Tensor:
        """x in float32; modules that share an input share it, unless it has changed in place, as versions tell."""
        if x.is_inference():  # these have no version
            return x.float()
        if self._widened is None or self._widened[0] is not x or self._widened[1] != x._version:
            self._widened = x, x._version, x.float()
        return self._widened[2]


@dataclass(frozen=True)
class FastPaths:
    """Which of the engine's fast paths may run; what they compute is the same up to rounding."""

    kernels: bool = True
    """C kernels for the products and the attention of decode steps, on a CPU with a C compiler."""
    attention: bool = True
    """An attention function of our own, which takes INT8 entries as they are. Only in place of transformers' `sdpa`."""
    products: bool = True
    """On a CPU that emulates the model's half precision: linear layers computed in float32, from the same weights."""


class GatedLinear:
    """Stands in for the `forward` of a linear module of any kind and adds the adapters' parts."""

    def __init__(self, name: str, module: nn.Module, step: Step, fast: FastPaths) -> None:
        self.name = name
        self.factors: dict[str, Factors] = {}
        self.inner: Callable[[Tensor], Tensor] = module.forward
        """What gives W x: the module's own forward, a `WideProduct` or a `ReplacedModule`."""
        self._step = step
        self._use_kernels = fast.kernels
        if fast.products and widens(module):
            self.inner = WideProduct(module, step, fast.kernels)

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        y = self.inner(x)
        for part in self._step.parts:
            factors = self.factors.get(part.adapter)
            if factors is not None and factors.ranks[part.rung]:
                y = self._add(y, x, part, factors)
        return y

    def _add(self, y: Tensor, x: Tensor, part: Part, factors: Factors) -> Tensor:
        down, up = factors.slices[part.rung]
        if part.weights is not None or part.rows is not None or not self._step.constant:
            part = self._seen(x, part).on(x.device)
        gates = None if part.weights is None else part.gates(factors)
        if self._runs_kernel(y, x, down) and (kernel := kernels(x.dtype)) is not None:
            kernel.add_adapter(y, x, down, up, gates, part.rows)
            return y
        if factors.emulated:
            x, down, up = self._step.widen(x), down.float(), up.float()
        else:
            x = x.to(down.dtype)
        if part.rows is not None:
            x = x.reshape(-1, x.shape[-1])[part.rows]
        hidden = nn.functional.linear(x, down)
        if gates is not None:
            hidden = hidden.view(gates.shape).mul(gates).to(up.dtype).view(hidden.shape)
        output = (hidden @ up).to(y.dtype)
        if part.rows is None:
            return y + output
        return y.reshape(-1, y.shape[-1]).index_add(0, part.rows, output).view(y.shape)

    def _seen(self, x: Tensor, part: Part) -> Part:
        """The part as it stands among the tokens that this module sees."""
        tokens, step = x.numel() // x.shape[-1], self._step
        columns, rest = divmod(tokens, step.batch)
        if rest or columns > step.width or (columns < step.width and x.ndim < 3):
            raise EngineError(
                f"{self.name}: sees {tokens} tokens of a pass of {step.batch} x {step.width} (a routed expert? a "
                "projection of cached tokens?), so it cannot give each its own gates; use the lossless preset with one "
                "adapter per batch"
            )
        everyone_alike = part.weights is None and part.rows is None
        return part if columns == step.width or everyone_alike else part.tail(columns, step.batch, step.width)

    def _runs_kernel(self, y: Tensor, x: Tensor, down: Tensor) -> bool:
        return (
            self._use_kernels
            and x.device.type == "cpu"
            and x.numel() <= FEW_TOKENS * x.shape[-1]
            and x.dtype == y.dtype == down.dtype
            and x.is_contiguous()
            and y.is_contiguous()
            and not y.requires_grad
        )


class WideProduct:
    """A linear layer whose half-precision weights are widened on the fly, where a CPU would emulate the product.

    Up to rounding the same: every product of two halves is exact in float32, and sums are rounded once.
    """

    def __init__(self, module: nn.Linear, step: Step, use_kernels: bool) -> None:
        self._module = module
        self._step = step
        self._use_kernels = use_kernels

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        weight, bias = self._module.weight, self._module.bias
        kernel = kernels(x.dtype) if self._use_kernels else None
        few = x.numel() <= FEW_TOKENS * x.shape[-1]
        # The module may have been moved or cast since.
        if torch.is_grad_enabled() or x.dtype != weight.dtype or not widens(self._module) or (few and kernel is None):
            return nn.functional.linear(x, weight, bias)
        if few and kernel is not None:
            return kernel.multiply(self._step.widen(x), weight, bias)
        y = nn.functional.linear(self._step.widen(x), weight.float(), None if bias is None else bias.float())
        return y.to(x.dtype)


def widens(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is a plain linear layer whose half precision the CPU would emulate."""
    if type(module) is not nn.Linear:
        return False
    weight, bias = module.weight, module.bias
    return (
        type(weight) in (nn.Parameter, Tensor)
        and emulates(weight.dtype, weight.device)
        and weight.is_contiguous()
        and (bias is None or (bias.dtype == weight.dtype and bias.is_contiguous()))
    )


class ReplacedModule:
    """Stands in for the `forward` of a module that adapters replace whole (PEFT's `modules_to_save`)."""

    def __init__(self, module: nn.Module, step: Step) -> None:
        self.copies: dict[str, nn.Module] = {}
        self._forward: Callable[..., Tensor] = module.forward
        self._step = step

    def __call__(self, x: Tensor) -> Tensor:
        """x (batch, ...) to the output of each sequence's own copy of the module."""
        y = None
        for adapter, sequences in self._step.sequences.items():
            copy = self.copies.get(adapter)
            if copy is None:
                continue
            if sequences is None:
                return copy(x)
            y = self._forward(x).clone() if y is None else y
            rows = sequences.to(x.device)
            y[rows] = copy(x[rows])
        return self._forward(x) if y is None else y
