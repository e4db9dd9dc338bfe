"""A ladder in numbers, for tables and JSON."""

from __future__ import annotations

from typing import Any

from chunkwise_lora.ladder.contents import LadderContents


def describe(ladder: LadderContents) -> dict[str, Any]:
    """Plain data: ranks and kept energy per rung and module, and what calibration measured per rung."""
    return {
        "base_model": ladder.base_model,
        "build": ladder.build,
        "rung_ranks": ladder.rung_ranks,
        "rung_divergence": ladder.rung_divergence,
        "calibrated": ladder.policy is not None,
        "modules": {
            name: {
                "in": module.down.shape[1],
                "out": module.up.shape[0],
                "ranks": module.ranks,
                "sigma": module.sigma.tolist(),
                "energy": [module.energy(k) for k in module.ranks],
            }
            for name, module in ladder.modules.items()
        },
    }
