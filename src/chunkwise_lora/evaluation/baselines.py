"""ChunkWise and its baselines on one base model and one adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from chunkwise_lora.calibration.log_probabilities import (
    ChunkWiseModel,
    kl_divergence,
    log_probabilities,
    log_probabilities_in_one_pass,
    log_probabilities_token_by_token,
)
from chunkwise_lora.calibration.rung_policy import multiplier_for
from chunkwise_lora.errors import ChunkWiseError, ConfigError, first_line
from chunkwise_lora.evaluation.methods import FULL, Method, ScoredWindows
from chunkwise_lora.ladder import RankLadder, is_ladder
from chunkwise_lora.ladder.backtracking import refuse_backtracking
from chunkwise_lora.method.config import ChunkWiseConfig

PLAIN, OWN, CALIBRATED = "plain SVD", "own rungs", "calibrated"
"""Names of the ladders: the adapter's SVD, the ladder in the adapter's folder, and the calibrated ladder."""
TIERS = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
"""Shares of the full rank at which uniform truncation is measured."""
BASELINES = ("base", "svd", "ladder", "random", "oracle")
"""Names of the baselines that can be chosen."""


@dataclass(frozen=True)
class MethodSelection:
    """Which methods an evaluation compares."""

    presets: Sequence[str]
    """Presets of ChunkWise, and `calibrated`: the policy of the calibrated ladder."""
    baselines: Sequence[str] = ()
    """Some of `BASELINES`. base: no adapter. svd: plain SVD, every token on the same rung, at each of `TIERS`. ladder:
    the same for the ladder in the adapter's folder and for the calibrated one. random: the rungs of the calibrated
    plan, shuffled over the tokens. oracle: the best plan with the same rungs, given the cost of every token."""
    peft: Mapping[str, str | Path] = field(default_factory=dict)
    """Other PEFT adapters by name: folders, or names on the hub."""
    configs: Mapping[str, ChunkWiseConfig] = field(default_factory=dict)
    """Further settings of ChunkWise by name. Settings that read what calibration learned run on the calibrated ladder,
    others on the ladder in the adapter's folder, or else on its plain SVD."""

    def __post_init__(self) -> None:
        if unknown := set(self.baselines) - set(BASELINES):
            raise ChunkWiseError(f"baseline {min(unknown)!r} is unknown; choose from {', '.join(BASELINES)}")


class Comparison:
    """Makes the methods that are compared, for one base model and one adapter.

    Args:
        base: The base model.
        adapter: The PEFT adapter: a folder, or a name on the hub. If the folder holds a ladder, presets run on it.
        calibrated: The calibrated ladder with its policy, if there is one.

    Raises:
        ConfigError: The calibrated ladder has no policy.
    """

    def __init__(self, base: PreTrainedModel, adapter: str | Path, calibrated: RankLadder | None = None) -> None:
        self.base = base
        self.adapter = adapter
        ladders = {PLAIN: RankLadder.from_peft(adapter)}
        if is_ladder(adapter):
            ladders[OWN] = RankLadder.from_pretrained(adapter)
        if calibrated is not None:
            if calibrated.policy is None:
                raise ConfigError("the calibrated ladder has no policy; run `chunkwise calibrate` for it")
            ladders[CALIBRATED] = calibrated
        self.uncalibrated = OWN if OWN in ladders else PLAIN
        self.chunkwise = ChunkWiseModel(copy.deepcopy(base), ladders)

    def methods(self, selection: MethodSelection) -> list[Method]:
        """The selected methods: base and full rank, other adapters, baselines, and ChunkWise.

        Raises:
            ChunkWiseError: A method needs a calibrated ladder and there is none, or an adapter cannot be loaded.
        """
        chosen = {name: self._ladder_and_config(name) for name in selection.presets}
        for name, config in selection.configs.items():
            chosen[name] = (CALIBRATED if config.complexity.learned else self.uncalibrated, config)
        wanted, ladders = selection.baselines, self.chunkwise.ladders
        found = [self._plain("base, no adapter", self.base, 0.0)] if "base" in wanted else []
        found += [self._peft(name, path) for name, path in {FULL: self.adapter, **selection.peft}.items()]
        for baseline, ladder in (("svd", PLAIN), ("ladder", OWN), ("ladder", CALIBRATED)):
            if baseline in wanted and ladder in ladders:
                found += [self._uniform(ladder, share) for share in TIERS]
        if CALIBRATED in ladders:
            plan = _CalibratedPlan(self.chunkwise)
            found += [plan.at_its_mean_rank()] if "ladder" in wanted else []
            found += [plan.shuffled()] if "random" in wanted else []
            found += [plan.oracle()] if "oracle" in wanted else []
        return found + [self._planned(f"ChunkWise {name}", *one) for name, one in chosen.items()]

    def _ladder_and_config(self, preset: str) -> tuple[str, ChunkWiseConfig]:
        """The ladder and the settings of a preset."""
        if preset != CALIBRATED:
            return self.uncalibrated, ChunkWiseConfig.preset(preset)
        ladder = self.chunkwise.ladders.get(CALIBRATED)
        if ladder is None or ladder.policy is None:
            raise ChunkWiseError(
                "the preset `calibrated` needs a calibrated ladder; run `chunkwise calibrate` and give its folder with "
                "--calibrated"
            )
        return CALIBRATED, ladder.policy

    def _plain(self, name: str, model: PreTrainedModel, rank: float) -> Method:
        """A model that runs as transformers or PEFT runs it."""

        @torch.no_grad()
        def score(tokens: Tensor) -> ScoredWindows:
            return ScoredWindows(model(input_ids=tokens, use_cache=False).logits.float().log_softmax(-1), rank)

        return Method(name, model, {}, score, rank)

    def _peft(self, name: str, path: str | Path) -> Method:
        """An adapter in unmerged PEFT."""
        from peft import PeftModel

        refuse_backtracking(path)
        try:
            model = PeftModel.from_pretrained(copy.deepcopy(self.base), path, autocast_adapter_dtype=False).eval()
        except (OSError, ValueError, RuntimeError) as error:
            raise ChunkWiseError(f"{path}: cannot be loaded as a PEFT adapter ({first_line(error)})") from None
        return self._plain(name, model.to(self.base.dtype), _mean_rank(model))

    def _uniform(self, ladder: str, share: float) -> Method:
        """Every token on the rung that is nearest to a share of the full rank."""
        ranks = self.chunkwise.ladders[ladder].rung_ranks
        rung = min(range(len(ranks)), key=lambda rung: abs(ranks[rung] - share * ranks[-1]))
        shown = "calibrated rungs" if ladder == CALIBRATED else ladder
        return Method(
            f"{shown}, every token at {share:.3g}",
            self.chunkwise,
            {"adapter_names": ladder, "chunkwise_config": ChunkWiseConfig.uniform(share)},
            lambda tokens: ScoredWindows(log_probabilities(self.chunkwise, tokens, rung, ladder), ranks[rung]),
        )

    def _planned(self, name: str, ladder: str, config: ChunkWiseConfig) -> Method:
        """ChunkWise, token by token."""

        def score(tokens: Tensor) -> ScoredWindows:
            done = log_probabilities_token_by_token(self.chunkwise, tokens, config, ladder)
            return ScoredWindows(done.log_p, float(done.ranks.mean()), done.kv_share, done.ranks)

        return Method(name, self.chunkwise, {"adapter_names": ladder, "chunkwise_config": config}, score)


class _CalibratedPlan:
    """Makes the baselines that change the plan of the calibrated policy and keep its rungs and its scale."""

    def __init__(self, chunkwise: ChunkWiseModel) -> None:
        self.chunkwise = chunkwise
        ladder = chunkwise.ladders[CALIBRATED]
        assert ladder.policy is not None
        self.policy = ladder.policy
        self.ranks = np.array(ladder.rung_ranks)
        self.scale = float(np.mean(self.policy.selection.scales))

    def at_its_mean_rank(self) -> Method:
        """Every token on one of the two rungs around the plan's mean rank, at random: the same mean rank, no choice."""
        ranks, generator = self.ranks, np.random.default_rng(0)

        def rungs_for(tokens: Tensor, plan: np.ndarray) -> np.ndarray:
            mean = ranks[plan].mean()
            above = min(int(np.searchsorted(ranks, mean)), len(ranks) - 1)
            below = max(above - 1, 0)
            share = (mean - ranks[below]) / max(ranks[above] - ranks[below], 1e-9)
            return np.where(generator.permuted(np.linspace(0, 1, plan.size)).reshape(plan.shape) < share, above, below)

        return self._method("calibrated rungs, the plan's mean rank", rungs_for)

    def shuffled(self) -> Method:
        """The rungs of the plan, shuffled over the tokens."""
        generator = np.random.default_rng(0)
        return self._method(
            "random plan, same rungs", lambda tokens, plan: generator.permuted(plan.ravel()).reshape(plan.shape)
        )

    def oracle(self) -> Method:
        """The cheapest plan with the same rungs and mean rank, given every token's cost on every rung."""

        def rungs_for(tokens: Tensor, plan: np.ndarray) -> np.ndarray:
            full = log_probabilities(self.chunkwise, tokens, None, PLAIN)
            tried = np.unique(np.append(plan, len(self.ranks) - 1))
            costs = [
                kl_divergence(full, log_probabilities(self.chunkwise, tokens, int(rung), CALIBRATED, self.scale))
                for rung in tried
            ]
            by_rung = np.stack([cost.numpy() for cost in costs], axis=-1)
            return tried[cheapest(by_rung, self.ranks[tried], float(self.ranks[plan].mean()))]

        return self._method("oracle plan, same rungs", rungs_for)

    def _method(self, name: str, rungs_for: Callable[[Tensor, np.ndarray], np.ndarray]) -> Method:
        """A method that runs on rungs (windows, tokens) that `rungs_for` makes from the token ids and the plan."""

        def score(tokens: Tensor) -> ScoredWindows:
            rungs = rungs_for(tokens, self._rungs(tokens))
            log_p = log_probabilities(self.chunkwise, tokens, rungs, CALIBRATED, self.scale)
            return ScoredWindows(log_p, float(self.ranks[rungs].mean()), ranks=self.ranks[rungs])

        return Method(name, self.chunkwise, None, score)

    def _rungs(self, tokens: Tensor) -> np.ndarray:
        """(windows, tokens) the rung that the policy gives each token when entropies are unknown."""
        done = log_probabilities_in_one_pass(self.chunkwise, tokens, self.policy, CALIBRATED)
        return np.abs(done.ranks[..., None] - self.ranks).argmin(-1)


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
