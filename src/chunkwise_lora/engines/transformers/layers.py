"""Linear layers that add what the current plan gates of an adapter.

The reference semantics, for token t with gates g_t, is `y_t = W x_t + up (g_t * (down x_t))`. What runs is decided once
per forward pass, for all layers: a `Step`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from chunkwise_lora.errors import EngineError
from chunkwise_lora.ladder import LadderModule

GROUPING_GAIN = 24.0
"""Tokens are grouped by rung when that saves this many directions per token: moving a token's activations into a
group and back costs about as much as that many of its directions."""


class Factors:
    """One module's directions on the device, with the slices of every rung ready."""

    def __init__(self, module: LadderModule, device: torch.device, dtype: torch.dtype) -> None:
        down = module.down.to(device, dtype).contiguous()
        up = module.up.to(device, dtype).T.contiguous()  # transposed, so that a rung is a contiguous slice
        self.ranks = module.ranks
        self.table = module.gate_table().to(device, dtype)
        """(rungs, r)"""
        self.slices = [(down[:k].T, up[:k]) if k else None for k in module.ranks]
        """Per rung the factors (in, k) and (k, out), views of the full ones; None at rank 0."""


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
        """(tokens, k) the gates of a module; modules with equal ranks share them."""
        gates = self._gates.get(factors.ranks)
        if gates is None:
            assert self.weights is not None
            table = factors.table[:, : factors.ranks[self.rung]]
            gates = self._gates[factors.ranks] = self.weights.to(table.dtype) @ table
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


class GatedLinear:
    """Stands in for the `forward` of a linear module of any kind and adds the adapters' parts."""

    def __init__(self, name: str, module: nn.Module, step: Step) -> None:
        self.name = name
        self.factors: dict[str, Factors] = {}
        self.inner: Callable[[Tensor], Tensor] = module.forward
        """What gives W x: the module's own forward, or a `ReplacedModule`."""
        self._step = step

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        y = self.inner(x)
        for part in self._step.parts:
            factors = self.factors.get(part.adapter)
            if factors is not None and (slices := factors.slices[part.rung]) is not None:
                y = self._add(y, x, part, factors, slices)
        return y

    def _add(self, y: Tensor, x: Tensor, part: Part, factors: Factors, slices: tuple[Tensor, Tensor]) -> Tensor:
        down, up = slices
        if part.weights is None and part.rows is None:
            return y + (x.to(down.dtype) @ down @ up).to(y.dtype)
        x_rows, y_rows = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        columns, rest = divmod(len(x_rows), self._step.batch)
        if rest or columns > self._step.width or (columns < self._step.width and x.ndim < 3):
            raise EngineError(
                f"{self.name}: sees {len(x_rows)} tokens of a pass of {self._step.batch} x {self._step.width} (a "
                "routed expert?), so it cannot give each its own gates; use the lossless preset with one adapter per "
                "batch"
            )
        if columns < self._step.width:
            part = part.tail(columns, self._step)
        part = part.on(x.device)
        hidden = (x_rows if part.rows is None else x_rows[part.rows]).to(down.dtype) @ down
        if part.weights is not None:
            hidden = hidden * part.gates(factors)
        output = (hidden @ up).to(y.dtype)
        return (y_rows + output if part.rows is None else y_rows.index_add(0, part.rows, output)).view(y.shape)


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
