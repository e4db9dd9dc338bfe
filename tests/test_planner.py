"""The plug-in's parts that know nothing of vLLM: plans of many requests, what a layer adds, which config applies."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from chunkwise_lora.backends.segments import FEW_TOKENS, Part
from chunkwise_lora.engines.vllm.planner import AdapterPlan, PlannedRequest, Planner, Scheduled, Tally
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from chunkwise_lora import ChunkWiseConfig, ConfigError, RuntimeScheduler
from chunkwise_lora.backends import base as addition
from chunkwise_lora.backends import native
from chunkwise_lora.backends.base import Columns, PartAdditions
from chunkwise_lora.engines.vllm import settings
from chunkwise_lora.ladder import LadderModule

VOCABULARY = 50
ADAPTER = AdapterPlan("a", np.arange(9.0))
BALANCED, LOSSLESS = ChunkWiseConfig.preset("balanced"), ChunkWiseConfig.preset("lossless")

tokens_of = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=60)


def planned(config: ChunkWiseConfig, tokens: list[int], entropies: list[float | None]) -> np.ndarray:
    return RuntimeScheduler(config, ADAPTER.rung_ranks.tolist(), VOCABULARY).step(tokens, entropies).weights


def request(prompt: list[int], config: ChunkWiseConfig = BALANCED) -> PlannedRequest:
    return PlannedRequest("1", ADAPTER, config, prompt, VOCABULARY)


@given(tokens_of, st.lists(st.integers(1, 9), min_size=1), st.integers(0, 60), st.data())
def test_a_plan_depends_on_no_cut_cache_hit_or_preemption(
    tokens: list[int], cuts: list[int], prompt: int, data: st.DataObject
) -> None:
    prompt = min(prompt, len(tokens) - 1)
    entropies = [None] * prompt + [float(i % 4) for i in range(len(tokens) - prompt)]
    one = request(tokens[:prompt])
    for position in range(prompt, len(tokens)):
        one.learn(position, entropies[position] or 0.0)
    expected = planned(BALANCED, tokens, entropies)
    start = data.draw(st.integers(0, prompt), "found in the cache")
    for cut in [*cuts, len(tokens)]:
        end = min(start + cut, len(tokens))
        assert np.array_equal(one.plan(start, tokens[start:end]), expected[start:end])
        start = data.draw(st.integers(0, end), "preempted") if data.draw(st.booleans(), "is preempted") else end
    assert np.array_equal(one.plan(0, tokens), expected)


@given(tokens_of, tokens_of, st.integers(0, 60))
def test_a_token_sampled_anew_is_planned_anew(tokens: list[int], others: list[int], keep: int) -> None:
    keep = min(keep, len(tokens))
    one = request(tokens[:keep])
    one.plan(0, tokens)
    changed = tokens[:keep] + others
    assert np.array_equal(one.plan(0, changed), planned(BALANCED, changed, [None] * len(changed)))


def test_a_prompts_entropies_count_not() -> None:
    one = request([1, 2, 3])
    for position in range(6):
        one.learn(position, 3.0)
    tokens = [1, 2, 3, 4, 5, 6]
    assert np.array_equal(one.plan(0, tokens), planned(BALANCED, tokens, [None] * 3 + [3.0] * 3))


def no_ids() -> list[int]:
    raise AssertionError("no plan of this pass depends on its tokens")


def test_constant_plans_ask_for_no_tokens_and_are_kept() -> None:
    seen: list[tuple[str, Tally]] = []
    planner = Planner(VOCABULARY, lambda name, tally: seen.append((name, tally)))
    planner.open("x", "1", ADAPTER, LOSSLESS, [1])
    planner.open("y", "2", AdapterPlan("b", np.arange(5.0)), ChunkWiseConfig.uniform(0.5), [1])
    batch = [Scheduled("base", 0, 2), Scheduled("x", 0, 1), Scheduled("y", 0, 3)]
    first = planner.plan(batch, no_ids)
    assert [(part.adapter, part.rung, part.weights) for part in first] == [("1", 8, None), ("2", 2, None)]
    assert [part.rows.tolist() for part in first] == [[2], [3, 4, 5]]
    assert planner.plan(batch, no_ids) is first
    assert [(name, tally.rank, tally.tokens.sum()) for name, tally in seen] == [("a", 8, 1), ("b", 6, 3)] * 2


def test_entropies_reach_the_next_token_only() -> None:
    planner = Planner(VOCABULARY)
    planner.open("x", "1", ADAPTER, BALANCED, [1, 2])
    planner.open("y", "1", ADAPTER, LOSSLESS, [1])
    planner.plan([Scheduled("x", 0, 2), Scheduled("y", 0, 1)], lambda: [1, 2, 1])
    logits = torch.zeros(2, VOCABULARY)
    planner.sampled(["x", "y"], [2, 1], logits)
    (part,) = planner.plan([Scheduled("x", 2, 1), Scheduled("y", 1, 1)], lambda: [7, 7])
    expected = planned(BALANCED, [1, 2, 7], [None, None, float(np.log(VOCABULARY))])
    assert torch.equal(part.weights[0], torch.from_numpy(expected[2]))
    planner.forget(["x", "y", "unknown"])
    assert len(planner) == 0


def test_tokens_without_a_rung_count_on_the_lowest() -> None:
    weights = np.array([[0, 0, 0], [0.5, 0.5, 0], [0, 0, 1]], np.float32)
    assert Tally.of(weights, np.array([0.0, 2.0, 4.0])).tokens.tolist() == [1, 1, 1]


def test_a_scale_does_not_change_the_rank_that_a_token_is_said_to_have() -> None:
    weights = np.array([[0, 0, 0], [0.5, 0.5, 0], [0, 0, 1]], np.float32)
    for scale in (0.5, 1, 2):
        assert Tally.of(scale * weights, np.array([0.0, 2.0, 4.0])).rank == 1 + 4


def test_a_request_whose_adapter_is_replaced_is_planned_anew() -> None:
    planner = Planner(VOCABULARY)
    other = AdapterPlan("a", np.arange(5.0))
    planner.open("x", "1", ADAPTER, BALANCED, [1, 2])
    planner.plan([Scheduled("x", 0, 3)], lambda: [1, 2, 3])
    assert planner.follows("x", AdapterPlan("a", np.arange(9.0))) and not planner.follows("x", other)
    planner.open("x", "1", other, BALANCED, [1, 2], [3, 4])
    (part,) = planner.plan([Scheduled("x", 3, 1)], lambda: [4])
    expected = RuntimeScheduler(BALANCED, other.rung_ranks.tolist(), VOCABULARY).step([1, 2, 3, 4]).weights
    given = np.eye(5)[part.rung] if part.weights is None else part.weights[0].numpy()
    assert np.array_equal(given, expected[3])


# What a layer adds


def modules_of(
    shapes: list[tuple[int, int]], width_in: int, rungs: list[list[int]], seed: int = 0
) -> list[LadderModule]:
    generator = torch.Generator().manual_seed(seed)
    return [
        LadderModule(
            torch.randn(width_out, rank, generator=generator),
            torch.randn(rank, width_in, generator=generator),
            torch.ones(rank),
            tuple(ranks),
        )
        for (width_out, rank), ranks in zip(shapes, rungs, strict=True)
    ]


@pytest.mark.parametrize("tokens", [1, 5, FEW_TOKENS, FEW_TOKENS + 1])
@pytest.mark.parametrize("weighted", [False, True], ids=["one rung", "a weight per rung"])
@pytest.mark.parametrize("adapters", [0, 1, 3], ids=["all tokens", "some tokens", "several adapters"])
@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_adds_the_gate_form_of_each_module(
    monkeypatch: pytest.MonkeyPatch, tokens: int, weighted: bool, adapters: int, kernels: bool, dtype: torch.dtype
) -> None:
    if not kernels:
        monkeypatch.setattr(addition.native, "kernels", lambda dtype: None)
    elif native.kernels(dtype) is None:
        pytest.skip("no C compiler here")
    width_in = 12
    columns = [Columns(0, 8), Columns(8, 300), Columns(308, 2), Columns(310, 4)]
    additions = PartAdditions(torch.device("cpu"), dtype)
    additions.layer("layer", width_in, columns)
    x, y = torch.randn(tokens, width_in).to(dtype), torch.randn(tokens, 314).to(dtype)
    expected = y.float().clone()
    parts = [Part("not there", 0, None, torch.arange(tokens)[3::4])]
    for number in range(max(1, adapters)):
        q, k, v = modules_of([(8, 6), (300, 5), (4, 2)], width_in, [[0, 3, 6], [1, 1, 5], [0, 0, 2]], number)
        of_layer = [q, k, None, v]
        additions.put(str(number), {"layer": of_layer})
        rows = torch.arange(tokens)[number :: 4 if adapters else 1].clone()
        weights = torch.tensor([[0.0, 0.0, 1.0], [0.25, 0.75, 0.0], [0.0, 0.0, 0.0]])[torch.arange(len(rows)) % 3]
        given_weights = weights if weighted else torch.tensor([[0.0, 1.0, 0.0]]).expand(len(rows), 3)
        for module, where in zip(of_layer, columns, strict=True):
            if module is not None:
                gates = given_weights @ module.gate_table()
                down, up = module.down.to(dtype).float(), module.up.to(dtype).float()
                expected[rows, where.offset : where.offset + where.width] += (x[rows].float() @ down.T * gates) @ up.T
        if len(rows):
            top, rows_given = 2 if weighted else 1, rows if adapters else None
            parts.append(Part(str(number), top, weights if weighted else None, rows_given))
    additions.begin(tokens)
    additions.plan(parts)
    additions.add("layer", y, x)
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    assert torch.allclose(y.float(), expected, atol=tolerance, rtol=tolerance / 5)


@pytest.mark.parametrize("tokens", [2, FEW_TOKENS + 1])
def test_adapters_that_come_and_go_add_what_the_pass_says(tokens: int) -> None:
    modules = {name: modules_of([(8, 3)], 12, [[0, 3]], seed) for seed, name in enumerate("abc")}
    additions = PartAdditions(torch.device("cpu"), torch.float32)
    additions.layer("layer", 12, [Columns(0, 8)])
    x = torch.randn(tokens, 12)

    def added(*adapters: str) -> Tensor:
        rows = [torch.arange(tokens)[n :: len(adapters)].clone() for n in range(len(adapters))]
        additions.begin(tokens)
        additions.plan([Part(name, 1, None, of_adapter) for name, of_adapter in zip(adapters, rows, strict=True)])
        additions.add("layer", y := torch.zeros(tokens, 8), x)
        return y

    def product(name: str) -> Tensor:
        (module,) = modules[name]
        return x @ module.down.T @ module.up.T

    additions.put("1", {"layer": modules["a"]})
    additions.put("2", {"layer": modules["b"]})
    assert torch.allclose(added("1"), product("a"), atol=1e-4)
    assert torch.allclose(added("2", "1")[::2], product("b")[::2], atol=1e-4)
    additions.put("2", {"layer": modules["c"]})
    assert torch.allclose(added("2", "1")[::2], product("c")[::2], atol=1e-4)
    additions.drop("1")
    assert not added("2", "1")[1::2].any()
    additions.begin(tokens)
    additions.add("layer", y := torch.zeros(tokens, 8), x)
    assert not y.any(), "not planned yet"


@pytest.mark.parametrize("reason", ["a CPU", "no Triton", "switched off"])
def test_without_a_gpu_or_triton_layers_add_part_by_part(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    if reason == "switched off":
        monkeypatch.setenv("CHUNKWISE_TRITON", "0")
    else:
        monkeypatch.setitem(sys.modules, "chunkwise_lora.backends.triton.backend", None)
    device = torch.device("cpu" if reason == "a CPU" else "cuda")
    seen: list[str] = []
    monkeypatch.setattr(addition.logger, "warning", lambda message, *_: seen.append(message))
    assert isinstance(addition.additions_on(device, torch.float32, 8, 2), PartAdditions)
    assert len(seen) == (reason == "no Triton")


def test_on_a_gpu_layers_add_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("triton_addition")
    module.TritonAdditions = lambda *given: given
    monkeypatch.setitem(sys.modules, "chunkwise_lora.backends.triton.backend", module)
    given = torch.device("cuda"), torch.bfloat16, 8, 2
    assert addition.additions_on(*given) == given


# Which config


def test_a_request_says_before_the_server_and_the_server_before_the_ladder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHUNKWISE_PRESET", raising=False)
    assert settings.of_adapter(None, settings.of_server({})) == LOSSLESS
    policy = ChunkWiseConfig.uniform(0.25)
    assert settings.of_adapter(policy, settings.of_server({})) == ChunkWiseConfig.uniform(0.25)
    monkeypatch.setenv("CHUNKWISE_PRESET", "compact")
    assert settings.of_adapter(policy, settings.of_server({})) == ChunkWiseConfig.preset("compact")
    server = settings.of_server({"chunkwise": {"mean_rank": 0.5}})
    assert settings.of_adapter(policy, server) == ChunkWiseConfig.uniform(0.5)
    assert settings.of_request({"chunkwise_preset": "balanced", "other": 1}) == BALANCED
    assert settings.of_request({"other": 1}) is None


def test_a_server_may_give_all_knobs() -> None:
    config = ChunkWiseConfig.uniform(0.75)
    assert settings.of_server({"chunkwise": {"config": config.model_dump(mode="json")}}).chosen == config


@pytest.mark.parametrize(
    ("additional", "says"),
    [
        ({"chunkwise": {"preset": "fast"}}, r"--additional-config, 'chunkwise': Choice: preset = 'fast'"),
        ({"chunkwise": {"speed": 1}}, r"speed"),
        ({"chunkwise": {"preset": "compact", "mean_rank": 0.5}}, r"not several"),
        ({"chunkwise": 3}, r"--additional-config"),
    ],
)
def test_an_impossible_server_setting_names_its_place(additional: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        settings.of_server(additional)


def test_an_impossible_variable_names_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHUNKWISE_MEAN_RANK", "much")
    with pytest.raises(ConfigError, match="environment"):
        settings.of_server({})
