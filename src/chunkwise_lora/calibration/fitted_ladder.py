"""A ladder with its cost model, which together give the best policy for every mean rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import numpy as np

from chunkwise_lora.calibration.cost_model import Observations
from chunkwise_lora.calibration.estimator import FittedEstimator, fit_estimator
from chunkwise_lora.calibration.exploration import explore
from chunkwise_lora.calibration.run import CalibrationRun
from chunkwise_lora.calibration.rung_policy import RungPolicy, choose_rungs
from chunkwise_lora.calibration.rung_sampler import PlannedRungs
from chunkwise_lora.calibration.unfinished import Values
from chunkwise_lora.ladder import RankLadder
from chunkwise_lora.method.complexity import SIGNALS
from chunkwise_lora.method.config import (
    ChunkingConfig,
    ChunkWiseConfig,
    ComplexityConfig,
    CompositionConfig,
    KVCacheConfig,
    LevelKVPolicy,
    SelectionConfig,
)
from chunkwise_lora.method.scheduler import RuntimeScheduler

ROUNDING = 1e-6
"""A rung may exceed a mean rank by this share."""


@dataclass(frozen=True)
class FittedLadder:
    """A ladder, and what its rungs cost the tokens of the text."""

    ladder: RankLadder
    """Holds what the estimator learned."""
    estimator: FittedEstimator
    scores: np.ndarray
    """(n,) the cost model's score of every token of the learning text."""
    allowed: Sequence[int]
    """Rungs that a policy may use."""

    def rung_policy(self, share: float) -> RungPolicy:
        """The best choice of rungs for a mean rank, which is given as a share of the full rank."""
        ranks = self.ladder.rung_ranks
        return choose_rungs(self.estimator.costs, self.scores, ranks, share * ranks[-1], self.allowed)

    def one_rung(self, share: float) -> ChunkWiseConfig:
        """The configuration that gives every token the same rung: the highest one within a mean rank, which is given as
        a share of the full rank, or else the lowest one that is allowed."""
        ranks = self.ladder.rung_ranks
        within = [rung for rung in self.allowed if ranks[rung] <= share * ranks[-1] * (1 + ROUNDING)]
        return alike(ranks[max(within, default=min(self.allowed))] / ranks[-1])

    def config(self, policy: RungPolicy) -> ChunkWiseConfig:
        """The configuration that runs a choice of rungs, without cross-fades and with a full-precision KV cache."""
        unused = {name: 0.0 for name in SIGNALS if name not in self.estimator.signals}
        return ChunkWiseConfig(
            complexity=ComplexityConfig(learned=True, **unused),
            chunking=policy.chunking,
            selection=policy.selection,
            composition=CompositionConfig(window=0),
            kv_cache=KVCacheConfig(levels=(LevelKVPolicy(),) * len(policy.selection.scales)),
        )

    def sampler(self, run: CalibrationRun, share: float) -> PlannedRungs:
        """A sampler of the policy's rungs for a mean rank, which is given as a share of the full rank."""
        config, ranks = self.config(self.rung_policy(share)), self.ladder.rung_ranks
        new_scheduler = partial(RuntimeScheduler, config, ranks, run.vocab_size, self.ladder.learned)
        top = len(ranks) - 1
        return PlannedRungs(new_scheduler, run.config.lowest_rung(ranks), top)


def alike(rank_share: float) -> ChunkWiseConfig:
    """The configuration that gives every token the rung of a rank, with a full-precision KV cache."""
    return ChunkWiseConfig(
        chunking=ChunkingConfig(thresholds=()),
        selection=SelectionConfig(rank_shares=(rank_share,), scales=(1.0,)),
        composition=CompositionConfig(window=0),
        kv_cache=KVCacheConfig(levels=(LevelKVPolicy(),)),
    )


def fit_ladder(run: CalibrationRun, ladder: RankLadder) -> FittedLadder:
    """Measure what the ladder's rungs cost tokens, and fit an estimator that predicts these costs.

    The estimator is fitted to the learning text. The choice text decides which signals it uses.
    """
    allowed = range(run.config.lowest_rung(ladder.rung_ranks), ladder.rungs)

    def observed() -> Values:
        generator = np.random.default_rng(run.config.seed)
        with run.attach(ladder) as model:
            parts = [explore(run, model, text, allowed, generator) for text in (run.text.learning, run.text.choice)]
        return {f"{i} {name}": tensor for i, part in enumerate(parts) for name, tensor in vars(part).items()}

    values = run.unfinished.stage("costs", observed)
    names = [field.name for field in fields(Observations)]
    seen, unseen = (Observations(*(values[f"{i} {name}"] for name in names)) for i in (0, 1))
    estimator = fit_estimator(run, seen.scored(), unseen.scored(), ladder.rungs)
    ladder = replace(ladder, learned=estimator.costs.learned)
    return FittedLadder(ladder, estimator, estimator.costs.scores(seen), allowed)
