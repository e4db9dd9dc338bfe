"""The basis of a ladder: its directions and their importance, and how gradient descent rotates the basis.

With `up` (out, r) and `down` (r, in), every invertible matrix R (r, r) gives another basis, `up @ R` and
`R^-1 @ down`: the same adapter at full rank, but other directions to switch off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from chunkwise_lora.calibration.descent import RungTraining, match_full_rank
from chunkwise_lora.calibration.log_probabilities import DEFAULT, ChunkWiseModel, forward_hooks
from chunkwise_lora.ladder import RankLadder

BASIS_RATE, IMPORTANCE_RATE = 4e-3, 5e-3
"""Highest learning rates of Adam for the matrices R and for the log of the importance. Both were tuned on WikiText;
docs/research-notes.md has the measurements."""
SOFTNESS = 0.5
"""Width of the soft gates, in the log of importance over cost. Directions within about this distance of a rung's
threshold get a gradient for being switched on or off."""

FACTORS = ("up", "down", "sigma")
"""The tensors of a ladder's module."""


@dataclass(frozen=True)
class Basis:
    """The directions of a ladder, and how important each of them is."""

    ladder: RankLadder
    importance: Mapping[str, Tensor]
    """(r,) by module name: the KL divergence, in nats per token, that switching each direction off would cost."""

    def on_rungs(self, rungs: int) -> RankLadder:
        """The ladder with `rungs` rungs above rank 0, which switch the most important directions on first."""
        return self.ladder.sorted_by(self.importance, rungs)

    def values(self) -> dict[str, Tensor]:
        """All tensors, by names from which `of_values` restores the basis."""
        return factors_of(self.ladder) | {f"{name} importance": one for name, one in self.importance.items()}

    @classmethod
    def of_values(cls, ladder: RankLadder, values: Mapping[str, Tensor]) -> Basis:
        """The basis of the tensors `values`, for a ladder of the same modules."""
        importance = {name: values[f"{name} importance"] for name in ladder.modules}
        return cls(with_factors(ladder, values), importance)


def factors_of(ladder: RankLadder) -> dict[str, Tensor]:
    """The tensors of all modules, by names from which `with_factors` restores them."""
    return {f"{name} {part}": getattr(one, part) for name, one in ladder.modules.items() for part in FACTORS}


def with_factors(ladder: RankLadder, values: Mapping[str, Tensor]) -> RankLadder:
    """The ladder with the tensors `values`."""
    modules = {}
    for name, module in ladder.modules.items():
        up, down, sigma = (values[f"{name} {part}"] for part in FACTORS)
        modules[name] = replace(module, up=up, down=down, sigma=sigma)
    return ladder.with_modules(modules)


def rotate_basis(
    model: ChunkWiseModel, basis: Basis, training: RungTraining, rungs: int, adapter: str = DEFAULT
) -> Basis:
    """Learn a basis in which sampled rungs are close to full rank, by gradient descent on the KL divergence.

    One matrix R is learned per module, and with it the importance of every direction, which decides the rung that
    switches the direction on. Switching uses hard gates in the forward pass and the gradient of soft gates in the
    backward pass (straight-through estimator, Bengio et al., arXiv 1308.3432).

    Args:
        model: A model with the ladder of `basis` attached.
        basis: Where to begin. The ladder's `sigma` must be the root mean square of z = down @ x, which holds after
            `RankLadder.data_aware`.
        training: The text and the rungs to learn for.
        rungs: Number of rungs above rank 0 that the ladder will have.
        adapter: Name of the ladder.

    Returns:
        The rotated basis. Its `sigma` is 1, so it can be rotated again.
    """
    modules, device = basis.ladder.modules, model.input_device
    scales = {name: m.sigma.clamp_min(1e-6 * float(m.sigma.max()) + 1e-12) for name, m in modules.items()}
    ups = {name: (m.up.float() * scales[name]).to(device) for name, m in modules.items()}
    downs = {name: (m.down.float() / scales[name][:, None]).to(device) for name, m in modules.items()}
    rotations = {name: torch.zeros(m.rank, m.rank, device=device, requires_grad=True) for name, m in modules.items()}
    sizes = [m.rank for m in modules.values()]
    cost = torch.cat([torch.full((m.rank,), float(m.cost), device=device) for m in modules.values()])
    importance = torch.cat([basis.importance[name] for name in modules]).to(device)
    priority = (importance.clamp_min(1e-12) / cost).log().requires_grad_()
    optimizer = torch.optim.Adam(
        [{"params": [*rotations.values()], "lr": BASIS_RATE}, {"params": [priority], "lr": IMPORTANCE_RATE}],
        betas=(0.9, 0.98),
    )
    matrices: dict[str, tuple[Tensor, Tensor]] = {}
    closed: dict[str, Tensor] = {}

    def subtract_closed(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not closed:
                return None
            matrix, inverse = matrices[name]
            lost = args[0].float() @ downs[name].T @ inverse.T * closed[name].view(*args[0].shape[:-1], -1)
            return output - (lost @ (ups[name] @ matrix).T).to(output.dtype)

        return hook

    def switch_rungs(chosen: Tensor | None) -> None:
        if chosen is None:
            closed.clear()
            return
        for name, rotation in rotations.items():
            matrix = torch.eye(len(rotation), device=device) + rotation
            matrices[name] = matrix, torch.linalg.inv(matrix)
        gates = _gates(priority, cost, chosen, rungs)
        closed.update(zip(modules, (1 - gates).split(sizes, dim=-1), strict=True))

    with forward_hooks(model.base, {name: subtract_closed(name) for name in modules}):
        match_full_rank(model, training, optimizer, switch_rungs, adapter)
    with torch.no_grad():
        rotated = {}
        for name, module in modules.items():
            matrix = torch.eye(module.rank, device=device) + rotations[name]
            up, down = ups[name] @ matrix, torch.linalg.inv(matrix) @ downs[name]
            up, down = up.to(module.up), down.to(module.down)
            rotated[name] = replace(module, up=up, down=down, sigma=torch.ones(module.rank))
        learned = (priority.exp() * cost).cpu().split(sizes)
    return Basis(basis.ladder.with_modules(rotated), dict(zip(modules, learned, strict=True)))


def _gates(priority: Tensor, cost: Tensor, chosen: Tensor, rungs: int) -> Tensor:
    """The gates of the chosen rungs, with the gradient of soft gates.

    Args:
        priority: (directions,) log of importance over cost, of all modules' directions.
        cost: (directions,) cost of each direction.
        chosen: (batch, tokens) rungs.
        rungs: Number of rungs above rank 0.

    Returns:
        (batch, tokens, directions) ones and zeros.
    """
    order = priority.detach().argsort(descending=True, stable=True)
    spent = cost[order].cumsum(0) / cost.sum() * rungs
    ends = torch.arange(rungs + 1, device=spent.device) + 1e-4
    first_closed = torch.searchsorted(spent, ends).clamp_max(len(order) - 1)
    thresholds = priority.detach()[order][first_closed][chosen][..., None]
    soft = torch.sigmoid((priority - thresholds) / SOFTNESS)
    hard = (priority.detach() > thresholds).float()
    return hard + soft - soft.detach()
