"""The ways to run one adapter that an evaluation sets side by side."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from chunkwise_lora.calibration.log_probabilities import (
    kl_divergence,
    log_probabilities,
    log_probabilities_in_one_pass,
    log_probabilities_token_by_token,
)
from chunkwise_lora.calibration.rung_policy import multiplier_for
from chunkwise_lora.engines.transformers.model import ChunkWiseModel
from chunkwise_lora.errors import ChunkWiseError, first_line
from chunkwise_lora.ladder import RankLadder, is_ladder
from chunkwise_lora.method.config import ChunkWiseConfig

PLAIN, OWN, CALIBRATED = "plain SVD", "own rungs", "calibrated"
"""Names of the ladders: the adapter's SVD, the one that lies in its folder, and the calibrated one."""
FULL = "PEFT, full rank"
TIERS = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
"""Shares of the full rank at which uniform truncation is measured."""
RIVALS = ("base", "svd", "ladder", "random", "oracle")


@dataclass(frozen=True)
class Scored:
    """What a contender did with windows of text."""

    log_p: Tensor
    """(windows, tokens, vocabulary)"""
    mean_rank: float
    kv_share: float = 1.0
    """Bytes of its KV cache over those of full precision."""
    ranks: np.ndarray | None = None
    """(windows, tokens) where it chose token by token."""


@dataclass(frozen=True)
class Generated:
    """What a contender wrote."""

    ids: Tensor
    """(batch, tokens) prompts and answers."""
    ranks: list[float]
    """The mean rank of each sequence, where the contender tells."""
    kv_share: float = 1.0
    """Bytes of its KV cache at the end over those of full precision."""


@dataclass(frozen=True)
class Contender:
    """One way to run the adapter."""

    name: str
    model: PreTrainedModel | ChunkWiseModel
    """As far as `generate` goes."""
    options: dict[str, Any] | None
    """For its `generate`; None where it can only score text."""
    score: Callable[[Tensor], Scored]
    """Takes windows (windows, tokens)."""
    mean_rank: float | None = None
    """Where it is the same for all text."""

    @torch.no_grad()
    def generate(self, inputs: Mapping[str, Any], **options: Any) -> Generated:
        """Go on greedily from `inputs`, what a tokenizer gives for a batch; `options` are transformers' own."""
        assert self.options is not None
        options = {"do_sample": False, **options, **self.options}
        if isinstance(self.model, ChunkWiseModel):
            ids = self.model.generate(**inputs, **options)
            trace = self.model.trace
            assert trace is not None
            ranks = [sequence.mean_rank for sequence in trace.sequences]
            return Generated(ids, ranks, trace.kv_bytes / max(trace.kv_bytes_full, 1))
        cache = DynamicCache(config=self.model.config.get_text_config())
        return Generated(self.model.generate(**inputs, past_key_values=cache, **options), [])


class Field:
    """All contenders over one base model and one adapter.

    Args:
        base: The base model.
        adapter: The PEFT adapter, a folder or a name on the hub. If a ladder lies in the same folder, that is ours.
        calibrated: The calibrated ladder and its config, if there is one.
    """

    def __init__(
        self, base: PreTrainedModel, adapter: str | Path, calibrated: tuple[RankLadder, ChunkWiseConfig] | None = None
    ) -> None:
        self.base = base
        self.adapter = adapter
        ladders = {PLAIN: RankLadder.from_peft(adapter)}
        if is_ladder(adapter):
            ladders[OWN] = RankLadder.from_pretrained(adapter)
        self.ours = OWN if OWN in ladders else PLAIN
        self.presets: dict[str, tuple[str, ChunkWiseConfig]] = {}
        if calibrated:
            ladders[CALIBRATED], config = calibrated
            self.presets[CALIBRATED] = (CALIBRATED, config)
        self.chunkwise = ChunkWiseModel(copy.deepcopy(base), ladders)

    def contenders(
        self,
        presets: Sequence[str],
        rivals: Sequence[str],
        peft: Mapping[str, str | Path],
        configs: Mapping[str, ChunkWiseConfig] | None = None,
    ) -> list[Contender]:
        """Base and full rank first, then other PEFT adapters by name, rivals, and ours, `configs` by name among them.

        A config that needs what calibration learned runs on the calibrated ladder, others on the adapter's own, or else
        its plain SVD.
        """
        if unknown := set(rivals) - set(RIVALS):
            raise ChunkWiseError(f"rival {min(unknown)!r} is unknown; choose from {', '.join(RIVALS)}")
        if CALIBRATED in presets and CALIBRATED not in self.presets:
            raise ChunkWiseError("the calibrated preset needs a calibrated ladder; run `chunkwise calibrate` first")
        chosen = {name: self.presets.get(name) or (self.ours, ChunkWiseConfig.preset(name)) for name in presets}
        for name, config in (configs or {}).items():
            chosen[name] = (CALIBRATED if config.complexity.learned else self.ours, config)
        found = [self._plain("base, no adapter", self.base, 0.0)] if "base" in rivals else []
        found += [self._peft(name, path) for name, path in {FULL: self.adapter, **peft}.items()]
        for rival, ladder in (("svd", PLAIN), ("ladder", OWN), ("ladder", CALIBRATED)):
            if rival in rivals and ladder in self.chunkwise.ladders:
                found += [self._uniform(ladder, share) for share in TIERS]
        if CALIBRATED in self.presets:
            found += [self._alike()] if "ladder" in rivals else []
            found += [self._random()] if "random" in rivals else []
            found += [self._oracle()] if "oracle" in rivals else []
        return found + [self._planned(f"ChunkWise {name}", *one) for name, one in chosen.items()]

    def _plain(self, name: str, model: PreTrainedModel, rank: float) -> Contender:
        @torch.no_grad()
        def score(tokens: Tensor) -> Scored:
            return Scored(model(input_ids=tokens, use_cache=False).logits.float().log_softmax(-1), rank)

        return Contender(name, model, {}, score, rank)

    def _peft(self, name: str, path: str | Path) -> Contender:
        from peft import PeftModel

        try:
            model = PeftModel.from_pretrained(copy.deepcopy(self.base), path, autocast_adapter_dtype=False).eval()
        except (OSError, ValueError, RuntimeError) as error:
            raise ChunkWiseError(f"{path}: cannot be loaded as a PEFT adapter ({first_line(error)})") from None
        return self._plain(name, model.to(self.base.dtype), _mean_rank(model))

    def _uniform(self, ladder: str, share: float) -> Contender:
        ranks = self.chunkwise.ladders[ladder].rung_ranks
        rung = min(range(len(ranks)), key=lambda rung: abs(ranks[rung] - share * ranks[-1]))
        what = "calibrated rungs" if ladder == CALIBRATED else ladder
        return Contender(
            f"{what}, every token at {share:.3g}",
            self.chunkwise,
            {"adapter_names": ladder, "chunkwise_config": ChunkWiseConfig.uniform(share)},
            lambda tokens: Scored(log_probabilities(self.chunkwise, tokens, rung, ladder), ranks[rung]),
        )

    def _planned(self, name: str, ladder: str, config: ChunkWiseConfig) -> Contender:
        def score(tokens: Tensor) -> Scored:
            done = log_probabilities_token_by_token(self.chunkwise, tokens, config, ladder)
            return Scored(done.log_p, float(done.ranks.mean()), done.kv_share, done.ranks)

        return Contender(name, self.chunkwise, {"adapter_names": ladder, "chunkwise_config": config}, score)

    def _rungs_of_plan(self, tokens: Tensor) -> np.ndarray:
        """(windows, tokens) the rung that the calibrated policy gives each token, entropies unknown."""
        _, config = self.presets[CALIBRATED]
        ranks = log_probabilities_in_one_pass(self.chunkwise, tokens, config, CALIBRATED).ranks
        of_rungs = np.array(self.chunkwise.ladders[CALIBRATED].rung_ranks)
        return np.abs(ranks[..., None] - of_rungs).argmin(-1)

    def _imposed(self, name: str, rungs_for: Callable[[Tensor, np.ndarray], np.ndarray]) -> Contender:
        """Rungs of the calibrated ladder that `rungs_for` chooses, knowing the calibrated plan, at its scale."""
        scale = self._scale()
        ranks = np.array(self.chunkwise.ladders[CALIBRATED].rung_ranks)

        def score(tokens: Tensor) -> Scored:
            rungs = rungs_for(tokens, self._rungs_of_plan(tokens))
            log_p = log_probabilities(self.chunkwise, tokens, rungs, CALIBRATED, scale)
            return Scored(log_p, float(ranks[rungs].mean()), ranks=ranks[rungs])

        return Contender(name, self.chunkwise, None, score)

    def _scale(self) -> float:
        """What the calibrated policy scales the adapter by, on average over its levels."""
        return float(np.mean(self.presets[CALIBRATED][1].selection.scales))

    def _alike(self) -> Contender:
        """Every token at one of the two rungs around the plan's mean rank, at random: no choice, the same cost."""
        ranks = np.array(self.chunkwise.ladders[CALIBRATED].rung_ranks)
        generator = np.random.default_rng(0)

        def rungs_for(tokens: Tensor, plan: np.ndarray) -> np.ndarray:
            mean = ranks[plan].mean()
            above = min(int(np.searchsorted(ranks, mean)), len(ranks) - 1)
            below = max(above - 1, 0)
            share = (mean - ranks[below]) / max(ranks[above] - ranks[below], 1e-9)
            return np.where(generator.permuted(np.linspace(0, 1, plan.size)).reshape(plan.shape) < share, above, below)

        return self._imposed("calibrated rungs, the plan's mean rank", rungs_for)

    def _random(self) -> Contender:
        generator = np.random.default_rng(0)
        return self._imposed(
            "random plan, same rungs", lambda tokens, plan: generator.permuted(plan.ravel()).reshape(plan.shape)
        )

    def _oracle(self) -> Contender:
        scale = self._scale()
        ranks = np.array(self.chunkwise.ladders[CALIBRATED].rung_ranks)

        def rungs_for(tokens: Tensor, plan: np.ndarray) -> np.ndarray:
            full = log_probabilities(self.chunkwise, tokens, None, PLAIN)
            tried = np.unique(np.append(plan, len(ranks) - 1))
            costs = np.stack(
                [
                    kl_divergence(full, log_probabilities(self.chunkwise, tokens, int(r), CALIBRATED, scale)).numpy()
                    for r in tried
                ],
                axis=-1,
            )
            return tried[cheapest(costs, ranks[tried], float(ranks[plan].mean()))]

        return self._imposed("oracle plan, same rungs", rungs_for)


def cheapest(costs: np.ndarray, ranks: np.ndarray, mean_rank: float) -> np.ndarray:
    """(...,) the choice among (..., choices) of least total cost whose ranks are at most `mean_rank` on average."""

    def chosen(multiplier: float) -> np.ndarray:
        return np.asarray((costs + multiplier * ranks).argmin(-1))

    return chosen(multiplier_for(lambda multiplier: float(ranks[chosen(multiplier)].mean()), mean_rank))


def _mean_rank(model: Any) -> float:
    """Directions per module that an adapter really has, weighted by what one costs to read."""
    spent = cost = 0.0
    for module in model.modules():
        factors = getattr(module, "lora_A", None)
        if not factors or "default" not in factors:
            continue
        a, b = factors["default"], module.lora_B["default"]
        a, b = getattr(a, "weight", a), getattr(b, "weight", b)
        alive = a.shape[0]
        if hasattr(module, "lora_E"):  # AdaLoRA prunes a direction by setting its singular value to 0
            alive = int((module.lora_E["default"] != 0).sum())
        spent += alive * (a.shape[1] + b.shape[0])
        cost += a.shape[1] + b.shape[0]
    return spent / cost if cost else 0.0
