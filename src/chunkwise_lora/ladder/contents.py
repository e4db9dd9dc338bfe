"""What a ladder holds, and the check that its parts fit together."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from chunkwise_lora.errors import LadderError
from chunkwise_lora.ladder.module import LadderModule
from chunkwise_lora.method.complexity import LearnedComplexity
from chunkwise_lora.method.config import ChunkWiseConfig

Build = Literal["svd", "as-trained", "data-aware", "calibrated"]


class Expectation(BaseModel):
    """What a policy was fitted for, and what it cost on text that calibration had used for nothing else."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    asked_rank: float | None
    """The mean rank that was asked for; None if a loss was."""
    mean_rank: float
    """The mean rank on that text."""
    loss_increase: float
    """Increase of the loss over full rank, as a share of the loss."""
    loss_increase_error: float
    """Half of the width of the 95% interval of `loss_increase`."""


@dataclass(frozen=True)
class LadderContents:
    """The contents of a ladder. `RankLadder` adds methods that build, change, read and write ladders.

    A rung names a rank for every module. All modules have the same number of rungs, the lowest first.
    """

    modules: Mapping[str, LadderModule]
    """One per adapted linear module, by the module's name in the base model."""
    base_model: str | None = None
    """Name or path of the base model that the adapter was trained on, as the adapter states it."""
    build: Build = "svd"
    """How the directions were found."""
    saved_modules: Mapping[str, Tensor] = field(default_factory=dict)
    """Parameters that the adapter replaces (PEFT's `modules_to_save`), by parameter name."""
    learned: LearnedComplexity | None = None
    """What calibration learned about which tokens need rank."""
    policy: ChunkWiseConfig | None = None
    """The settings that calibration fitted to this ladder. Engines use them unless a call or a model has its own."""
    rung_divergence: tuple[float, ...] | None = None
    """Per rung: mean KL divergence from full rank, nats per token, when every token runs on that rung, as calibration
    measured it."""
    expectation: Expectation | None = None
    """What to expect of the policy, as calibration measured it."""

    def __post_init__(self) -> None:
        if not self.modules:
            raise LadderError("a ladder needs at least one module")
        for name, module in self.modules.items():
            module.check(name)
        if len({len(module.ranks) for module in self.modules.values()}) != 1:
            raise LadderError("all modules of a ladder need the same number of rungs")
        if self.policy is not None and self.policy.complexity.learned and self.learned is None:
            raise LadderError(
                "the ladder's policy asks for complexity.learned, but the ladder holds nothing learned; run `chunkwise "
                "calibrate`, or take a policy with complexity.learned = false"
            )
        if self.rung_divergence is not None and (
            len(self.rung_divergence) != self.rungs or not all(map(math.isfinite, self.rung_divergence))
        ):
            raise LadderError(f"rung_divergence must hold one finite number for each of the {self.rungs} rungs")

    @property
    def rungs(self) -> int:
        """Number of rungs."""
        return len(next(iter(self.modules.values())).ranks)

    @property
    def rung_ranks(self) -> tuple[float, ...]:
        """Each rung's rank: the mean over modules, weighted by what a direction costs to read (in + out)."""
        costs = sum(module.cost for module in self.modules.values())
        return tuple(
            sum(module.ranks[rung] * module.cost for module in self.modules.values()) / costs
            for rung in range(self.rungs)
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names and shapes of the adapted modules: the same for all ladders that fit the same bases."""
        lines = [f"{name} {m.up.shape[0]} {m.down.shape[1]}\n" for name, m in sorted(self.modules.items())]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


Contents = TypeVar("Contents", bound=LadderContents)
"""The class of ladder that a reader makes."""
