"""ChunkWise and its baselines on one base model and one adapter."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from chunkwise_lora.calibration.log_probabilities import (
    ChunkWiseModel,
    kl_divergence,
    log_probabilities,
    log_probabilities_in_one_pass,
)
from chunkwise_lora.calibration.rung_policy import multiplier_for
from chunkwise_lora.engines.transformers.fitting import only_device_of
from chunkwise_lora.errors import ChunkWiseError, ConfigError, first_line
from chunkwise_lora.evaluation.methods import (
    FULL,
    Label,
    Method,
    PlainMethod,
    PlannedMethod,
    ReplannedMethod,
    Role,
)
from chunkwise_lora.ladder import RankLadder, is_ladder
from chunkwise_lora.ladder.backtracking import refuse_backtracking
from chunkwise_lora.ladder.contents import Expectation
from chunkwise_lora.method.config import ChunkWiseConfig

PLAIN, OWN, CALIBRATED = "plain SVD", "own rungs", "calibrated"
"""Names of the adapter's SVD, of the ladder in the adapter's folder, and of a calibrated ladder without a name."""
BASELINES = ("base", "svd", "ladder", "alike", "random", "oracle")
"""Names of the baselines that can be chosen."""
PLANS = "calibrated plans"
"""The series of all calibrated policies."""


@dataclass(frozen=True)
class MethodSelection:
    """Which methods an evaluation compares."""

    presets: Sequence[str]
    """Presets of ChunkWise, and `calibrated`: the policies of the calibrated ladders."""
    baselines: Sequence[str] = ()
    """Some of `BASELINES`. base: no adapter. svd: plain SVD, every token on the same rung. ladder: the same for the
    calibrated ladders, or else for the ladder in the adapter's folder. alike: every token on one of two neighbouring
    calibrated rungs, so that the mean rank is exactly that of the plan. random: the rungs of the calibrated plan,
    shuffled over the tokens. oracle: the best plan with the same rungs, given the cost of every token."""
    mean_ranks: Sequence[float] = ()
    """Shares of the full rank at which `svd` and `ladder` run; by default the mean ranks of the plans."""
    peft: Mapping[str, str | Path] = field(default_factory=dict)
    """Other PEFT adapters by name: folders, or names on the hub."""
    configs: Mapping[str, ChunkWiseConfig] = field(default_factory=dict)
    """Further settings of ChunkWise by name. Settings that read what calibration learned run on the first calibrated
    ladder, others on the ladder in the adapter's folder, or else on its plain SVD."""

    def __post_init__(self) -> None:
        if unknown := set(self.baselines) - set(BASELINES):
            raise ChunkWiseError(f"baseline {min(unknown)!r} is unknown; choose from {', '.join(BASELINES)}")


class Comparison:
    """Makes the methods that are compared, for one base model and one adapter.

    Args:
        base: The base model, on one device.
        adapter: The PEFT adapter: a folder, or a name on the hub. If the folder holds a ladder, presets run on it.
        calibrated: Calibrated ladders with their policies, by the name that results show.

    Raises:
        ConfigError: A calibrated ladder has no policy.
        EngineError: The base model is spread over devices.
    """

    def __init__(
        self, base: PreTrainedModel, adapter: str | Path, calibrated: Mapping[str, RankLadder] | None = None
    ) -> None:
        only_device_of(base)  # its copies would not be
        self.base = base
        self.adapter = adapter
        self.calibrated = {name: f"calibrated {number}" for number, name in enumerate(calibrated or {})}
        """By the name that results show: the name of the ladder in the model."""
        ladders = {PLAIN: on_every_rank(RankLadder.from_peft(adapter))}
        if is_ladder(adapter):
            ladders[OWN] = RankLadder.from_pretrained(adapter)
        for name, ladder in (calibrated or {}).items():
            if ladder.policy is None:
                raise ConfigError(f"the ladder {name!r} has no policy; run `chunkwise calibrate` for it")
            ladders[self.calibrated[name]] = ladder
        self.uncalibrated = OWN if OWN in ladders else PLAIN
        self.chunkwise = ChunkWiseModel(copy.deepcopy(base), ladders)

    @property
    def full_rank(self) -> float:
        """The adapter's rank."""
        return self.chunkwise.ladders[PLAIN].rung_ranks[-1]

    def methods(self, selection: MethodSelection, sample: Tensor) -> list[Method]:
        """The selected methods: base and full rank, other adapters, baselines, and ChunkWise.

        Args:
            selection: What to compare.
            sample: (windows, tokens) token ids of a part of the text. The mean ranks that plans give it decide at which
                ranks baselines run, unless `selection` names them.

        Raises:
            ChunkWiseError: A method needs a calibrated ladder and there is none, or an adapter cannot be loaded.
        """
        wanted = selection.baselines
        found: list[Method] = []
        if "base" in wanted:
            found.append(PlainMethod(Label("base, no adapter", "base", "base"), self.base, 0.0))
        found.append(self._peft(FULL, self.adapter, "full"))
        found += [self._peft(name, path, "baseline") for name, path in selection.peft.items()]
        plans = self._plans(selection)
        ranks = [share * self.full_rank for share in selection.mean_ranks]
        ranks = ranks or sorted(self._mean_rank(plan, sample) for plan in plans)
        if "svd" in wanted:
            whole = ranks if selection.mean_ranks else [math.ceil(rank - 0.01) for rank in ranks]
            found += self._uniform(PLAIN, PLAIN, whole, "baseline")
        if "ladder" in wanted and OWN in self.chunkwise.ladders and not self.calibrated:
            found += self._uniform(OWN, OWN, ranks, "baseline")
        for name, ladder in self.calibrated.items():
            if "ladder" in wanted:
                found += self._uniform(f"{name} rungs", ladder, ranks, "ours")
            plan = _CalibratedPlan(self.chunkwise, ladder, name)
            found += [plan.at_its_mean_rank()] if "alike" in wanted else []
            found += [plan.shuffled()] if "random" in wanted else []
            found += [plan.oracle()] if "oracle" in wanted else []
        return [*found, *plans]

    def expectations(self) -> dict[str, Expectation]:
        """By name of the method, what calibration expects of the calibrated policies."""
        ladders = {name: self.chunkwise.ladders[ladder] for name, ladder in self.calibrated.items()}
        return {
            f"ChunkWise {name}": ladder.expectation
            for name, ladder in ladders.items()
            if ladder.expectation is not None
        }

    def _plans(self, selection: MethodSelection) -> list[PlannedMethod]:
        """The selected settings of ChunkWise."""
        found = []
        for preset in selection.presets:
            if preset != CALIBRATED:
                found.append(self._planned(preset, self.uncalibrated, ChunkWiseConfig.preset(preset)))
                continue
            if not self.calibrated:
                raise ChunkWiseError(
                    "the preset `calibrated` needs a ladder that `chunkwise calibrate` wrote; give --calibrated"
                )
            for name, ladder in self.calibrated.items():
                calibrated = self.chunkwise.ladders[ladder]
                assert calibrated.policy is not None
                asked = None if calibrated.expectation is None else calibrated.expectation.asked_rank
                found.append(self._planned(name, ladder, calibrated.policy, PLANS, asked))
        for name, config in selection.configs.items():
            if config.complexity.learned and not self.calibrated:
                raise ChunkWiseError(f"the settings {name!r} read what calibration learned; give --calibrated")
            learned = next(iter(self.calibrated.values())) if config.complexity.learned else self.uncalibrated
            found.append(self._planned(name, learned, config))
        return found

    def _planned(
        self, name: str, ladder: str, config: ChunkWiseConfig, series: str = "", asked: float | None = None
    ) -> PlannedMethod:
        shown = f"ChunkWise {name}"
        return PlannedMethod(Label(shown, series or shown, "ours", asked), self.chunkwise, ladder, config)

    def _peft(self, name: str, path: str | Path, role: Role) -> PlainMethod:
        """An adapter in unmerged PEFT."""
        from peft import PeftModel

        refuse_backtracking(path)
        try:
            model = PeftModel.from_pretrained(copy.deepcopy(self.base), path, autocast_adapter_dtype=False).eval()
        except (OSError, ValueError, RuntimeError) as error:
            raise ChunkWiseError(f"{path}: cannot be loaded as a PEFT adapter ({first_line(error)})") from None
        return PlainMethod(Label(name, name, role), model.to(self.base.dtype), _mean_rank(model))

    def _uniform(self, series: str, ladder: str, ranks: Sequence[float], role: Role) -> list[PlannedMethod]:
        """Every token on the rung that is nearest to a rank, for each of `ranks`."""
        rungs = self.chunkwise.ladders[ladder].rung_ranks
        found: dict[str, PlannedMethod] = {}
        for rank in ranks:
            reached = min(rungs, key=lambda one: abs(one - rank))
            label = Label(f"{series} at {reached:.3g}", series, role, rank)
            config = ChunkWiseConfig.uniform(reached / rungs[-1])
            found.setdefault(label.name, PlannedMethod(label, self.chunkwise, ladder, config))
        return list(found.values())

    def _mean_rank(self, plan: PlannedMethod, sample: Tensor) -> float:
        """The mean rank that a plan gives a text."""
        if plan.rank is not None:
            return plan.rank
        return float(log_probabilities_in_one_pass(self.chunkwise, sample, plan.config, plan.ladder).ranks.mean())


def on_every_rank(ladder: RankLadder) -> RankLadder:
    """The ladder with a rung for every rank."""
    highest = max(module.rank for module in ladder.modules.values())
    return ladder.with_ranks(
        {
            name: [round(rank * module.rank / highest) for rank in range(highest + 1)]
            for name, module in ladder.modules.items()
        }
    )


class _CalibratedPlan:
    """Makes the baselines that change the plan of a calibrated policy and keep its rungs and its scale."""

    def __init__(self, chunkwise: ChunkWiseModel, name: str, shown: str) -> None:
        self.chunkwise = chunkwise
        self.name, self.shown = name, shown
        ladder = chunkwise.ladders[name]
        assert ladder.policy is not None
        self.policy = ladder.policy
        self.ranks = np.array(ladder.rung_ranks)
        self.scale = float(np.mean(self.policy.selection.scales))

    def at_its_mean_rank(self) -> ReplannedMethod:
        """Every token on one of the two rungs around the plan's mean rank, at random: the same mean rank, no choice."""
        ranks = self.ranks

        def rungs_for(tokens: Tensor, plan: np.ndarray) -> np.ndarray:
            generator = _random_for(tokens)
            mean = ranks[plan].mean()
            above = min(int(np.searchsorted(ranks, mean)), len(ranks) - 1)
            below = max(above - 1, 0)
            share = (mean - ranks[below]) / max(ranks[above] - ranks[below], 1e-9)
            return np.where(generator.permuted(np.linspace(0, 1, plan.size)).reshape(plan.shape) < share, above, below)

        return self._method("alike", rungs_for)

    def shuffled(self) -> ReplannedMethod:
        """The rungs of the plan, shuffled over the tokens."""
        return self._method(
            "random", lambda tokens, plan: _random_for(tokens).permuted(plan.ravel()).reshape(plan.shape)
        )

    def oracle(self) -> ReplannedMethod:
        """The cheapest plan with the same rungs and mean rank, given every token's cost on every rung."""

        def rungs_for(tokens: Tensor, plan: np.ndarray) -> np.ndarray:
            tried = np.unique(np.append(plan, len(self.ranks) - 1))
            by_rung = np.empty((*plan.shape, len(tried)))
            for row in range(len(tokens)):
                window = tokens[row : row + 1]
                full = log_probabilities(self.chunkwise, window, None, PLAIN)
                for number, rung in enumerate(tried):
                    log_p = log_probabilities(self.chunkwise, window, int(rung), self.name, self.scale)
                    by_rung[row, :, number] = kl_divergence(full, log_p)[0].cpu()
            return tried[cheapest(by_rung, self.ranks[tried], float(self.ranks[plan].mean()))]

        return self._method("oracle", rungs_for)

    def _method(self, kind: str, rungs_for: Callable[[Tensor, np.ndarray], np.ndarray]) -> ReplannedMethod:
        """A method that runs on rungs (windows, tokens) that `rungs_for` makes from the token ids and the plan."""
        name = f"{self.shown} {kind}"
        return ReplannedMethod(
            Label(name, name, "baseline"),
            self.chunkwise,
            self.name,
            lambda tokens: rungs_for(tokens, self._rungs(tokens)),
            self.scale,
        )

    def _rungs(self, tokens: Tensor) -> np.ndarray:
        """(windows, tokens) the rung that the policy gives each token when entropies are unknown."""
        rows = [
            log_probabilities_in_one_pass(self.chunkwise, tokens[row : row + 1], self.policy, self.name).ranks
            for row in range(len(tokens))
        ]
        return np.abs(np.concatenate(rows)[..., None] - self.ranks).argmin(-1)


def _random_for(tokens: Tensor) -> np.random.Generator:
    """A generator that gives the same text (windows, tokens) the same numbers, in whatever order batches run."""
    return np.random.default_rng(tokens.flatten().tolist())


def cheapest(costs: np.ndarray, ranks: np.ndarray, mean_rank: float) -> np.ndarray:
    """Choose a rank for every token, with the least total cost and a mean rank of at most `mean_rank`.

    Args:
        costs: (..., choices) cost of every token at every choice, in nats.
        ranks: (choices,) rank of every choice.
        mean_rank: The budget.

    Returns:
        (...,) indices of the choices.
    """

    def chosen(multiplier: float) -> np.ndarray:
        return np.asarray((costs + multiplier * ranks).argmin(-1))

    return chosen(multiplier_for(lambda multiplier: float(ranks[chosen(multiplier)].mean()), mean_rank))


def _mean_rank(model: Any) -> float:
    """Mean rank of a PEFT adapter's modules, weighted by in + out features, without pruned directions."""
    spent = cost = 0.0
    for module in model.modules():
        factors = getattr(module, "lora_A", None)
        if not factors or "default" not in factors:
            continue
        a, b = factors["default"], module.lora_B["default"]
        a, b = getattr(a, "weight", a), getattr(b, "weight", b)
        active = a.shape[0]
        if hasattr(module, "lora_E"):  # AdaLoRA prunes a direction by setting its singular value to 0
            active = int((module.lora_E["default"] != 0).sum())
        spent += active * (a.shape[1] + b.shape[0])
        cost += a.shape[1] + b.shape[0]
    return spent / cost if cost else 0.0
