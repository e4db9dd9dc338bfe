"""Calibration keeps its budget, predicts observed costs, and is deterministic."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from chunkwise_lora import ChunkWiseConfig, ChunkWiseError, ChunkWiseModel, ConfigError, LadderError, RankLadder
from chunkwise_lora.calibration import CalibrationConfig, cost_model, estimator, fitted_ladder, search
from chunkwise_lora.calibration import calibrate as procedure
from chunkwise_lora.calibration.basis import Basis, rotate_basis
from chunkwise_lora.calibration.calibrate import Calibration, calibrate
from chunkwise_lora.calibration.config import QUICK
from chunkwise_lora.calibration.cost_model import CostModel, Observations, fit_costs
from chunkwise_lora.calibration.descent import RungTraining
from chunkwise_lora.calibration.distillation import distil
from chunkwise_lora.calibration.estimate import factor_for, planned_work
from chunkwise_lora.calibration.fisher import sensitivities
from chunkwise_lora.calibration.fitted_ladder import FittedLadder, alike
from chunkwise_lora.calibration.log_probabilities import (
    at_full_rank,
    kl_divergence,
    log_probabilities,
    log_probabilities_as_generated,
    log_probabilities_in_one_pass,
    next_token_losses,
    scored_losses,
)
from chunkwise_lora.calibration.noise import standard_error
from chunkwise_lora.calibration.run import CalibrationRun
from chunkwise_lora.calibration.rung_policy import choose_rungs
from chunkwise_lora.calibration.rung_sampler import PlannedRungs, RandomRungs, RungSampler
from chunkwise_lora.calibration.search import MIN_LENGTHS, SCALES, choose_tokens
from chunkwise_lora.calibration.self_generated import PREFIX_TOKENS, generate_text
from chunkwise_lora.calibration.text import MIN_BLOCKS, CalibrationText, TokenBlocks
from chunkwise_lora.calibration.unfinished import STEPS_BETWEEN, Unfinished
from chunkwise_lora.calibration.work import Progress, Report, Speed, Work
from chunkwise_lora.ladder.tensors import read_learned
from chunkwise_lora.method.complexity import SIGNALS, LearnedComplexity, TokenComplexityEstimator
from chunkwise_lora.method.config import (
    ChunkingConfig,
    ComplexityConfig,
    CompositionConfig,
    KVCacheConfig,
    LevelKVPolicy,
    SelectionConfig,
)
from chunkwise_lora.method.scheduler import RuntimeScheduler
from chunkwise_lora.method.segments import ranks_of
from models import VOCABULARY, adapter, build

INT8_LEVEL = (LevelKVPolicy(precision="int8"),)
BLOCK = 24
CONFIG = CalibrationConfig(mean_rank=0.5, block=BLOCK, refinements=6, explorations=1)


@cache
def text(blocks: int = 40) -> list[int]:
    """Text that the adapted model generates itself, so that ranks below the full one cost something."""
    torch.manual_seed(0)
    with ChunkWiseModel(build("llama"), adapter("llama"), ChunkWiseConfig.preset("lossless")) as model:
        start = torch.full((blocks, 1), 5)
        return model.generate(start, max_new_tokens=BLOCK - 1, do_sample=True, top_k=0).flatten().tolist()


def planted(rungs: int = 5, n: int = 20_000) -> Observations:
    """Costs that halve with every rung. They are eight times as high at token 2, and eight times after token 1."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 10, (n,), generator=generator)
    previous = torch.cat([torch.tensor([-1]), tokens[:-1]])
    at = torch.randint(0, rungs, (n,), generator=generator)
    noise = torch.empty(n).exponential_(generator=generator)
    costs = noise * 0.5**at * (1 + 7 * (tokens == 2)) * (1 + 7 * (previous == 1))
    return Observations(tokens, previous, torch.full((n, len(SIGNALS)), float("nan")), at, costs)


def test_the_fit_finds_the_most_expensive_tokens() -> None:
    seen = planted()
    model = fit_costs(seen, 10, 5)
    token, previous = model.learned.token, model.learned.previous
    assert token.argmax() == 2 and previous.argmax() == 1
    assert np.exp(model.slopes.mean() * (token[2] - np.delete(token, 2).mean())) == pytest.approx(8, rel=0.3)
    assert np.exp(-np.diff(model.offsets)) == pytest.approx(2, rel=0.3)
    assert model.explained_deviance(seen) > 0.3 > fit_costs(seen, 10, 5, ids=0).explained_deviance(seen) + 0.2


def test_unobserved_rungs_are_interpolated() -> None:
    seen = planted()
    odd = seen.rungs % 2 == 0
    kept = Observations(*(getattr(seen, name)[odd] for name in ("tokens", "previous", "signals", "rungs", "costs")))
    assert (np.diff(fit_costs(kept, 10, 5).offsets) < 0).all()


@given(seed=st.integers(0, 1000), share=st.floats(0.2, 0.95), slope=st.floats(0.3, 2))
def test_chosen_rungs_keep_the_budget_and_give_harder_tokens_at_least_as_much_rank(
    seed: int, share: float, slope: float
) -> None:
    generator = np.random.default_rng(seed)
    ranks = np.arange(17.0)
    model = CostModel(LearnedComplexity.neutral(), -0.3 * ranks, slope * np.ones(17))
    scores = generator.normal(size=500)
    policy = choose_rungs(model, scores, ranks, share * 16, range(1, 17))
    chunking, selection = policy.chunking, policy.selection
    shares = np.array(selection.rank_shares)
    assert (np.diff(shares) > 0).all() and len(shares) == len(chunking.thresholds) + 1
    levels = np.searchsorted(chunking.thresholds, 1 / (1 + np.exp(-scores)), side="right")
    assert shares[levels].mean() <= share + 0.02
    assert shares[levels].mean() >= share - 0.1


@pytest.mark.parametrize("budget", [{}, {"mean_rank": 0.5, "max_loss_increase": 0.1}])
def test_one_budget_is_needed(budget: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="one budget"):
        CalibrationConfig(**budget)


# The estimator


def test_the_estimator_gives_tokens_the_scores_of_the_fit() -> None:
    generator = np.random.default_rng(0)
    tables = generator.normal(size=(2, VOCABULARY)).astype(np.float32)
    weights, means = generator.normal(size=(2, 4)).astype(np.float32)
    learned = LearnedComplexity(*tables, weights, means)
    tokens = generator.integers(0, VOCABULARY, 50).tolist()
    entropies = [None, *generator.uniform(0, 4, 49).tolist()]
    config = ComplexityConfig(learned=True)
    scores = TokenComplexityEstimator(config, VOCABULARY, learned).update(tokens, entropies)
    probe = TokenComplexityEstimator(config, VOCABULARY)
    signals = [probe.signals(token, entropy) for token, entropy in zip(tokens, entropies, strict=True)]
    seen = Observations(
        torch.tensor(tokens),
        torch.tensor([-1, *tokens[:-1]]),
        torch.tensor([[float("nan") if value is None else value for value in row] for row in signals]),
        torch.zeros(50, dtype=torch.int64),
        torch.ones(50),
    )
    fitted = CostModel(learned, np.zeros(1), np.ones(1)).scores(seen)
    assert np.allclose(scores, 1 / (1 + np.exp(-fitted)), atol=1e-5)


def test_a_policy_with_learned_complexity_refuses_an_uncalibrated_ladder() -> None:
    config = ChunkWiseConfig(complexity=ComplexityConfig(learned=True))
    with pytest.raises(ConfigError, match="chunkwise calibrate"):
        RuntimeScheduler(config, [0.0, 8.0], VOCABULARY)
    with pytest.raises(ConfigError, match="chunkwise calibrate"), ChunkWiseModel(build("llama"), adapter("llama")) as m:
        m.generate(torch.tensor([[5, 6]]), chunkwise_config=config, max_new_tokens=1)


# The ladder


@given(seed=st.integers(0, 1000), steps=st.integers(1, 12))
def test_sorted_rungs_spend_their_share_and_full_rank_is_unchanged(seed: int, steps: int) -> None:
    ladder = RankLadder.from_peft(adapter("llama", "patterns"))
    generator = torch.Generator().manual_seed(seed)
    importance = {name: torch.rand(module.rank, generator=generator) for name, module in ladder.modules.items()}
    found = ladder.sorted_by(importance, steps)
    assert found.rungs == steps + 1
    full = found.rung_ranks[-1]
    dearest = max(module.cost for module in ladder.modules.values())
    slack = dearest / sum(module.cost for module in ladder.modules.values())
    for step, rank in enumerate(found.rung_ranks):
        assert step / steps * full - slack <= rank <= step / steps * full + 1e-6
    for name, module in found.modules.items():
        assert torch.allclose(module.up @ module.down, ladder.modules[name].up @ ladder.modules[name].down, atol=1e-5)
        assert (module.sigma.diff() <= 0).all()


def test_weakening_modules_with_high_fisher_information_costs_most() -> None:
    ladder = RankLadder.from_peft(adapter("llama"))
    tokens = torch.tensor(text()).view(-1, BLOCK)
    with ChunkWiseModel(build("llama"), ladder) as model:
        found = sensitivities(model, TokenBlocks.all_scored(tokens).split(8))
        full = log_probabilities(model, tokens)
    names = list(ladder.modules)
    predicted, measured = [], []
    for name in names:
        module = ladder.modules[name]
        closed = replace(module, up=0.7 * module.up)
        with ChunkWiseModel(build("llama"), replace(ladder, modules={**ladder.modules, name: closed})) as model:
            measured.append(float(kl_divergence(full, log_probabilities(model, tokens)).mean()))
        predicted.append(float(found[name].gates.sum()))
    assert np.corrcoef(np.log(predicted), np.log(measured))[0, 1] > 0.7


def test_the_basis_is_rotated_for_scored_tokens_alone() -> None:
    ladder = RankLadder.from_peft(adapter("llama"))
    importance = {name: module.sigma for name, module in ladder.modules.items()}
    tokens = torch.tensor(text())[None, :24]
    scored = torch.arange(24)[None] < 10
    with ChunkWiseModel(build("llama"), ladder) as model:
        some, shorter, all_of_it = (
            rotate_basis(model, Basis(ladder, importance), RungTraining([one], 1, RandomRungs(2, 8)), 8).ladder
            for one in (
                TokenBlocks(tokens, scored),
                TokenBlocks.all_scored(tokens[:, :10]),
                TokenBlocks.all_scored(tokens),
            )
        )

    def distance(one: RankLadder, other: RankLadder) -> float:
        return sum(float((m.down - other.modules[name].down).abs().mean()) for name, m in one.modules.items())

    assert distance(some, shorter) < 0.2 * distance(some, all_of_it)  # Adam amplifies rounding of small gradients


def test_planned_rungs_are_shifted_to_their_neighbours() -> None:
    config = ChunkWiseConfig(
        chunking=ChunkingConfig(min_length=1, thresholds=(0.6, 0.7), hysteresis=0.0, memory=1.0, hard_share=1.0),
        selection=SelectionConfig(rank_shares=(0.25, 0.5, 1.0)),
        composition=CompositionConfig(window=0),
    )
    tokens = torch.tensor(text()).view(-1, BLOCK)

    def scheduler() -> RuntimeScheduler:
        return RuntimeScheduler(config, range(9), VOCABULARY)

    drawn = PlannedRungs(scheduler, 3, 8)(tokens, torch.Generator().manual_seed(0))
    plan = np.stack([scheduler().step(row).weights.argmax(1) for row in tokens.tolist()])
    shifts = [set((row - planned)[planned == 4].tolist()) for row, planned in zip(drawn, plan, strict=True)]
    assert set(map(len, shifts)) <= {0, 1} and set().union(*shifts) == {-1, 0, 1}
    assert set(np.unique(plan)) == {2, 4, 8} and (drawn.min(), drawn.max()) == (3, 7)


def test_self_generated_text_has_the_asked_size_continues_the_text_and_is_reproducible() -> None:
    tokens = torch.tensor(text()).view(-1, 48)
    state = torch.get_rng_state()
    with ChunkWiseModel(build("llama"), adapter("llama")) as model:
        pieces, again = (generate_text(model, tokens, 70, seed=3) for _ in range(2))
    assert pieces.shape == (70, 48) and torch.equal(pieces, again)
    assert torch.equal(torch.get_rng_state(), state)
    seen = {
        tuple(one) for row in tokens.tolist() for one in zip(*(row[i:] for i in range(PREFIX_TOKENS)), strict=False)
    }
    assert all(tuple(piece[:PREFIX_TOKENS]) in seen for piece in pieces.tolist())


# The estimate of the time


@pytest.mark.parametrize(
    "changes",
    [
        {"rounds": 1},
        {"keep_directions": True, "int8": False, "dtype": "bfloat16"},
        {"self_generated_tokens": 5 * BLOCK, "distillations": 2},
        {"mean_rank": None, "max_loss_increase": 0.1, "rounds": 1, "distillations": 2, "tokens": 20 * BLOCK},
    ],
    ids=" ".join,
)
def test_the_work_that_is_estimated_is_the_work_that_is_done(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost_model, "MIN_STEPS", 10)
    monkeypatch.setattr(search, "CHOICE_GAIN", 2.0)  # one rung serves all tokens
    progress: list[Progress] = []
    expected: list[Work] = []

    class Recorded(Progress):
        def expect(self, work: Work, speed: Speed) -> None:
            super().expect(work, speed)
            progress.append(self)
            expected.append(work)

    monkeypatch.setattr(procedure, "Progress", Recorded)
    reports: list[tuple[str, float, float]] = []
    ids = text()
    scored = [i % BLOCK > BLOCK // 2 for i in range(len(ids))] if "self_generated_tokens" not in changes else None
    config = CONFIG.model_copy(update=changes)
    calibrate(
        build("llama"), RankLadder.from_peft(adapter("llama")), ids, config, lambda *one: reports.append(one), scored
    )
    assert [one.done for one in progress] == expected
    assert reports[0][1] == 0 and reports[-1][1] == pytest.approx(reports[-1][2])
    assert all(before[1] <= after[1] for before, after in pairwise(reports))


def planned(config: CalibrationConfig) -> CalibrationRun:
    """A calibration of a long text, to count its work."""
    blocks = TokenBlocks.all_scored(torch.zeros(4000, 64, dtype=torch.int64))
    ladder = RankLadder.from_peft(adapter("llama"))
    split = CalibrationText.split(blocks, None, config)
    return CalibrationRun(build("llama"), ladder, split, config, Progress(lambda *report: None), Unfinished())


def test_more_text_is_held_back_where_few_predictions_are_scored() -> None:
    tokens = torch.zeros(200, 64, dtype=torch.int64)
    config = CalibrationConfig(mean_rank=0.5)
    held = {}
    for scored in (64, 10, 1):
        blocks = TokenBlocks(tokens, torch.arange(64).expand_as(tokens) < scored)
        split = CalibrationText.split(blocks, None, config)
        held[scored] = len(split.choice) + len(split.check)
    assert held == {64: 20, 10: 200 * 64 // 32 // 10, 1: 50}, "a share of the text, enough predictions, or a quarter"


SPEED = Speed(read=1e-3, learned=4e-3, steps=2e-2, fits=1e-4)


def test_quick_settings_take_at_most_half_of_the_time() -> None:
    usual, quick = (planned_work(planned(CalibrationConfig(mean_rank=0.5, **settings))) for settings in ({}, QUICK))
    assert 2 * SPEED.seconds(quick) <= SPEED.seconds(usual)


@pytest.mark.parametrize("seconds", [300.0, 3000.0])
def test_minutes_scale_the_work_to_the_time(seconds: float) -> None:
    config = CalibrationConfig(mean_rank=0.5)
    factor = factor_for(seconds, SPEED, lambda factor: planned(config.scaled(factor)))
    assert 0.8 * seconds < SPEED.seconds(planned_work(planned(config.scaled(factor)))) <= seconds


# The whole procedure


@pytest.fixture(scope="module")
def calibrated() -> Calibration:
    """A calibration in which each token gets its own rung, whether or not that pays."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "CHOICE_GAIN", -math.inf)
        patch.setattr(search, "STANDARD_ERRORS", -math.inf)
        return calibrate(build("llama"), RankLadder.from_peft(adapter("llama")), text(), CONFIG)


def test_calibration_is_deterministic() -> None:
    calibrated, again = (
        calibrate(build("llama"), RankLadder.from_peft(adapter("llama")), text(MIN_BLOCKS), CONFIG) for _ in range(2)
    )
    assert again.policy == calibrated.policy and again.check == calibrated.check
    for name, module in calibrated.ladder.modules.items():
        assert torch.equal(again.ladder.modules[name].down, module.down)


def test_the_chosen_chunk_length_and_scale_cost_no_more_than_the_simplest(calibrated: Calibration) -> None:
    length = calibrated.policy.chunking.min_length
    of_length = {n: calibrated.searched[f"chunks of at least {n}"] for n in MIN_LENGTHS}
    assert of_length[length] <= of_length[MIN_LENGTHS[0]]
    of_scale = {scale: calibrated.searched[f"scale {scale:g}"] for scale in SCALES}
    (scale,) = set(calibrated.policy.selection.scales)
    assert of_scale[scale] <= of_scale[SCALES[0]]


def test_a_setting_must_save_more_than_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    losses, noise = torch.rand(400), torch.randn(400)
    noise -= noise.mean()
    text = TokenBlocks.all_scored(torch.zeros(1, 2, dtype=torch.long))
    run: Any = SimpleNamespace(text=SimpleNamespace(choice=text), batches=lambda *_: [text])

    def found(_: Any, __: Any, of_tokens: torch.Tensor, **options: Any) -> Any:
        return SimpleNamespace(log_p=of_tokens, ranks=np.zeros(1))

    monkeypatch.setattr(search, "log_probabilities_in_one_pass", found)
    monkeypatch.setattr(search, "scored_losses", lambda of_tokens, _: of_tokens)
    for saved, pays in (
        (0.02 + noise, False),
        (0.02 + 0.01 * noise, True),
        (1e-4 + 0 * noise, False),
        (0 * noise - 0.02, False),
    ):
        settings: Any = {"simple": losses, "other": losses - saved}
        chosen, _ = search._simplest_good(run, Mock(), settings, 1.0)
        assert chosen is settings["other" if pays else "simple"]


def test_an_adapter_that_is_too_strong_gets_a_scale_below_1() -> None:
    ladder = RankLadder.from_peft(adapter("llama"))  # the adapter generated the text at scale 1
    loud = {name: replace(module, up=module.up / 0.8) for name, module in ladder.modules.items()}
    config = CONFIG.model_copy(update={"mean_rank": 1.0, "refinements": 0})
    for strong, scale in ((ladder, 1.0), (replace(ladder, modules=loud), 0.9)):
        assert set(calibrate(build("llama"), strong, text(200), config).policy.selection.scales) == {scale}


def test_calibration_keeps_the_rank_budget_and_full_rank(calibrated: Calibration) -> None:
    assert calibrated.check.mean_rank == pytest.approx(4, abs=0.8)
    plain = RankLadder.from_peft(adapter("llama"))
    for name, module in calibrated.ladder.modules.items():
        assert torch.allclose(module.up @ module.down, plain.modules[name].up @ plain.modules[name].down, atol=1e-4)


def test_a_calibrated_folder_runs_like_any_ladder(calibrated: Calibration, tmp_path: Path) -> None:
    calibrated.ladder.save_pretrained(tmp_path)
    tokens = torch.tensor(text())[None, :BLOCK]
    with ChunkWiseModel(build("llama"), tmp_path) as model:
        assert model.ladders["default"].policy == calibrated.policy
        model.generate(tokens, max_new_tokens=8)
        trace = model.trace
    ranks = calibrated.ladder.rung_ranks
    scheduler = RuntimeScheduler(calibrated.policy, ranks, VOCABULARY, calibrated.ladder.learned)
    planned = ranks_of(scheduler.step(tokens[0].tolist()).weights, np.array(ranks))
    assert trace is not None and trace.sequences[0].ranks[:BLOCK] == pytest.approx(planned.tolist())
    assert len(set(planned)) > 1


def test_a_calibrated_ladder_holds_its_policy_and_the_divergence_of_every_rung(calibrated: Calibration) -> None:
    ladder = calibrated.ladder
    assert ladder.policy is calibrated.policy
    assert ladder.expectation is not None and ladder.expectation.asked_rank == ladder.rung_ranks[-1] / 2
    assert ladder.expectation.loss_increase == calibrated.check.loss_increase
    divergence = ladder.rung_divergence
    assert divergence is not None and len(divergence) == ladder.rungs and divergence[-1] == 0
    held = TokenBlocks.cut(text(), BLOCK)[-4:-2]  # the first half of the held-back text
    with ChunkWiseModel(build("llama"), ladder) as model:
        full, half = (log_probabilities(model, held.tokens, rung) for rung in (None, ladder.rungs // 2))
    assert divergence[ladder.rungs // 2] == pytest.approx(float(kl_divergence(full, half).mean()), rel=1e-3)
    assert divergence[0] > divergence[ladder.rungs // 2] > 0


def test_what_to_expect_is_measured_in_the_ladders_own_number_format() -> None:
    config = CONFIG.model_copy(update={"dtype": "bfloat16", "refinements": 0})
    found = calibrate(build("llama"), RankLadder.from_peft(adapter("llama")), text(), config)
    ladder = found.ladder
    assert {module.up.dtype for module in ladder.modules.values()} == {torch.bfloat16}
    assert ladder.rung_divergence is not None and ladder.rung_divergence[-1] > 0, "rounding has a divergence"
    checked = TokenBlocks.cut(text(), BLOCK)[-2:].tokens
    with ChunkWiseModel(build("llama"), ladder) as model:
        log_p = log_probabilities_as_generated(model, checked, found.policy).log_p
    loss = float(next_token_losses(log_p, checked).mean())
    assert found.check.loss_full * (1 + found.check.loss_increase) == pytest.approx(loss, rel=1e-4)


def test_the_standard_error_counts_alike_neighbours_once() -> None:
    independent = torch.randn(64 * 64, generator=torch.Generator().manual_seed(0))
    assert standard_error(independent) == pytest.approx(1 / 64, rel=0.2)
    alike = independent[::64].repeat_interleave(64)
    assert standard_error(alike) == pytest.approx(1 / 8, rel=0.2)
    assert standard_error(torch.ones(3)) == 0


@pytest.mark.parametrize("tolerance", [0.0, 1e-3, 1.0])
def test_int8_is_kept_if_its_divergence_is_small_beside_the_loss(
    tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "INT8_TOLERANCE", tolerance)
    blocks = TokenBlocks.cut(text(), BLOCK)
    split = CalibrationText.split(blocks, None, CONFIG)
    ladder = RankLadder.from_peft(adapter("llama"))
    run = CalibrationRun(build("llama"), ladder, split, CONFIG, Progress(lambda *report: None), Unfinished())
    config = fitted_ladder.alike(0.5)
    config = config.model_copy(update={"chunking": ChunkingConfig(thresholds=(), min_length=1, max_length=4)})
    with run.attach(ladder) as model:
        chosen = search.choose_int8(run, model, config)
        full, int8 = (
            log_probabilities_as_generated(model, split.choice.tokens, one).log_p[:, :-1]
            for one in (config, config.model_copy(update={"kv_cache": KVCacheConfig(levels=INT8_LEVEL)}))
        )
    loss = -full.gather(2, split.choice.tokens[:, 1:, None]).mean()
    assert (chosen.kv_cache.levels == INT8_LEVEL) == bool(kl_divergence(full, int8).mean() <= tolerance * loss)
    assert chosen.kv_cache.levels == INT8_LEVEL or tolerance < 1


def test_a_tighter_loss_budget_spends_more_rank_and_loses_less() -> None:
    ladder = RankLadder.from_peft(adapter("llama"))
    tight, loose = (
        calibrate(
            build("llama"),
            ladder,
            text(),
            CalibrationConfig(max_loss_increase=budget, block=BLOCK, refinements=0, explorations=1),
        )
        for budget in (0.0001, 0.9)
    )
    assert tight.check.mean_rank > loose.check.mean_rank
    assert tight.check.loss_increase < loose.check.loss_increase


def test_the_basis_is_learned_from_self_generated_text_but_costs_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    learned, observed = [], []
    initial_basis, explore = procedure._initial_basis, fitted_ladder.explore

    def record_learned(run: Any, training_text: TokenBlocks) -> Any:
        learned.append(training_text)
        return initial_basis(run, training_text)

    def record_observed(run: Any, model: Any, part: TokenBlocks, *rest: Any) -> Any:
        observed.append(part.tokens)
        return explore(run, model, part, *rest)

    monkeypatch.setattr(procedure, "_initial_basis", record_learned)
    monkeypatch.setattr(fitted_ladder, "explore", record_observed)
    config = CONFIG.model_copy(update={"self_generated_tokens": 4 * BLOCK, "refinements": 1})
    calibrate(build("llama"), RankLadder.from_peft(adapter("llama")), text(), config)
    given = {tuple(row) for row in torch.tensor(text()).view(-1, BLOCK).tolist()}
    learning = [tuple(row) for row in learned[0].tokens.tolist()]
    assert len([row for row in learning if row not in given]) == 4
    assert {row for row in learning if row in given} == {tuple(row) for row in observed[0].tolist()}
    assert all(tuple(row) in given for part in observed for row in part.tolist())


def test_only_scored_tokens_are_observed_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, observed = text(), []
    fit = estimator.fit_costs

    def record_observed(seen: Observations, *rest: Any, **options: Any) -> CostModel:
        observed.append(len(seen))
        return fit(seen, *rest, **options)

    monkeypatch.setattr(estimator, "fit_costs", record_observed)
    scored = [i % BLOCK >= BLOCK // 2 and i >= 2 * BLOCK for i in range(len(ids))]
    found = calibrate(build("llama"), RankLadder.from_peft(adapter("llama")), ids, CONFIG, scored=scored)
    sequences = len(ids) // BLOCK - 2  # two blocks have no scored token
    held = max(4, round(sequences * CONFIG.held_share))
    assert set(observed) == {(sequences - held) * CONFIG.explorations * BLOCK // 2}
    checked = torch.tensor(ids).view(-1, BLOCK)[-(held // 2) :]
    with ChunkWiseModel(build("llama"), found.ladder) as model:
        of_answers = next_token_losses(log_probabilities(model, checked), checked)[:, BLOCK // 2 :]
    assert found.check.tokens == of_answers.numel()
    assert found.check.loss_full == pytest.approx(float(of_answers.mean()), rel=1e-4)


def test_a_basis_rotated_for_a_plan_loses_less_under_that_plan() -> None:
    plain = RankLadder.from_peft(adapter("llama"))
    importance = {name: module.sigma for name, module in plain.modules.items()}
    learning, held = TokenBlocks.cut(text(200)[: 160 * BLOCK], BLOCK).split(16), torch.tensor(text(200)[160 * BLOCK :])

    def plan(tokens: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        return torch.where(tokens % 2 == 0, 2, 6)

    def kl(sampler: RungSampler) -> float:
        with ChunkWiseModel(build("llama"), plain) as model:
            training = RungTraining(6 * learning, 6 * len(learning), sampler)
            rotated = rotate_basis(model, Basis(plain, importance), training, 8)
        tokens = held.view(-1, BLOCK)
        with ChunkWiseModel(build("llama"), rotated.on_rungs(8)) as model:
            planned = log_probabilities(model, tokens, plan(tokens).numpy())
            return float(kl_divergence(log_probabilities(model, tokens), planned).mean())

    assert kl(plan) < 0.95 * kl(RandomRungs(2, 8))


def test_a_distilled_ladder_loses_less_under_its_plan_and_keeps_its_rungs() -> None:
    plain = RankLadder.from_peft(adapter("llama"))
    learning, held = TokenBlocks.cut(text(200)[: 160 * BLOCK], BLOCK).split(16), torch.tensor(text(200)[160 * BLOCK :])

    def plan(tokens: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        return torch.where(tokens % 2 == 0, 2, 6)

    with ChunkWiseModel(build("llama"), plain) as model:
        ladder = distil(model, RungTraining(4 * learning, 4 * len(learning), plan), rate=5e-4)
    tokens = held.view(-1, BLOCK)
    with ChunkWiseModel(build("llama"), {"plain": plain, "distilled": ladder}) as model:
        full, rungs = log_probabilities(model, tokens), plan(tokens).numpy()
        before, after = (
            float(kl_divergence(full, log_probabilities(model, tokens, rungs, name)).mean()) for name in model.ladders
        )
    assert after < 0.9 * before
    assert ladder.rung_ranks == plain.rung_ranks


def test_a_distilled_ladder_is_checked_against_the_given_adapter_on_the_held_text() -> None:
    given, held = RankLadder.from_peft(adapter("llama")), text(60)[-10 * BLOCK :]
    config = CONFIG.model_copy(update={"distillations": 3, "keep_directions": True, "int8": False})
    found = calibrate(build("llama"), given, text(), config, held_tokens=held)
    again = calibrate(build("llama"), given, text(), config, held_tokens=held)
    checked = torch.tensor(held).view(-1, BLOCK)[5:]
    name, module = next(iter(found.ladder.modules.items()))
    assert not torch.equal(module.down, given.modules[name].down)
    assert torch.equal(module.down, again.ladder.modules[name].down)
    with ChunkWiseModel(build("llama"), {"given": given, "found": found.ladder}) as model:
        full = log_probabilities(model, checked)
        planned = log_probabilities_in_one_pass(model, checked, found.policy, "found").log_p
    assert found.check.loss_full == pytest.approx(float(next_token_losses(full, checked).mean()), rel=1e-4)
    assert found.check.kl == pytest.approx(float(kl_divergence(full, planned).mean()), rel=1e-3)
    with pytest.raises(ChunkWiseError, match="held tokens are too few"):
        calibrate(build("llama"), given, text(), config, held_tokens=held[: 3 * BLOCK])


def test_only_the_scored_tokens_of_a_held_text_count() -> None:
    tokens, half = TokenBlocks.all_scored(torch.arange(100 * BLOCK).view(100, BLOCK)), torch.arange(BLOCK) < BLOCK // 2
    held = TokenBlocks(tokens.tokens, half.expand(100, BLOCK).clone())
    held.scored[::2] = False
    split = CalibrationText.split(tokens, held, CONFIG.model_copy(update={"tokens": 24 * BLOCK}))
    assert torch.equal(torch.cat([split.choice.tokens, split.check.tokens]), tokens.tokens[1:13:2])
    assert split.choice.scored.sum() == 3 * BLOCK // 2
    few = TokenBlocks(tokens.tokens, torch.arange(BLOCK).eq(0).expand(100, BLOCK))
    split = CalibrationText.split(tokens, few, CONFIG.model_copy(update={"tokens": 24 * BLOCK}))
    assert len(split.choice) + len(split.check) == 24 * BLOCK // 32, "as many blocks as hold enough predictions"


def test_a_scale_with_fixed_rungs_equals_the_same_scale_in_a_policy() -> None:
    tokens = torch.tensor(text()).view(-1, BLOCK)[:4]
    config = ChunkWiseConfig.uniform(0.5)
    config = config.model_copy(update={"selection": config.selection.model_copy(update={"scales": (0.9,)})})
    with ChunkWiseModel(build("llama"), adapter("llama")) as model:
        planned = log_probabilities_in_one_pass(model, tokens, config)
        assert torch.allclose(log_probabilities(model, tokens, 4, scale=0.9), planned.log_p, atol=1e-5)
        assert not torch.allclose(log_probabilities(model, tokens, 4), planned.log_p, atol=1e-2)
    assert (planned.ranks == 4).all()


@pytest.mark.parametrize("kind", ["plain", "lm_head", "saved_head"])
def test_predictions_of_scored_tokens_are_those_of_a_full_pass(kind: str) -> None:
    tokens = torch.tensor(text()).view(-1, BLOCK)[:3]
    scored = torch.rand(tokens.shape) < 0.4
    rungs = np.arange(tokens.numel()).reshape(tokens.shape) % 9
    config = ChunkWiseConfig.preset("balanced")
    blocks = TokenBlocks(tokens, scored)
    with ChunkWiseModel(build("llama"), adapter("llama", kind)) as model:
        model.requires_grad_(False)
        for all_of_it, some in (
            (at_full_rank(model, tokens), at_full_rank(model, tokens, scored=scored)),
            (log_probabilities(model, tokens, rungs), log_probabilities(model, tokens, rungs, scored=scored)),
            *(
                (run(model, tokens, config).log_p, run(model, tokens, config, scored=scored).log_p)
                for run in (log_probabilities_in_one_pass, log_probabilities_as_generated)
            ),
        ):
            assert torch.allclose(all_of_it[scored], some, atol=1e-5)
            losses = next_token_losses(all_of_it, tokens)[blocks.scored_predictions]
            assert torch.allclose(scored_losses(some, blocks), losses, atol=1e-5)


def test_a_ladder_of_one_rung_is_calibrated_too() -> None:
    config = CONFIG.model_copy(update={"rungs": 1, "lowest_share": 0.0})
    found = calibrate(build("llama"), RankLadder.from_peft(adapter("llama")), text(), config)
    assert found.ladder.rungs == 2


def test_the_check_uses_a_limited_part_of_a_long_text() -> None:
    config = CONFIG.model_copy(update={"refinements": 0, "held_share": 0.4, "tokens": 24 * BLOCK})
    found = calibrate(build("llama"), RankLadder.from_peft(adapter("llama")), text(), config)
    assert found.check.tokens == 3 * (BLOCK - 1)


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ChunkWiseError, match="too few"):
        calibrate(build("llama"), RankLadder.from_peft(adapter("llama")), text(MIN_BLOCKS - 1), CONFIG)


# Interruptions


class Stopped:
    """A report that interrupts the calibration at its n-th call."""

    def __init__(self, n: int) -> None:
        self.left = n
        self.stages: list[str] = []

    def __call__(self, stage: str, done: float, total: float) -> None:
        self.stages.append(stage)
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def unhurried() -> Iterator[tuple[Any, Calibration, list[str]]]:
    """A function that calibrates with a report and a folder for stages, and what it gives without interruption."""
    settings = {"rounds": 1, "refinements": 2 * STEPS_BETWEEN, "distillations": STEPS_BETWEEN + 2, "mean_rank": None}
    config = CONFIG.model_copy(update={**settings, "max_loss_increase": 0.1, "self_generated_tokens": 4 * BLOCK})

    def run(report: Report, unfinished: Unfinished | None = None, **changes: Any) -> Calibration:
        changed = config.model_copy(update=changes)
        ladder = RankLadder.from_peft(adapter("llama"))
        return calibrate(build("llama"), ladder, text(), changed, report, unfinished=unfinished)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost_model, "MIN_STEPS", 10)
        report = Stopped(0)
        yield run, run(report), report.stages


@pytest.mark.parametrize("share", [0.02, 0.25, 0.6, 0.95])
def test_an_interrupted_calibration_goes_on_and_gives_the_same_ladder(
    share: float, unhurried: tuple[Any, Calibration, list[str]], tmp_path: Path
) -> None:
    run, expected, stages = unhurried
    said: list[str] = []
    unfinished = Unfinished.beside(tmp_path / "out", said.append)
    with pytest.raises(KeyboardInterrupt):
        run(Stopped(round(share * len(stages))), unfinished)
    rest = Stopped(0)
    found = run(rest, unfinished)
    assert found.policy == expected.policy and found.check == expected.check and found.searched == expected.searched
    assert found.ladder.rung_divergence == expected.ladder.rung_divergence
    for name, module in expected.ladder.modules.items():
        for part in ("up", "down", "sigma"):
            assert torch.equal(getattr(found.ladder.modules[name], part), getattr(module, part))
    if share > 0.1:
        assert len(rest.stages) < len(stages) * (1.3 - share) and "goes on" in said[0]
    unfinished.remove()
    assert list(tmp_path.iterdir()) == []


def test_unfinished_work_of_another_calibration_is_removed_and_damaged_work_runs_again(
    unhurried: tuple[Any, Calibration, list[str]], tmp_path: Path
) -> None:
    run, expected, stages = unhurried
    said: list[str] = []
    unfinished = Unfinished.beside(tmp_path / "out", said.append)
    for seed in (1, 0):
        with pytest.raises(KeyboardInterrupt):
            run(Stopped(len(stages) // 2), unfinished, seed=seed)
    assert len(said) == 1 and "other settings" in said[0]
    folder = unfinished.folder
    assert folder is not None and {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    for path, damage in zip(sorted(folder.glob("*.safetensors")), (b"", b"x" * 9, None), strict=False):
        path.unlink() if damage is None else path.write_bytes(damage)
    sorted(folder.glob("*.json"))[3].write_text("[]")
    found = run(Stopped(0), unfinished)
    assert [line.partition(": ")[2] for line in said[2:]] == ["is damaged; this stage runs again"] * 4
    assert found.policy == expected.policy and found.check == expected.check


def test_a_folder_of_which_nothing_can_be_read_is_removed(tmp_path: Path) -> None:
    said: list[str] = []
    unfinished = Unfinished.beside(tmp_path / "out", said.append)
    folder = tmp_path / "out.unfinished"
    folder.mkdir()
    (folder / "01-directions.json").write_text("[]")
    unfinished.bind("fingerprint", Progress(lambda *report: None))
    assert not folder.exists() and "nothing can be read, and is removed" in said[0]


@pytest.mark.parametrize(
    ("name", "value"), [("weights", [1.0]), ("token", [float("nan")]), ("means", [[0.0] * 4]), ("other", [0.0])]
)
def test_the_learned_estimator_is_checked_on_load(name: str, value: list[float]) -> None:
    good = {"token": [0.0], "previous": [0.0], "weights": [0.0] * 4, "means": [0.0] * 4}
    tensors = {f"learned/{key}": torch.tensor(one) for key, one in {**good, name: value}.items()}
    with pytest.raises(LadderError, match=name):
        read_learned(tensors)


def test_a_calibrated_folder_holds_safetensors_and_json_only(calibrated: Calibration, tmp_path: Path) -> None:
    calibrated.ladder.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    assert load_file(tmp_path / "chunkwise.safetensors")["learned/token"].shape == (VOCABULARY,)
    assert json.loads((tmp_path / "chunkwise.json").read_text())["policy"]["complexity"]["learned"] is True


def test_tokens_share_one_rung_unless_choosing_pays() -> None:
    found = calibrate(build("llama"), RankLadder.from_peft(adapter("llama")), text(), CONFIG)
    assert not found.choice.pays, "random weights have no hard tokens"
    assert found.policy.levels == 1 and found.ladder.learned is None
    assert found.check.mean_rank == pytest.approx(4, abs=0.5), "the highest rung within the budget"


@pytest.mark.parametrize("pays", [True, False])
def test_choosing_pays_if_it_saves_enough_divergence(pays: bool) -> None:
    ladder = RankLadder.from_peft(adapter("llama"))
    blocks = TokenBlocks.cut(text(), BLOCK)
    split = CalibrationText.split(blocks, None, CONFIG)
    run = CalibrationRun(build("llama"), ladder, split, CONFIG, Progress(lambda *_: None), Unfinished())
    good, bad = alike(1.0), alike(1 / 8)
    with run.attach(ladder) as model:
        config, choice = choose_tokens(run, model, *((good, bad) if pays else (bad, good)), multiplier=0.0)
    assert choice.pays is pays and config is good
    assert min(choice.planned, choice.alike) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("mean_rank", "sampled"), [(0.5, (4, 16)), (0.25, (2, 9)), (1 / 16, (1, 3)), (None, (1, 16))])
def test_the_basis_is_rotated_for_rungs_around_the_budget(mean_rank: float | None, sampled: tuple[int, int]) -> None:
    config = CalibrationConfig(mean_rank=mean_rank, max_loss_increase=None if mean_rank else 0.01)
    assert config.sampled_rungs(range(17)) == sampled


@pytest.mark.parametrize("share", [1 / 16, 1 / 8, 1 / 4, 1 / 2])
def test_the_rung_of_all_tokens_is_the_one_that_was_asked_for(share: float) -> None:
    ranks = (*(0.99 * rank for rank in range(16)), 16.0)  # rungs of whole directions spend a little less
    allowed = range(CalibrationConfig(mean_rank=share).lowest_rung(ranks), 17)
    fitted = FittedLadder(cast("Any", SimpleNamespace(rung_ranks=ranks)), cast("Any", None), np.zeros(1), allowed)
    (found,) = fitted.one_rung(share).selection.rank_shares
    assert found == pytest.approx(0.99 * share)


@pytest.mark.parametrize(("ranks", "share"), [(range(17), 0.01), ((0.0, 8.0, 16.0), 0.25)])
def test_a_mean_rank_below_the_lowest_rung_is_refused(ranks: Sequence[float], share: float) -> None:
    ladder = RankLadder.from_peft(adapter("llama"))
    config = CONFIG.model_copy(update={"mean_rank": share, "keep_directions": len(ranks) == 3})
    if config.keep_directions:
        ladder = ladder.with_ranks(
            {name: (0, module.rank // 2, module.rank) for name, module in ladder.modules.items()}
        )
    with pytest.raises(ChunkWiseError, match="below the lowest rung"):
        calibrate(build("llama"), ladder, text(), config)
