"""Linear layers that add what the current plan gates of an adapter.

The reference semantics, for token t with gates g_t, is `y_t = W x_t + up (g_t * (down x_t))`. What runs is decided once
per forward pass, for all layers: a `Step`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from chunkwise_lora.engines.transformers.native import emulates, kernels
from chunkwise_lora.errors import EngineError
from chunkwise_lora.ladder import LadderModule

GROUPING_GAIN = 24.0
"""Tokens are grouped by rung when that saves this many directions per token: moving a token's activations into a
group and back costs about as much as that many of its directions."""

FEW_TOKENS = 32
"""Up to so many tokens of a pass the kernels are faster than PyTorch's products of matrices."""


class Factors:
    """One module's directions on the device, with the slices of every rung ready."""

    def __init__(self, module: LadderModule, device: torch.device, dtype: torch.dtype) -> None:
        down = module.down.to(device, dtype).contiguous()
        up = module.up.to(device, dtype).T.contiguous()  # transposed, so that a rung is a contiguous slice
        self.ranks = module.ranks
        self.slices = [(down[:k], up[:k]) for k in module.ranks]
        """Per rung the factors (k, in) and (k, out), views of the full ones."""
        self.emulated = emulates(dtype, device)
        self.table = module.gate_table().to(device)
        """(rungs, r) float32"""


@dataclass
class Part:
    """What some tokens of a forward pass get from one adapter. Its tensors are on the CPU until `on` is asked."""

    adapter: str
    rung: int
    """The highest rung that any of the tokens needs."""
    weights: Tensor | None = None
    """(tokens, rungs) weights over the rungs; None where every token gets `rung` whole."""
    rows: Tensor | None = None
    """(tokens,) where the tokens stand among all of the pass; None for all of them."""
    _gates: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    _tails: dict[int, Part] = field(default_factory=dict)
    _copies: dict[torch.device, Part] = field(default_factory=dict)

    def on(self, device: torch.device) -> Part:
        """The same with its tensors on `device`; layers on one device share it."""
        if device.type == "cpu":
            return self
        if device not in self._copies:
            weights, rows = (None if t is None else t.to(device) for t in (self.weights, self.rows))
            self._copies[device] = Part(self.adapter, self.rung, weights, rows)
        return self._copies[device]

    def gates(self, factors: Factors) -> Tensor:
        """(tokens, k) float32 the gates of a module; modules with equal ranks share them."""
        gates = self._gates.get(factors.ranks)
        if gates is None:
            assert self.weights is not None
            gates = self._gates[factors.ranks] = self.weights @ factors.table[:, : factors.ranks[self.rung]]
        return gates

    def tail(self, columns: int, step: Step) -> Part:
        """The same for a module that sees only the last `columns` of every sequence, as an output head may."""
        if columns not in self._tails:
            hidden = step.width - columns
            rows = torch.arange(step.batch * step.width) if self.rows is None else self.rows
            seen = rows % step.width >= hidden
            rows = rows[seen]
            weights = None if self.weights is None else self.weights[seen]
            rows = rows // step.width * columns + rows % step.width - hidden
            self._tails[columns] = Part(self.adapter, self.rung, weights, rows)
        return self._tails[columns]


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


def parts_of(adapter: str, weights: np.ndarray, ranks: np.ndarray, rows: np.ndarray | None) -> list[Part]:
    """Choose how an adapter runs: one slice, one gated product, or tokens grouped by rung.

    `weights` is (tokens, rungs), `ranks` (rungs,) the rung's mean ranks, `rows` where the tokens stand in the pass.
    """
    top = weights.shape[1] - 1 - np.argmax(weights[:, ::-1] != 0, axis=1)
    top[~weights.any(axis=1)] = 0
    highest = int(top.max())
    if len(weights) > 1 and ranks[highest] - ranks[top].mean() > GROUPING_GAIN:
        groups = [np.flatnonzero(top == rung) for rung in np.unique(top)]
        return [
            _part(adapter, weights[group], group if rows is None else rows[group], int(top[group[0]]))
            for group in groups
        ]
    return [_part(adapter, weights, rows, highest)]


def _part(adapter: str, weights: np.ndarray, rows: np.ndarray | None, rung: int) -> Part:
    whole = np.zeros(weights.shape[1], np.float32)
    whole[rung] = 1
    return Part(
        adapter,
        rung,
        None if (weights == whole).all() else torch.from_numpy(weights),
        None if rows is None else torch.from_numpy(rows),
    )


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
        return part if columns == step.width or everyone_alike else part.tail(columns, step)

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
