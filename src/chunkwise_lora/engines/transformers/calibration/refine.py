"""Turning an adapter's directions so that its low rungs come closest to full rank, which itself stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from chunkwise_lora.engines.transformers.calibration.costs import Text, at_full_rank, divergence, hooked
from chunkwise_lora.engines.transformers.model import DEFAULT, ChunkWiseModel
from chunkwise_lora.ladder import RankLadder

CHUNK = 16
"""Tokens that share a random rung: a mixture, as plans will make it."""
SOFTNESS = 0.5
"""Width, in the log of a direction's worth, over which a threshold's gradient is felt."""
BASIS_RATE, WORTH_RATE = 4e-3, 5e-3


def refine(
    model: ChunkWiseModel,
    importance: Mapping[str, Tensor],
    batches: Iterable[Text],
    rungs: int,
    lowest: int,
    *,
    steps: int,
    adapter: str = DEFAULT,
    seed: int = 0,
) -> tuple[RankLadder, dict[str, Tensor]]:
    """Learn, by gradient descent on the KL divergence of random rungs from full rank, a better basis for every module.

    With up and down as the ladder holds them, any invertible R (r, r) gives up R and R^-1 down: the same adapter at
    full rank, but other directions to cut off. R is learned per module, and with it how much every direction is worth
    for its cost, which decides the rung that switches it on; there the hard gates take the gradient of soft ones.

    Args:
        model: With a ladder whose `sigma` is the root mean square of z = down @ x, as `data_aware` makes it.
        importance: What each direction contributes, to begin with.
        batches: One per step.
        rungs: Rungs above rank 0 that the budget will be cut into.
        lowest: The lowest rung that will be used.
        steps: Number of batches, for the schedule.
        adapter: The ladder's name.
        seed: Of the random rungs.

    Returns:
        The turned ladder, and the importance of its directions for `RankLadder.sorted_by`.
    """
    ladder = model.ladders[adapter]
    generator = torch.Generator().manual_seed(seed)
    scales = {name: m.sigma.clamp_min(1e-6 * float(m.sigma.max()) + 1e-12) for name, m in ladder.modules.items()}
    ups = {name: m.up.float() * scales[name] for name, m in ladder.modules.items()}
    downs = {name: m.down.float() / scales[name][:, None] for name, m in ladder.modules.items()}
    turns = {name: torch.zeros(m.rank, m.rank, requires_grad=True) for name, m in ladder.modules.items()}
    sizes = [m.rank for m in ladder.modules.values()]
    cost = torch.cat([torch.full((m.rank,), float(m.cost)) for m in ladder.modules.values()])
    worth = (torch.cat([importance[name] for name in ladder.modules]).clamp_min(1e-12) / cost).log()
    worth = worth.requires_grad_()
    optimizer = torch.optim.Adam(
        [{"params": [*turns.values()], "lr": BASIS_RATE}, {"params": [worth], "lr": WORTH_RATE}], betas=(0.9, 0.98)
    )
    warm_up = min(10, steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, max(0.0, 1 - step / steps))
    )
    bases: dict[str, tuple[Tensor, Tensor]] = {}
    closed: dict[str, Tensor] = {}

    def cut_off(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not closed:
                return None
            basis, inverse = bases[name]
            lost = args[0].float() @ downs[name].T @ inverse.T * closed[name].view(*args[0].shape[:-1], -1)
            return output - (lost @ (ups[name] @ basis).T).to(output.dtype)

        return hook

    with hooked(model.model, {name: cut_off(name) for name in ladder.modules}):
        for batch in batches:
            closed.clear()
            with torch.no_grad():
                full = at_full_rank(model, batch.tokens, adapter)
            eyes = {name: torch.eye(len(turn)) for name, turn in turns.items()}
            bases |= {name: (eyes[name] + turn, torch.linalg.inv(eyes[name] + turn)) for name, turn in turns.items()}
            sequences, tokens = batch.tokens.shape
            drawn = torch.randint(lowest, rungs, (sequences, -(-tokens // CHUNK)), generator=generator)
            drawn = drawn.repeat_interleave(CHUNK, dim=1)[:, :tokens]
            gates = _gates(worth, cost, drawn, rungs)
            closed |= dict(zip(ladder.modules, (1 - gates).split(sizes, dim=-1), strict=True))
            with torch.enable_grad():
                loss = divergence(full, at_full_rank(model, batch.tokens, adapter))[batch.counted].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        modules = {}
        for name, module in ladder.modules.items():
            basis = torch.eye(module.rank) + turns[name]
            up, down = ups[name] @ basis, torch.linalg.inv(basis) @ downs[name]
            modules[name] = replace(module, up=up.to(module.up.dtype), down=down.to(module.down.dtype))
        learned = (worth.exp() * cost).split(sizes)
    return replace(ladder, modules=modules), dict(zip(ladder.modules, learned, strict=True))


def _gates(worth: Tensor, cost: Tensor, drawn: Tensor, rungs: int) -> Tensor:
    """(batch, tokens, directions) ones and zeros for the `drawn` rungs (batch, tokens), with a gradient to `worth`."""
    order = worth.detach().argsort(descending=True, stable=True)
    spent = cost[order].cumsum(0) / cost.sum() * rungs
    first_closed = torch.searchsorted(spent, torch.arange(rungs + 1) + 1e-4).clamp_max(len(order) - 1)
    thresholds = worth.detach()[order][first_closed][drawn][..., None]
    soft = torch.sigmoid((worth - thresholds) / SOFTNESS)
    hard = (worth.detach() > thresholds).float()
    return hard + soft - soft.detach()
