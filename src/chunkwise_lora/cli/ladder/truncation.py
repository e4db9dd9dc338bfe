"""One rung of a ladder as a ladder of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch.nn.functional import pad

from chunkwise_lora.ladder import LadderModule, RankLadder


@dataclass(frozen=True)
class Truncation:
    """A truncated ladder, and what it loses."""

    ladder: RankLadder
    """Its full rank is the chosen rung. Modules that have rank 0 there are left out."""
    kl: float | None
    """KL divergence from full rank, nats per token, as calibration measured it; None if it did not."""
    energy_kept: float
    """Share of the squared singular values of all modules that are kept."""


def truncate(ladder: RankLadder, share: float, one_rank: bool = False) -> Truncation:
    """The highest rung whose rank is at most `share` of the full rank, or else the lowest rung above rank 0.

    With `one_rank` every module gets the same rank instead, the highest whole number that is at most `share` of the
    full rank, and at least 1. Modules of a lower rank are filled up with zeros.
    """
    full = ladder.rung_ranks[-1]
    if one_rank:
        rank = max(1, math.floor(share * full + 1e-6)) if share < 1 else max(m.rank for m in ladder.modules.values())
        ranks = {name: min(rank, module.rank) for name, module in ladder.modules.items()}
        kl = None
    else:
        rungs = [rung for rung, rank in enumerate(ladder.rung_ranks) if rank > 0]
        rung = max((rung for rung in rungs if ladder.rung_ranks[rung] <= share * full + 1e-6), default=rungs[0])
        ranks = {name: module.ranks[rung] for name, module in ladder.modules.items()}
        kl = ladder.rung_divergence[rung] if ladder.rung_divergence is not None else None
    total = sum(float(module.sigma.square().sum()) for module in ladder.modules.values())
    kept = sum(float(module.sigma[: ranks[name]].square().sum()) for name, module in ladder.modules.items())
    modules = {name: _cut(module, ranks[name]) for name, module in ladder.modules.items() if ranks[name]}
    if one_rank:
        modules = {name: _filled(module, rank) for name, module in modules.items()}
    changed = replace(ladder, modules=modules, policy=None, learned=None, rung_divergence=None)
    return Truncation(changed, kl, kept / total if total else 1.0)


def _cut(module: LadderModule, rank: int) -> LadderModule:
    """The first `rank` directions of a module, as its only rung."""
    up, down = module.up[:, :rank].contiguous(), module.down[:rank].contiguous()
    return replace(module, up=up, down=down, sigma=module.sigma[:rank], ranks=(rank,))


def _filled(module: LadderModule, rank: int) -> LadderModule:
    """The same product with zero directions up to `rank`."""
    more = rank - module.rank
    up, down = pad(module.up, (0, more)), pad(module.down, (0, 0, 0, more))
    return replace(module, up=up, down=down, sigma=pad(module.sigma, (0, more)), ranks=(rank,))
