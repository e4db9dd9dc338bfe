"""The settings of calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from chunkwise_lora.errors import ConfigError
from chunkwise_lora.method.config import StrictConfig

QUICK: dict[str, int] = {"tokens": 6_000, "refinements": 18, "rounds": 0, "explorations": 1}
"""Settings of `chunkwise calibrate --quick`, for a first result on a large model."""
ROTATION_TOKENS = 1_024
"""Tokens per step of rotating the basis."""
DISTILLATION_TOKENS = 2_048
"""Tokens per step of distillation."""


class CalibrationConfig(StrictConfig):
    """Settings of `chunkwise calibrate`: one budget, and how much work calibration does.

    Give exactly one budget, `mean_rank` or `max_loss_increase`.
    """

    mean_rank: float | None = Field(None, gt=0, le=1, description="Budget: mean rank as a share of the full rank.")
    max_loss_increase: float | None = Field(
        None, gt=0, le=1, description="Budget: largest increase of the loss (nats per token), as a share of the loss."
    )
    tokens: int = Field(
        16_000,
        ge=1,
        description="Largest number of tokens of the text to learn from; more tokens teach more about rare token ids. "
        "Held-back text and the passes of other steps grow with it.",
    )
    self_generated_tokens: int = Field(
        0,
        ge=0,
        description="Tokens that the adapter generates itself; the basis is learned from them and from the text.",
    )
    block: int = Field(512, ge=16, description="Tokens per sequence, at most the number of positions of the model.")
    rungs: int = Field(
        16, ge=1, le=64, description="Rungs of the ladder above rank 0; more rungs use the budget better."
    )
    lowest_share: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Lowest rung that a policy may use, as a share of the full rank; by default half of the mean rank, "
        "or rung 1 if the budget is a loss.",
    )
    refinements: int = Field(
        80, ge=0, description="Steps of gradient descent that rotate the basis, so that low rungs lose less."
    )
    rounds: int = Field(
        0,
        ge=0,
        description="Number of times that the basis is rotated for the fitted policy and the policy is fitted again.",
    )
    keep_directions: bool = Field(
        False, description="Keep the directions and rungs of the given ladder, and fit only the policy."
    )
    distillations: int = Field(
        0,
        ge=0,
        description="Steps of distillation: the adapter's weights learn the outputs of full rank at the rungs of the "
        "policy.",
    )
    distillation_rate: float = Field(
        5e-4, gt=0, le=1, description="Highest learning rate of distillation; 1e-3 suits tasks with short answers."
    )
    explorations: int = Field(
        2, ge=1, description="Passes over the text in which every token runs on a random rung, to measure its cost."
    )
    held_share: float = Field(
        0.1,
        gt=0,
        lt=0.5,
        description="Share of the text, at its end, that is held back to choose settings and to check the result, "
        "unless a held text is given; at most a quarter of the tokens to learn from.",
    )
    int8: bool = Field(
        True,
        description="Store keys and values as INT8 if their KL divergence from full precision is at most 0.1% of the "
        "loss.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Number format of the ladder's factors. What to expect of the policy is measured in it."
    )
    minutes: float | None = Field(
        None,
        gt=0,
        description="Scale tokens, refinements and distillations so that calibration takes about this many minutes on "
        "this machine.",
    )
    seed: int = Field(0, ge=0, description="Seed of all random choices.")

    @model_validator(mode="after")
    def _one_budget(self) -> CalibrationConfig:
        if (self.mean_rank is None) == (self.max_loss_increase is None):
            raise ConfigError("CalibrationConfig: give one budget, mean_rank or max_loss_increase")
        return self

    def lowest_rung(self, rung_ranks: Sequence[float]) -> int:
        """The lowest rung that a policy may use, of a ladder with these ranks.

        By default it is that of half of the mean rank, but not the one without any rank.
        """
        top, full = len(rung_ranks) - 1, rung_ranks[-1]
        share = (self.mean_rank or 0) / 2 if self.lowest_share is None else self.lowest_share
        nearest = min(range(top), key=lambda rung: abs(rung_ranks[rung] - share * full))
        return nearest if self.lowest_share is not None else min(max(nearest, 1), top - 1)

    def sampled_rungs(self, rung_ranks: Sequence[float]) -> tuple[int, int]:
        """The first and the end (exclusive) of the rungs that the basis is rotated for at first.

        They lie around the mean rank, because a basis that is good for one rank is not the best one for another.
        """
        lowest, top = self.lowest_rung(rung_ranks), len(rung_ranks) - 1
        most = (2 * self.mean_rank if self.mean_rank is not None else 1) * rung_ranks[-1]
        return lowest, min(top, max(lowest + 1, sum(rank <= most for rank in rung_ranks)))

    # How the work of every step follows from `tokens`.

    @property
    def held_tokens(self) -> int:
        """Largest number of tokens that are held back, for choice and check together."""
        return min(self.tokens // 4, 131_072)

    @property
    def gathered_tokens(self) -> int:
        """Tokens that second moments and Fisher information are gathered on. They are a few thousand numbers, so more
        tokens would not change them much."""
        return min(self.tokens // 2, 24_576)

    @property
    def divergence_tokens(self) -> int:
        """Tokens that run once per rung, to measure the divergence of every rung."""
        return min(self.tokens // 16, 8_192)

    @property
    def keeps_full_rank(self) -> bool:
        """Whether the calibrated ladder computes the same function as the given one at full rank."""
        return not self.distillations and self.dtype == "float32"

    def scaled(self, factor: float) -> CalibrationConfig:
        """The same settings with `factor` times the work."""
        amounts = {name: getattr(self, name) for name in ("tokens", "refinements", "distillations")}
        return self.model_copy(update={name: math.ceil(factor * amount) for name, amount in amounts.items()})
