"""Turning an adapter's directions so that plans come closest to full rank, which stays as it is; and distilling it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from chunkwise_lora.calibration.costs import Text, at_full_rank, divergence, hooked
from chunkwise_lora.engines.transformers.model import DEFAULT, ChunkWiseModel
from chunkwise_lora.ladder import RankLadder
from chunkwise_lora.method.scheduler import RuntimeScheduler

CHUNK = 16
"""Tokens that share a random rung: a mixture, as plans will make it."""
SHIFT = 1
"""Rungs by which a plan is moved up or down, so that its neighbours stay good too."""
SOFTNESS = 0.5
"""Width, in the log of a direction's worth, over which a threshold's gradient is felt."""
BASIS_RATE, WORTH_RATE = 4e-3, 5e-3


Draw = Callable[[Tensor, torch.Generator], Tensor]
"""Chooses the rungs (sequences, tokens) at which token ids (sequences, tokens) are to come close to full rank."""


def random_rungs(lowest: int, rungs: int, chunk: int = CHUNK) -> Draw:
    """Any rung from `lowest` to the last one below `rungs`, for every `chunk` tokens."""

    def draw(tokens: Tensor, generator: torch.Generator) -> Tensor:
        sequences, length = tokens.shape
        of_chunks = torch.randint(lowest, rungs, (sequences, -(-length // chunk)), generator=generator)
        return of_chunks.repeat_interleave(chunk, dim=1)[:, :length]

    return draw


def planned_rungs(scheduler: Callable[[], RuntimeScheduler], lowest: int, rungs: int) -> Draw:
    """Those of a plan, all of a sequence's moved by the same step or none, and kept from `lowest` to below `rungs`.

    `scheduler` plans a new sequence.
    """

    def draw(tokens: Tensor, generator: torch.Generator) -> Tensor:
        plan = torch.from_numpy(np.stack([scheduler().step(row).weights.argmax(1) for row in tokens.tolist()]))
        shift = torch.randint(-SHIFT, SHIFT + 1, (len(tokens), 1), generator=generator)
        return (plan + shift).clamp(lowest, rungs - 1)

    return draw


def refine(
    model: ChunkWiseModel,
    importance: Mapping[str, Tensor],
    batches: Iterable[Text],
    draw: Draw,
    rungs: int,
    *,
    steps: int,
    adapter: str = DEFAULT,
    seed: int = 0,
) -> tuple[RankLadder, dict[str, Tensor]]:
    """Learn, by gradient descent on the KL divergence of drawn rungs from full rank, a better basis for every module.

    With up and down as the ladder holds them, any invertible R (r, r) gives up R and R^-1 down: the same adapter at
    full rank, but other directions to cut off. R is learned per module, and with it how much every direction is worth
    for its cost, which decides the rung that switches it on; there the hard gates take the gradient of soft ones.

    Args:
        model: With a ladder whose `sigma` is the root mean square of z = down @ x, as `data_aware` makes it.
        importance: What each direction contributes, to begin with.
        batches: One per step.
        draw: The rungs to learn for.
        rungs: Rungs above rank 0 that the budget will be cut into.
        steps: Number of batches, for the schedule.
        adapter: The ladder's name.
        seed: Of what is drawn.

    Returns:
        The turned ladder, which can be turned again, and the importance of its directions for `RankLadder.sorted_by`.
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

    def close(tokens: Tensor) -> None:
        for name, turn in turns.items():
            basis = torch.eye(len(turn)) + turn
            bases[name] = basis, torch.linalg.inv(basis)
        gates = _gates(worth, cost, draw(tokens, generator), rungs)
        closed.update(zip(ladder.modules, (1 - gates).split(sizes, dim=-1), strict=True))

    with hooked(model.model, {name: cut_off(name) for name in ladder.modules}):
        _descend(model, batches, optimizer, steps, adapter, close, closed.clear)
    with torch.no_grad():
        modules = {}
        for name, module in ladder.modules.items():
            basis = torch.eye(module.rank) + turns[name]
            up, down = ups[name] @ basis, torch.linalg.inv(basis) @ downs[name]
            up, down = up.to(module.up.dtype), down.to(module.down.dtype)
            modules[name] = replace(module, up=up, down=down, sigma=torch.ones(module.rank))
        learned = (worth.exp() * cost).split(sizes)
    return replace(ladder, modules=modules, rung_divergence=None), dict(zip(ladder.modules, learned, strict=True))


def distil(
    model: ChunkWiseModel,
    batches: Iterable[Text],
    draw: Draw,
    *,
    steps: int,
    rate: float,
    adapter: str = DEFAULT,
    seed: int = 0,
) -> RankLadder:
    """Learn, by gradient descent on the KL divergence of drawn rungs from full rank, the directions of every module.

    Unlike `refine`, this changes the adapter, at full rank too; rungs stay as they are. Needs no labels.

    Args:
        model: With a ladder whose full rank is what is learned.
        batches: One per step.
        draw: The rungs to learn for.
        steps: Number of batches, for the schedule.
        rate: Learning rate, at its highest.
        adapter: The ladder's name.
        seed: Of what is drawn.
    """
    ladder = model.ladders[adapter]
    generator = torch.Generator().manual_seed(seed)
    tables = {name: module.gate_table() for name, module in ladder.modules.items()}
    factors = {name: module.balanced() for name, module in ladder.modules.items()}
    parameters = [one.requires_grad_() for pair in factors.values() for one in pair]
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    rungs: list[Tensor] = []

    def moved(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not rungs:
                return None
            x, (up, down), known = args[0].float(), factors[name], ladder.modules[name]
            gates = tables[name][rungs[0]].view(*x.shape[:-1], -1)
            added = (x @ down.T * gates) @ up.T - x @ known.down.float().T @ known.up.float().T
            return output + added.to(output.dtype)

        return hook

    def lower(tokens: Tensor) -> None:
        rungs.append(draw(tokens, generator))

    with hooked(model.model, {name: moved(name) for name in ladder.modules}):
        _descend(model, batches, optimizer, steps, adapter, lower, rungs.clear)
    modules = {}
    for name, module in ladder.modules.items():
        up, down = (one.detach() for one in factors[name])
        modules[name] = replace(module, up=up.to(module.up.dtype), down=down.to(module.down.dtype))
    return ladder.with_modules(modules)


def _descend(
    model: ChunkWiseModel,
    batches: Iterable[Text],
    optimizer: torch.optim.Optimizer,
    steps: int,
    adapter: str,
    lower: Callable[[Tensor], None],
    restore: Callable[[], None],
) -> None:
    """Gradient descent on the KL divergence from full rank of the model once `lower` was told of the token ids.

    `restore` brings full rank back. Rates warm up shortly, then fall to 0.
    """
    warm_up = min(10, steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, max(0.0, 1 - step / steps))
    )
    for batch in batches:
        restore()
        with torch.no_grad():
            full = at_full_rank(model, batch.tokens, adapter)
        with torch.enable_grad():
            lower(batch.tokens)
            loss = divergence(full, at_full_rank(model, batch.tokens, adapter))[batch.counted].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _gates(worth: Tensor, cost: Tensor, drawn: Tensor, rungs: int) -> Tensor:
    """(batch, tokens, directions) ones and zeros for the `drawn` rungs (batch, tokens), with a gradient to `worth`."""
    order = worth.detach().argsort(descending=True, stable=True)
    spent = cost[order].cumsum(0) / cost.sum() * rungs
    first_closed = torch.searchsorted(spent, torch.arange(rungs + 1) + 1e-4).clamp_max(len(order) - 1)
    thresholds = worth.detach()[order][first_closed][drawn][..., None]
    soft = torch.sigmoid((worth - thresholds) / SOFTNESS)
    hard = (worth.detach() > thresholds).float()
    return hard + soft - soft.detach()
