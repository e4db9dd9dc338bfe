"""Calibration, evaluation and benchmarks give the same results wherever the model lies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import other_device
import small
from chunkwise_lora import ChunkWiseConfig, RankLadder
from chunkwise_lora.benchmark.measure import measure, random_prompt
from chunkwise_lora.benchmark.methods import methods
from chunkwise_lora.calibration import CalibrationConfig, cost_model
from chunkwise_lora.calibration.calibrate import Calibration, calibrate
from chunkwise_lora.calibration.unfinished import STEPS_BETWEEN, Unfinished
from chunkwise_lora.evaluation.answer_generator import AnswerGenerator
from chunkwise_lora.evaluation.answers import evaluate_answers
from chunkwise_lora.evaluation.baselines import BASELINES, Comparison, MethodSelection
from chunkwise_lora.evaluation.data import Example
from chunkwise_lora.evaluation.methods import Generator
from chunkwise_lora.evaluation.metrics import bleu
from chunkwise_lora.evaluation.results import Result
from chunkwise_lora.evaluation.settings import EvaluationSettings
from chunkwise_lora.evaluation.text import evaluate_text
from models import VOCABULARY, adapter, build

GPU = torch.cuda.is_available()
BLOCK = 24
CONFIG = CalibrationConfig(
    max_loss_increase=0.1,
    block=BLOCK,
    refinements=STEPS_BETWEEN + 2,
    rounds=1,
    explorations=1,
    distillations=STEPS_BETWEEN + 2,
    self_generated_tokens=2 * BLOCK,
)
PROMPTS = ("name[Aromi] ->", "name[Aromi], food[French] ->", "name[Crown] ->")


@pytest.fixture(scope="module")
def call() -> Iterator[Callable[..., Any]]:
    """A function that calls another one on a device: a GPU if there is one, or one that stands for it."""
    if GPU:
        yield lambda function, *args: function("cuda", *args)
        return
    with other_device.in_another_process() as elsewhere:
        yield lambda function, *args: elsewhere(function, other_device.NAME, *args)


def add_a_tensor_of_the_cpu(device: str) -> None:
    torch.ones(3, device=device) + torch.ones(3)


def index_the_cpu(device: str) -> None:
    torch.ones(3)[torch.tensor([1], device=device)]


def draw_with_the_generator_of_the_cpu(device: str) -> None:
    torch.rand(3, device=device, generator=torch.Generator())


def write_into_the_cpu(device: str) -> None:
    torch.ones(3).index_copy_(0, torch.tensor([1]), torch.ones(1, device=device))


def read_as_an_array(device: str) -> None:
    torch.ones(3, device=device).numpy()


@pytest.mark.parametrize(
    "mistake",
    [
        add_a_tensor_of_the_cpu,
        index_the_cpu,
        draw_with_the_generator_of_the_cpu,
        write_into_the_cpu,
        read_as_an_array,
    ],
)
def test_a_missing_move_to_the_device_is_an_error(mistake: Callable[[str], None], call: Callable[..., Any]) -> None:
    with pytest.raises((RuntimeError, TypeError)):
        call(mistake)


# Calibration


@cache
def text() -> list[int]:
    return torch.randint(3, VOCABULARY, (40 * BLOCK,), generator=torch.Generator().manual_seed(0)).tolist()


class Stopped(Exception):
    """A calibration that was interrupted."""


def calibrated(device: str, folder: Path | None = None, end: str = "") -> Calibration:
    """Calibrate on a device, and stop in the stage `end`."""

    def report(stage: str, done: float, total: float) -> None:
        seen.append(stage)
        if end and seen.count(end) > 2 * STEPS_BETWEEN + 1:  # two passes per step, and one call at the beginning
            raise Stopped

    seen: list[str] = []
    unfinished = Unfinished(folder)
    ladder = RankLadder.from_peft(adapter("llama"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost_model, "MIN_STEPS", 10)
        return calibrate(build("llama").to(device), ladder, text(), CONFIG, report, unfinished=unfinished)


def calibrate_and_stop(device: str, folder: Path, end: str) -> None:
    with pytest.raises(Stopped):
        calibrated(device, folder, end)


@pytest.fixture(scope="module")
def on_cpu() -> Calibration:
    return calibrated("cpu")


def assert_alike(found: Calibration, expected: Calibration) -> None:
    assert found.ladder.rung_ranks == expected.ladder.rung_ranks
    assert found.policy.kv_cache == expected.policy.kv_cache
    assert found.policy.selection == expected.policy.selection
    assert found.check.loss_full == pytest.approx(expected.check.loss_full, rel=1e-4)
    assert found.check.kl == pytest.approx(expected.check.kl, rel=2e-2)
    assert found.ladder.rung_divergence == pytest.approx(expected.ladder.rung_divergence, rel=2e-2)
    for name, module in expected.ladder.modules.items():
        for part in ("up", "down", "sigma"):
            ours, theirs = getattr(found.ladder.modules[name], part), getattr(module, part)
            assert ours.device.type == "cpu"
            assert (ours - theirs).norm() <= 5e-2 * theirs.norm(), "gates that rounding flips change the next steps"


def test_a_calibration_on_a_gpu_gives_the_ladder_of_the_cpu(on_cpu: Calibration, call: Callable[..., Any]) -> None:
    assert_alike(call(calibrated), on_cpu)


@pytest.mark.parametrize("stage", ["rotating the basis", "distilling"])
def test_a_calibration_goes_on_on_another_device(
    stage: str, on_cpu: Calibration, call: Callable[..., Any], tmp_path: Path
) -> None:
    call(calibrate_and_stop, tmp_path / "there", stage)
    kept = sorted(path.name for path in (tmp_path / "there").iterdir())
    assert kept[-1].endswith("descent.safetensors")
    assert_alike(calibrated("cpu", tmp_path / "there"), on_cpu)
    calibrate_and_stop("cpu", tmp_path / "here", stage)
    assert_alike(call(calibrated, tmp_path / "here"), on_cpu)


# Evaluation


def small_model(device: str) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(small.BASE).to(device), AutoTokenizer.from_pretrained(small.BASE)


def read_text(device: str) -> list[Result]:
    comparison = Comparison(small_model(device)[0], small.WIKI, {"calibrated": small.calibrated()})
    windows = torch.randint(3, small.VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(0))
    selection = MethodSelection(["balanced", "calibrated"], BASELINES)
    return evaluate_text(comparison.methods(selection, windows[:1]), windows, 12, batch=2)[0]


def answer_prompts(device: str) -> list[Result]:
    base, tokenizer = (
        AutoModelForCausalLM.from_pretrained(small.BASE).to(device),
        AutoTokenizer.from_pretrained(small.BASE),
    )
    examples = [Example(prompt, ("A text.",)) for prompt in PROMPTS]
    comparison = Comparison(base, small.E2E, {"calibrated": small.calibrated(small.E2E)})
    found = comparison.methods(MethodSelection(["calibrated"], ["svd"]), torch.ones(1, 8).long())
    able = [method for method in found if isinstance(method, Generator)]
    return evaluate_answers(able, examples, tokenizer, bleu, EvaluationSettings(batch=2, new_tokens=4))


def generate_answers(device: str) -> list[Example]:
    base, tokenizer = (
        AutoModelForCausalLM.from_pretrained(small.BASE).to(device),
        AutoTokenizer.from_pretrained(small.BASE),
    )
    return AnswerGenerator(base, RankLadder.load(small.E2E), tokenizer)([Example(prompt, ()) for prompt in PROMPTS])


@pytest.mark.parametrize("evaluate", [read_text, answer_prompts])
def test_an_evaluation_on_a_gpu_gives_the_results_of_the_cpu(
    evaluate: Callable[[str], list[Result]], call: Callable[..., Any]
) -> None:
    for found, expected in zip(call(evaluate), evaluate("cpu"), strict=True):
        assert found.label == expected.label and found.answers == expected.answers
        assert found.mean_rank == pytest.approx(expected.mean_rank, rel=1e-3)
        assert found.kl.value == pytest.approx(expected.kl.value, rel=1e-2, abs=1e-5)
        assert found.kv_share == pytest.approx(expected.kv_share, rel=1e-3)
        for name, score in expected.scores.items():
            assert found.scores[name].value == pytest.approx(score.value, rel=1e-3)


def test_missing_answers_are_generated_on_a_gpu(call: Callable[..., Any]) -> None:
    assert call(generate_answers) == generate_answers("cpu") != []


# Benchmark


def measure_all(device: str, prefill_rounds: int) -> list[str]:
    base = build("llama").to(device)
    presets = {name: ChunkWiseConfig.preset(name) for name in ("lossless", "compact")}
    compared = methods(base, {"a": adapter("llama")}, presets, caches=True)
    found = measure(compared, random_prompt(base, 2, 24), new_tokens=2, rounds=1, prefill_rounds=prefill_rounds)
    assert all(one.decode_ms > 0 and one.kv_bytes > 0 for one in found)
    return [one.name for one in found]


@pytest.mark.parametrize("prefill_rounds", [0, 1])
def test_a_benchmark_measures_every_method_on_a_gpu(prefill_rounds: int, call: Callable[..., Any]) -> None:
    assert call(measure_all, prefill_rounds) == measure_all("cpu", prefill_rounds)
