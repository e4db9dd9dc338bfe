"""The algebra of a ladder: plain SVD, directions as trained, data-aware directions, sorting by importance.

The matrix dW = s B A of a module is never formed: thin QR of both factors, then an SVD of their r x r core.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from chunkwise_lora.errors import LadderError
from chunkwise_lora.ladder.module import LadderModule, direction_lengths, even_ranks

Decompose = Callable[[Tensor, Tensor, float, int], LadderModule]
"""Makes a module from lora_B (out, r), lora_A (r, in), the scale, and the number of rungs above rank 0."""


def decompose(b: Tensor, a: Tensor, scale: float, steps: int) -> LadderModule:
    """Compute the SVD of scale * b @ a in O((in + out) r^2), on `steps` + 1 even rungs.

    Args:
        b: (out, r), PEFT's lora_B.
        a: (r, in), PEFT's lora_A.
        scale: The adapter's scale s.
        steps: Number of rungs above rank 0.
    """
    q_up, r_up = torch.linalg.qr(scale * b.double())
    q_down, r_down = torch.linalg.qr(a.double().T)
    u, sigma, v = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    up, down = (q_up @ u).float(), (sigma[:, None] * (v @ q_down.T)).float()
    return LadderModule(up, down, direction_lengths(up, down), even_ranks(len(sigma), steps))


def as_trained(b: Tensor, a: Tensor, scale: float, steps: int) -> LadderModule:
    """Keep the directions of scale * b @ a in their order. The arguments are those of `decompose`."""
    up, down = (scale * b.double()).float(), a.float().contiguous()
    sigma = direction_lengths(up, down)
    return LadderModule(up, down, sigma, even_ranks(len(sigma), steps))


def reweight(module: LadderModule, moment: Tensor, output: Tensor | None = None) -> LadderModule:
    """Rotate the basis of a module so that it truncates best for given inputs and, optionally, given outputs.

    Args:
        module: The module to rebuild; its product stays the same at full rank.
        moment: (r, r) second moment E[z z^T] of z = down @ x.
        output: (r, r) second moment E[q q^T] of the gradient q = up^T d log p / dy. Without it, or if it is all
            zeros, all errors of the output have the same weight.
    """
    g_half, g_inverse_half = _roots(moment)
    if output is not None and output.any():
        s_half, s_inverse_half = _roots(output)
        back = module.up.double() @ s_inverse_half
    else:  # the weight of an error is its length, and up = q r with an orthonormal q
        back, s_half = torch.linalg.qr(module.up.double())
    u, sigma, v = torch.linalg.svd(s_half @ g_half, full_matrices=False)
    up, down = back @ u, sigma[:, None] * (v @ g_inverse_half @ module.down.double())
    return LadderModule(up.to(module.up.dtype), down.to(module.down.dtype), sigma.float(), module.ranks)


def _roots(moment: Tensor, ridge: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Return the square root of a second moment and its inverse, in float64.

    The ridge, relative to the mean of the diagonal, keeps directions finite that the data do not use.
    """
    g = moment.double()
    g = g + ridge * g.diagonal().mean() * torch.eye(len(g), dtype=g.dtype)
    values, vectors = torch.linalg.eigh(g)
    root = values.clamp_min(1e-300).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def sort_by_importance(
    modules: Mapping[str, LadderModule], importance: Mapping[str, Tensor], steps: int
) -> dict[str, LadderModule]:
    """Sort the directions by importance, and choose rungs that hold the most important directions for their cost.

    Args:
        modules: The modules by name.
        importance: Per module (r,): what each direction contributes, such as the KL divergence of switching it off.
        steps: Number of rungs above rank 0. Rung i holds the directions with the highest importance per cost, over all
            modules, up to i / `steps` of the total cost.

    Raises:
        LadderError: The importance is not given for exactly these modules, or not finite.
    """
    if importance.keys() != modules.keys():
        raise LadderError("sorted_by needs the importance of exactly the ladder's modules")
    ordered, per_cost, costs = {}, [], []
    for name, module in modules.items():
        if importance[name].shape != (module.rank,) or not importance[name].isfinite().all():
            raise LadderError(f"{name}: its importance must be {module.rank} finite numbers; measure it again")
        order = importance[name].argsort(descending=True, stable=True)
        sigma = importance[name][order].clamp_min(0).sqrt().float()
        up, down = module.up[:, order].contiguous(), module.down[order].contiguous()
        ordered[name] = replace(module, up=up, down=down, sigma=sigma)
        per_cost.append(sigma.square() / module.cost)
        costs.append(torch.full((module.rank,), float(module.cost), dtype=torch.float64))
    order, cost = torch.cat(per_cost).argsort(descending=True, stable=True), torch.cat(costs)
    spent = torch.empty_like(cost)
    spent[order] = cost[order].cumsum(0) / cost.sum() * steps
    rungs = spent.sub(1e-6).ceil().split([module.rank for module in ordered.values()])
    return {
        name: replace(module, ranks=tuple(int((rung <= step).sum()) for step in range(steps + 1)))
        for (name, module), rung in zip(ordered.items(), rungs, strict=True)
    }
