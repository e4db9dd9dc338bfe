"""Cuts a ladder to one of its rungs, and tells what is lost."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from torch.nn.functional import pad

from chunkwise_lora.errors import LadderError
from chunkwise_lora.ladder.contents import LadderContents
from chunkwise_lora.ladder.module import LadderModule

Ladder = TypeVar("Ladder", bound=LadderContents)


@dataclass(frozen=True)
class Truncation(Generic[Ladder]):
    """A truncated ladder, and what was lost."""

    ladder: Ladder
    """A ladder whose only rung is the chosen one. Modules that have rank 0 on it are left out."""
    kl: float | None
    """KL divergence from full rank that calibration measured, nats per token; None if it was not measured."""
    energy_kept: float
    """Share of the squared sigma of all modules that is kept, from 0 to 1. For a plain SVD these are the squared
    singular values, for a calibrated ladder the importance of the directions."""


def truncate(ladder: Ladder, share: float, one_rank: bool = False) -> Truncation[Ladder]:
    """Cut a ladder to one rung.

    The result has no policy, and nothing learned or measured: every token runs on its only rung.

    Args:
        ladder: The ladder to cut.
        share: Share of the full rank, above 0 and at most 1. The highest rung whose rank is at most this share is
            taken; if there is none, the lowest rung above rank 0.
        one_rank: Give every module the same rank instead, the highest whole number that is at most `share` of the full
            rank, and at least 1. Modules of a lower rank are padded with zeros. This is for programs that cannot
            run an adapter whose modules differ in rank.

    Raises:
        LadderError: The share is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise LadderError(f"a ladder cannot be cut to {share:g} of its rank; give a share above 0 and at most 1")
    full, kl = ladder.rung_ranks[-1], None
    if one_rank:
        highest = max(module.rank for module in ladder.modules.values())
        rank = max(1, math.floor(share * full + 1e-6)) if share < 1 else highest
        ranks = {name: min(rank, module.rank) for name, module in ladder.modules.items()}
    else:
        rungs = [rung for rung, rank in enumerate(ladder.rung_ranks) if rank > 0]
        rung = max((rung for rung in rungs if ladder.rung_ranks[rung] <= share * full + 1e-6), default=rungs[0])
        ranks = {name: module.ranks[rung] for name, module in ladder.modules.items()}
        kl = ladder.rung_divergence[rung] if ladder.rung_divergence is not None else None
    total = sum(float(module.sigma.double().square().sum()) for module in ladder.modules.values())
    kept = sum(float(module.sigma[: ranks[name]].double().square().sum()) for name, module in ladder.modules.items())
    modules = {name: _cut(module, ranks[name]) for name, module in ladder.modules.items() if ranks[name]}
    if one_rank:
        modules = {name: _filled(module, rank) for name, module in modules.items()}
    cut = replace(ladder, modules=modules, policy=None, learned=None, rung_divergence=None, expectation=None)
    return Truncation(cut, kl, kept / total if total else 1.0)


def _cut(module: LadderModule, rank: int) -> LadderModule:
    """Keep the first `rank` directions of a module, as its only rung."""
    up, down = module.up[:, :rank].contiguous(), module.down[:rank].contiguous()
    return replace(module, up=up, down=down, sigma=module.sigma[:rank], ranks=(rank,))


def _filled(module: LadderModule, rank: int) -> LadderModule:
    """Add directions of zeros up to `rank`, which do not change the product."""
    more = rank - module.rank
    up, down = pad(module.up, (0, more)), pad(module.down, (0, 0, 0, more))
    return replace(module, up=up, down=down, sigma=pad(module.sigma, (0, more)), ranks=(rank,))
