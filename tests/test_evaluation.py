"""Benchmarks measure what they report, and the adapters of the tests improve their base model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import small
from chunkwise_lora import ChunkWiseConfig, RankLadder
from chunkwise_lora.benchmark.measure import measure
from chunkwise_lora.benchmark.memory import PeakMemory
from chunkwise_lora.benchmark.methods import BASE, STATIC, UNMERGED, Method, methods
from chunkwise_lora.benchmark.perplexity import perplexity
from chunkwise_lora.benchmark.plots import plot_bench
from chunkwise_lora.benchmark.run import Run
from chunkwise_lora.benchmark.shapes import SHAPES, random_adapter, random_model
from chunkwise_lora.cli.rendering import bench_table, coloured_tokens, sparkline
from chunkwise_lora.method.trace import SequenceTrace
from models import VOCABULARY, adapter, build, peft_model

LOSSLESS = {"lossless": ChunkWiseConfig.preset("lossless")}


@pytest.fixture(scope="module")
def all_methods() -> list[Method]:
    return methods(build("llama"), {"a": adapter("llama")}, LOSSLESS)


@pytest.fixture
def text() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (1, 24))


def test_merged_unmerged_and_lossless_score_alike_and_unlike_the_base(
    all_methods: list[Method], text: torch.Tensor
) -> None:
    base, merged, unmerged, lossless = (perplexity(method, text) for method in all_methods)
    assert merged == pytest.approx(unmerged, rel=1e-4)
    assert lossless == pytest.approx(unmerged, rel=1e-5)
    assert base != pytest.approx(unmerged, rel=1e-2)


def test_all_methods_except_the_merged_one_share_the_weights_of_the_base(all_methods: list[Method]) -> None:
    first = [next(method.model.parameters()) for method in all_methods]
    assert [weight.data_ptr() == first[0].data_ptr() for weight in first] == [True, False, True, True]


def test_a_measurement_reports_the_bytes_of_the_storages(all_methods: list[Method], text: torch.Tensor) -> None:
    advances: list[int] = []
    results = measure(all_methods, text, new_tokens=4, rounds=2, prefill_rounds=3, advance=lambda: advances.append(1))
    assert len(advances) == len(all_methods) * (2 + 3)
    base, merged, unmerged, lossless = results
    assert base.adapter_bytes_per_pass == merged.adapter_bytes_per_pass == 0
    assert unmerged.adapter_bytes_per_pass == lossless.adapter_bytes_per_pass > 0
    # 2 layers, 2 sides, 2 key-value heads of 8 numbers in float32, after 3 warm-up tokens.
    slot = 2 * 2 * 2 * 8 * 4
    assert base.kv_bytes == unmerged.kv_bytes == slot * (24 + 3)
    assert lossless.kv_bytes == slot * (24 + 3 + 1), "the cache has room for one more token"
    assert unmerged.decode_ratio == unmerged.prefill_ratio == base.decode_over_base == base.prefill_over_base == 1
    assert base.scheduler_ms == 0 == lossless.scheduler_ms, "a plan that needs no tokens is made once"


def test_without_rounds_of_prefill_the_caches_of_baselines_are_filled(
    all_methods: list[Method], text: torch.Tensor
) -> None:
    base, *_, lossless = measure(all_methods, text, new_tokens=2, rounds=1, prefill_rounds=0)
    assert base.kv_bytes == 2 * 2 * 2 * 8 * 4 * (24 + 3)
    assert base.prefill_ms is base.prefill_ratio is base.peak_bytes is None
    assert lossless.prefill_ms is not None


@pytest.mark.parametrize("several", [False, True], ids=["one adapter", "an adapter per sequence"])
def test_every_method_generates_the_tokens_of_its_model(several: bool) -> None:
    folders = {"a": adapter("llama"), **({"b": adapter("llama", seed=2)} if several else {})}
    all_methods = methods(build("llama"), folders, LOSSLESS, caches=True)
    prompt = torch.randint(3, VOCABULARY, (2, 24))
    last = {}
    with torch.inference_mode():
        for method in all_methods:
            run = Run(method, prompt, 24 + 8)
            run.prefill()
            run.decode(8)
            last[method.name] = run._next.flatten().tolist()
            run.close()
    base = build("llama").generate(prompt, max_new_tokens=9, do_sample=False)[:, -1].tolist()
    tuned = peft_model("llama").generate(input_ids=prompt, max_new_tokens=9, do_sample=False)[:, -1].tolist()
    assert last.pop(BASE) == base
    assert STATIC in last
    assert {tokens[0] for tokens in last.values()} == {tuned[0]}
    assert len({tokens[1] for tokens in last.values()}) == 1
    assert (last[UNMERGED][1] == tuned[1]) == (not several)


def test_the_table_fits_a_narrow_terminal(all_methods: list[Method], text: torch.Tensor) -> None:
    results = measure(all_methods, text, new_tokens=2, rounds=1)
    console = Console(width=80, record=True)
    console.print(bench_table(results))
    printed = console.export_text()
    assert all(f"{method.name}  " in printed for method in all_methods)
    assert "…" not in printed


def test_a_plot_is_a_png_file(all_methods: list[Method], text: torch.Tensor, tmp_path: Path) -> None:
    results = [
        *measure(all_methods, text, new_tokens=2, rounds=1),
        *measure(all_methods, text[:, :16], new_tokens=2, rounds=1),
    ]
    plot_bench(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_peak_is_the_largest_memory_at_one_time() -> None:
    with PeakMemory(torch.device("cpu")) as peak:
        for _ in range(10):
            torch.ones(10_000_000)
    if peak.bytes is None:
        pytest.skip("this system does not report the peak")
    assert 35e6 < peak.bytes < 200e6


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_has_the_number_of_parameters_in_its_name(shape: str) -> None:
    model = random_model(SHAPES[shape], torch.bfloat16, "meta")
    millions = {"135M": 135, "360M": 362, "1B": 1236, "7B": 6738}[shape]
    assert round(model.num_parameters() / 1e6) == millions


def test_peft_and_ladders_read_a_random_adapter(tmp_path: Path) -> None:
    config = build("llama").config
    folder = random_adapter(config, 4, tmp_path)
    ladder = RankLadder.from_peft(folder)
    assert ladder.rung_ranks[-1] == 4
    assert len(ladder.modules) == 2 * 7
    assert len(methods(build("llama"), {"a": folder}, LOSSLESS)) == 4


def test_coloured_tokens_keep_the_text() -> None:
    sequence = SequenceTrace("a", tokens=(1, 2, 3), ranks=(0.0, 8.0, 16.0), full_rank=16.0, chunks=())
    text = coloured_tokens(sequence, ["<1>", "<2>", "<3>"], full_rank=16, prompt_tokens=1, colours=True)
    assert text.plain == "<1><2><3>"
    assert len({str(span.style) for span in text.spans}) == 3


def test_the_bars_of_a_sparkline_are_to_scale() -> None:
    assert sparkline([8.0, 4.0, 0.0]) == "█▄ "
    assert sparkline([]) == ""


@pytest.mark.parametrize(
    ("adapter", "given", "text"),
    [
        (small.WIKI, " = ", small.HELD_TEXT.read_text()[3:1500]),
        (small.E2E, "name[Aldhaven], eatType[pub], area[riverside] ->", " Aldhaven is a pub in the riverside area."),
    ],
    ids=["wiki", "e2e"],
)
def test_an_adapter_of_the_tests_beats_the_base_on_text_of_its_kind(adapter: Path, given: str, text: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(small.BASE, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(small.BASE)
    tokens = tokenizer(given + text, return_tensors="pt").input_ids
    labels = tokens.clone()
    labels[:, : len(tokenizer(given).input_ids)] = -100
    without, _, tuned = (
        method.model(input_ids=tokens, labels=labels).loss for method in methods(base, {"adapter": adapter}, {})
    )
    assert tuned < without - 1
