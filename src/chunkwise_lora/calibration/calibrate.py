"""Calibration: from an adapter, a text and a budget to a ladder and its policy.

`calibrate` reads as the steps of the procedure; docs/quality.md describes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from transformers import PreTrainedModel

from chunkwise_lora.calibration.basis import Basis, factors_of, rotate_basis, with_factors
from chunkwise_lora.calibration.check import Check, check_policy
from chunkwise_lora.calibration.config import DISTILLATION_TOKENS, ROTATION_TOKENS, CalibrationConfig
from chunkwise_lora.calibration.descent import RungTraining
from chunkwise_lora.calibration.distillation import distil
from chunkwise_lora.calibration.estimate import factor_for, measured_speed, planned_work
from chunkwise_lora.calibration.fisher import sensitivities
from chunkwise_lora.calibration.fitted_ladder import ROUNDING, FittedLadder, fit_ladder
from chunkwise_lora.calibration.log_probabilities import ChunkWiseModel
from chunkwise_lora.calibration.moments import second_moments
from chunkwise_lora.calibration.run import GIVEN, CalibrationRun
from chunkwise_lora.calibration.rung_divergence import rung_divergence
from chunkwise_lora.calibration.rung_sampler import RandomRungs, RungSampler
from chunkwise_lora.calibration.search import (
    TokenChoice,
    choose_chunks_and_scale,
    choose_int8,
    choose_tokens,
    share_for_loss_budget,
)
from chunkwise_lora.calibration.self_generated import generate_text
from chunkwise_lora.calibration.text import CalibrationText, TokenBlocks, block_length
from chunkwise_lora.calibration.unfinished import Unfinished, Values, fingerprint
from chunkwise_lora.calibration.work import Progress, Report
from chunkwise_lora.engines.transformers.fitting import only_device_of
from chunkwise_lora.errors import ChunkWiseError
from chunkwise_lora.ladder import RankLadder
from chunkwise_lora.method.config import ChunkWiseConfig


@dataclass(frozen=True)
class Calibration:
    """A calibrated ladder, its policy, and what to expect of them."""

    ladder: RankLadder
    """Holds the policy, what the estimator learned, and the divergence of every rung."""
    check: Check
    choice: TokenChoice
    """Whether it pays to give each token its own rung."""
    explained: dict[str, float]
    """For each combination of signals, the share of the deviance of tokens' costs that it explains on held-back
    text."""
    searched: dict[str, float]
    """The cost of each chunk length and scale that was tried, in nats per token: the loss plus the Lagrange multiplier
    times the mean rank."""

    @property
    def policy(self) -> ChunkWiseConfig:
        """The policy of the ladder."""
        assert self.ladder.policy is not None
        return self.ladder.policy


def calibrate(  # noqa: PLR0913 - each parameter is a choice of the user
    model: PreTrainedModel,
    ladder: RankLadder,
    tokens: Sequence[int],
    config: CalibrationConfig,
    report: Report = lambda stage, done, total: None,
    scored: Sequence[bool] | None = None,
    held_tokens: Sequence[int] | None = None,
    held_scored: Sequence[bool] | None = None,
    unfinished: Unfinished | None = None,
) -> Calibration:
    """Fit a ladder and its policy to a text and a budget.

    The held-back text is `held_tokens`, or else the last `config.held_share` of the text. Its first half is for
    choosing settings, its second half for the check alone.

    Args:
        model: The base model, on one device. The same seed gives the same ladder on every device, up to rounding.
        ladder: The adapter as a ladder.
        tokens: (n,) token ids of the text, cut into blocks of `config.block` tokens.
        config: Budget and settings.
        report: Shows the progress; it is called first when the work has been estimated.
        scored: (n,) whether the prediction after each token is scored, as in answers but not in their prompts; by
            default all predictions are.
        held_tokens: (m,) token ids of a text to hold back.
        held_scored: (m,) as `scored`, for `held_tokens`.
        unfinished: Keeps finished stages. A call with the same arguments goes on from them, and gives the same result.
            Remove it when the result is saved.

    Raises:
        ChunkWiseError: The mean rank is below the lowest rung, the text or the held text is too short, `scored` is
            combined with `config.self_generated_tokens`, or the model is spread over devices.
    """
    _refuse(model, ladder, config, scored)
    length, progress, kept = block_length(model, config.block), Progress(report), unfinished or Unfinished()
    blocks = TokenBlocks.cut(tokens, length, scored)
    held = None if held_tokens is None else TokenBlocks.cut(held_tokens, length, held_scored)

    def scaled(factor: float) -> CalibrationRun:
        settings = config.scaled(factor)
        text = CalibrationText.split(blocks, held, settings)
        return CalibrationRun(model, ladder, text, settings, progress, kept)

    run = scaled(1)
    texts = [tensor for part in (blocks, held) if part is not None for tensor in (part.tokens, part.scored)]
    kept.bind(fingerprint(model, ladder, config.model_dump(mode="json"), *texts), progress)
    speed = measured_speed(run)
    if config.minutes is not None:
        limit = 60 * config.minutes
        factor = kept.stage("amount of work", lambda: {"factor": factor_for(limit, speed, scaled)})["factor"]
        run = scaled(factor)
    progress.expect(planned_work(run), speed)
    with progress.counting(model):
        return _calibrated(run)


def _calibrated(run: CalibrationRun) -> Calibration:
    """The steps of `calibrate`."""
    config, text, ladder = run.config, run.text, run.given
    learns = bool(config.distillations) or not config.keep_directions
    training_text = _training_text(run) if learns else text.learning
    if config.keep_directions:
        fitted = fit_ladder(run, ladder)
    else:
        basis = _kept(run, "directions", lambda: _initial_basis(run, training_text))
        basis = _rotated(run, basis, training_text, RandomRungs(*config.sampled_rungs(range(config.rungs + 1))))
        fitted = fit_ladder(run, basis.on_rungs(config.rungs))
        for _ in range(config.rounds if config.refinements else 0):
            basis = _rotated(run, basis, training_text, fitted.sampler(run, _budget_share(run, fitted)))
            fitted = fit_ladder(run, basis.on_rungs(config.rungs))
    if config.distillations:
        fitted = fit_ladder(run, _distilled(run, fitted, training_text))
    fitted = replace(fitted, ladder=fitted.ladder.to(getattr(torch, config.dtype)))

    share = _budget_share(run, fitted)
    with run.attach(fitted.ladder) as chunkwise:
        policy, choice, searched = _policy(run, chunkwise, fitted, share)
        divergence = _divergence(run, chunkwise)
        check = check_policy(run, chunkwise, policy)
    expectation = check.expectation(config.mean_rank, fitted.ladder.rung_ranks[-1])
    learned = fitted.ladder.learned if policy.complexity.learned else None
    ladder = replace(fitted.ladder, policy=policy, learned=learned, rung_divergence=divergence, expectation=expectation)
    return Calibration(ladder, check, choice, fitted.estimator.explained, searched)


def _refuse(
    model: PreTrainedModel,
    ladder: RankLadder,
    config: CalibrationConfig,
    scored: Sequence[bool] | None,
) -> None:
    """Refuse combinations that calibration does not support."""
    ranks = ladder.rung_ranks if config.keep_directions else range(config.rungs + 1)
    lowest = ranks[config.lowest_rung(ranks)] / ranks[-1]
    if config.mean_rank is not None and config.mean_rank * (1 + ROUNDING) < lowest:
        raise ChunkWiseError(
            f"a mean rank of {config.mean_rank:.2%} is below the lowest rung that may be used, {lowest:.2%}; ask for "
            "that much, or use more rungs"
        )
    only_device_of(model)
    if config.self_generated_tokens and scored is not None:
        raise ChunkWiseError(
            "self-generated text continues plain text, but here only some tokens are scored; leave "
            "self_generated_tokens at 0"
        )


def _training_text(run: CalibrationRun) -> TokenBlocks:
    """The text that the basis and distillation learn from: the learning text and self-generated text, shuffled."""
    learning, seed = run.text.learning, run.config.seed
    sequences = run.config.self_generated_tokens // learning.length
    if not sequences:
        return learning
    with ChunkWiseModel(run.base, run.given) as chunkwise:
        run.progress.begin("generating text")
        generated = run.unfinished.stage(
            "text", lambda: {"tokens": generate_text(chunkwise, learning.tokens, sequences, seed=seed)}
        )["tokens"]
    order = torch.randperm(len(learning) + sequences, generator=torch.Generator().manual_seed(seed))
    return (learning + TokenBlocks.all_scored(generated))[order]


def _initial_basis(run: CalibrationRun, text: TokenBlocks) -> Basis:
    """The basis that truncates best to second order (K-FAC), and the Fisher information of its gates."""
    ladder, seed = run.given, run.config.seed
    blocks = text.evenly(max(1, run.config.gathered_tokens // text.length))
    with ChunkWiseModel(run.base, ladder) as chunkwise:
        moments = second_moments(chunkwise, (batch.tokens for batch in run.batches(blocks, "inputs of the adapter")))
        outputs = sensitivities(chunkwise, run.batches(blocks, "sensitivity of the output"), seed=seed)
    ladder = ladder.data_aware(moments, {name: one.outputs for name, one in outputs.items()})
    with ChunkWiseModel(run.base, ladder) as chunkwise:
        gates = sensitivities(chunkwise, run.batches(blocks, "Fisher information"), seed=seed + 1)
    importance = {name: torch.zeros(module.rank) for name, module in ladder.modules.items()}
    return Basis(ladder, importance | {name: one.gates / 2 for name, one in gates.items()})


def _rotated(run: CalibrationRun, basis: Basis, text: TokenBlocks, sampler: RungSampler) -> Basis:
    """The basis rotated for the sampled rungs, for `config.refinements` steps."""
    steps, seed = run.config.refinements, run.config.seed
    if not steps:
        return basis
    training = RungTraining(text.random_batches(steps, ROTATION_TOKENS, seed), steps, sampler, seed, run.unfinished)

    def rotated() -> Basis:
        run.progress.begin("rotating the basis")
        with ChunkWiseModel(run.base, basis.ladder) as chunkwise:
            return rotate_basis(chunkwise, basis, training, run.config.rungs)

    return _kept(run, "rotation", rotated)


def _kept(run: CalibrationRun, stage: str, make: Callable[[], Basis]) -> Basis:
    """A basis that is made once, even if calibration is interrupted afterwards."""
    return Basis.of_values(run.given, run.unfinished.stage(stage, lambda: make().values()))


def _distilled(run: CalibrationRun, fitted: FittedLadder, text: TokenBlocks) -> RankLadder:
    """The ladder distilled at the rungs of its policy, for `config.distillations` steps."""
    steps, seed = run.config.distillations, run.config.seed
    sampler = fitted.sampler(run, _budget_share(run, fitted))
    training = RungTraining(text.random_batches(steps, DISTILLATION_TOKENS, seed), steps, sampler, seed, run.unfinished)

    def distilled() -> Values:
        run.progress.begin("distilling")
        with ChunkWiseModel(run.base, fitted.ladder) as chunkwise:
            return factors_of(distil(chunkwise, training, run.config.distillation_rate))

    return with_factors(fitted.ladder, run.unfinished.stage("distillation", distilled))


def _budget_share(run: CalibrationRun, fitted: FittedLadder) -> float:
    """The mean rank that the budget allows, as a share of the full rank."""
    budget = run.config.max_loss_increase
    if budget is None:
        return run.config.mean_rank or 1.0
    found = run.unfinished.stage("mean rank", lambda: {"share": share_for_loss_budget(run, fitted, budget)})
    return float(found["share"])


def _policy(
    run: CalibrationRun, model: ChunkWiseModel, fitted: FittedLadder, share: float
) -> tuple[ChunkWiseConfig, TokenChoice, dict[str, float]]:
    """Choose the policy for a mean rank, which is given as a share of the full rank.

    Returns:
        The policy; whether choosing rungs for tokens pays; the cost of each setting that was tried.
    """

    def chosen() -> Values:
        planned = fitted.rung_policy(share)
        policy, choice = choose_tokens(run, model, fitted.config(planned), fitted.one_rung(share), planned.multiplier)
        policy, searched = choose_chunks_and_scale(run, model, policy, planned.multiplier)
        if run.config.int8:
            policy = choose_int8(run, model, policy)
        return {"policy": policy.model_dump_json(), "choice": asdict(choice), "searched": searched}

    found = run.unfinished.stage("policy", chosen)
    return ChunkWiseConfig.model_validate_json(found["policy"]), TokenChoice(**found["choice"]), found["searched"]


def _divergence(run: CalibrationRun, model: ChunkWiseModel) -> tuple[float, ...]:
    """The divergence of every rung of the ladder from the full rank of the given one."""
    held = run.text.choice.evenly(max(1, run.config.divergence_tokens // run.text.choice.length))

    def measured() -> Values:
        batches = run.batches(held, "divergence of every rung")
        return {"of rungs": rung_divergence(model, batches, GIVEN, same_full_rank=run.config.keeps_full_rank)}

    return tuple(run.unfinished.stage("divergence", measured)["of rungs"])
