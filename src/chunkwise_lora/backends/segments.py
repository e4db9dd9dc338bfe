"""What the tokens of a forward pass get from an adapter, decided once for all layers: shared by the engines.

The reference semantics, for token t with gates g_t, is `y_t = W x_t + up (g_t * (down x_t))`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from chunkwise_lora.backends.native import emulates
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

    def tail(self, columns: int, batch: int, width: int) -> Part:
        """The same for a module that sees only the last `columns` of every sequence, as an output head may.

        The pass is `batch` sequences of `width` tokens.
        """
        if columns not in self._tails:
            hidden = width - columns
            rows = torch.arange(batch * width) if self.rows is None else self.rows
            seen = rows % width >= hidden
            rows = rows[seen]
            weights = None if self.weights is None else self.weights[seen]
            rows = rows // width * columns + rows % width - hidden
            self._tails[columns] = Part(self.adapter, self.rung, weights, rows)
        return self._tails[columns]


def highest_rungs(weights: np.ndarray) -> np.ndarray:
    """(tokens,) the highest rung that each token's weights (tokens, rungs) use; 0 where they use none."""
    active = weights != 0
    return np.where(active.any(axis=1), weights.shape[1] - 1 - np.argmax(active[:, ::-1], axis=1), 0)


def ranks_of(weights: np.ndarray, rung_ranks: np.ndarray) -> np.ndarray:
    """(tokens,) the mean of `rung_ranks` (rungs,) under each token's weights (tokens, rungs), whatever its scale."""
    total = weights.sum(axis=1)
    return (weights @ rung_ranks) / np.where(total == 0, 1, total)


def segments_of(adapter: str, weights: np.ndarray, ranks: np.ndarray, rows: np.ndarray | None) -> list[Part]:
    """Choose how an adapter runs: one slice, one gated product, or tokens grouped by rung.

    `weights` is (tokens, rungs), `ranks` (rungs,) the rung's mean ranks, `rows` where the tokens stand in the pass.
    """
    top = highest_rungs(weights)
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


def entropies_of(logits: Tensor) -> Tensor:
    """(n,) float32 entropies in nats of the distributions that logits (n, vocabulary) stand for."""
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p).nan_to_num(0.0).sum(-1)
