"""Every fast path equals the plain gate form `y_t = W x_t + up (g_t * (down x_t))`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from chunkwise_lora import ChunkWiseConfig, ChunkWiseModel, EngineError, RankLadder, RuntimeScheduler
from chunkwise_lora.backends import backend_on
from chunkwise_lora.engines.transformers import FastPaths
from chunkwise_lora.engines.transformers.context import PASS, ForwardPass, within
from chunkwise_lora.engines.transformers.layers import GatedLayer, PeftLayer
from chunkwise_lora.ladder import LadderModule
from chunkwise_lora.method import segments as grouping
from chunkwise_lora.method.config import (
    ChunkingConfig,
    CompositionConfig,
    KVCacheConfig,
    LevelKVPolicy,
    SelectionConfig,
)
from chunkwise_lora.method.segments import PassPlan, Segment, segments_of
from models import FAST, TYPICAL, adapter, build, greedy, linear_outputs_plus, prompts

OWNER = object()
GROUPING = {"never grouped": 1e9, "always grouped": -1e9}

CHANGING = ChunkWiseConfig(
    chunking=ChunkingConfig(min_length=2, max_length=5, thresholds=(0.5, 0.7), hysteresis=0.0, memory=2),
    selection=SelectionConfig(rank_shares=(0.0, 0.5, 1.0), scales=(1.0, 1.5, 0.75)),
    composition=CompositionConfig(window=2),
    kv_cache=KVCacheConfig(levels=(LevelKVPolicy(),) * 3),
)
"""A plan that changes often: short chunks, far-apart rungs, scales and cross-fades. The cache keeps everything."""


def gate_form(module: LadderModule, x: Tensor, weights: Tensor) -> Tensor:
    """The slow reference: what the adapter adds to the outputs of x (tokens, in) with weights (tokens, rungs).

    Returns:
        (tokens, out).
    """
    rows = []
    for x_t, p_t in zip(x, weights, strict=True):
        g_t = sum(p_t[rung] * (torch.arange(module.rank) < rank).to(x) for rung, rank in enumerate(module.ranks))
        rows.append(module.up.to(x) @ (g_t * (module.down.to(x) @ x_t)))
    return torch.stack(rows)


def random_module(generator: torch.Generator, inputs: int, outputs: int, ranks: Sequence[int]) -> LadderModule:
    rank = ranks[-1]
    up, down = torch.randn(outputs, rank, generator=generator), torch.randn(rank, inputs, generator=generator)
    return LadderModule(up, down, torch.arange(rank, 0, -1).float(), tuple(ranks))


@dataclass(frozen=True)
class Case:
    """A pass over a batch of sequences, each of which runs an adapter or the base model."""

    modules: dict[str, LadderModule]
    owners: list[str | None]
    weights: dict[str, np.ndarray]
    """By adapter: the weights over the rungs (tokens of its sequences, rungs)."""
    width: int
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    seed = draw(st.integers(0, 2**31))
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    names = draw(st.sampled_from([["a"], ["a", "b"]]))
    owners = draw(st.lists(st.sampled_from([*names, None]), min_size=1, max_size=4))
    width = draw(st.integers(1, 7))
    modules, weights = {}, {}
    for name in names:
        rungs = draw(st.integers(1, 5))
        ranks = sorted(draw(st.lists(st.integers(0, 9), min_size=rungs, max_size=rungs)))
        ranks[-1] = max(ranks[-1], 1)
        modules[name] = random_module(generator, 6, 5, ranks)
        tokens = owners.count(name) * width
        kind = draw(st.sampled_from(["one rung", "rung per token", "cross-fade", "off"]))
        plan = np.zeros((tokens, rungs), np.float32)
        if kind == "one rung":
            plan[:, draw(st.integers(0, rungs - 1))] = draw(st.sampled_from([1.0, 0.5]))
        elif kind != "off":
            for row in plan:
                first, second = rng.integers(rungs, size=2)
                u = rng.random() if kind == "cross-fade" else 1.0
                row[first] += u
                row[second] += (1 - u) * 1.5
        weights[name] = plan
    return Case(modules, owners, weights, width, seed)


def gated_layer(name: str, linear: nn.Linear, modules: dict[str, LadderModule], fast: FastPaths) -> GatedLayer:
    """A gated layer with the adapters of `modules`."""
    gated = GatedLayer(OWNER, name, PeftLayer(OWNER, linear, RLock()), linear)
    backend = backend_on(torch.device("cpu"), torch.float32, name=None if fast.kernels else "torch")
    gated.use(backend, (linear.out_features, linear.in_features))
    for adapter_name, module in modules.items():
        backend.load(adapter_name, {name: [module]})
        gated.keys.add(adapter_name)
    return gated


def a_pass(
    segments: Sequence[Segment], batch: int, width: int, members: Sequence[str] = ("a",), is_constant: bool = False
) -> ForwardPass:
    """A pass with these segments, whose adapters have two rungs."""
    plan = PassPlan(tuple(segments), batch, width)
    return ForwardPass(OWNER, plan, dict.fromkeys(members), dict.fromkeys(members, 1), is_constant, is_constant, batch)


@pytest.mark.parametrize("fast", FAST)
@pytest.mark.parametrize("gain", GROUPING.values(), ids=GROUPING)
@given(case=cases())
def test_random_plans_equal_the_gate_form(gain: float, fast: str, case: Case) -> None:
    generator = torch.Generator().manual_seed(case.seed)
    linear = nn.Linear(6, 5)
    x = torch.randn(len(case.owners), case.width, 6, generator=generator)
    expected = linear(x).reshape(-1, 5)
    segments: list[Segment] = []
    gated = gated_layer("linear", linear, case.modules, FAST[fast])
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(grouping, "GROUPING_GAIN", gain)
        for name, module in case.modules.items():
            members = np.array([row for row, owner in enumerate(case.owners) if owner == name])
            if not len(members):
                continue
            rows = (members[:, None] * case.width + np.arange(case.width)).ravel()
            everyone = len(members) == len(case.owners)
            ranks, weights = np.array(module.ranks, float), case.weights[name]
            segments += segments_of(name, weights, ranks, None if everyone else rows)
            addition = gate_form(module, x.reshape(-1, 6)[rows], torch.from_numpy(weights))
            expected = expected.index_add(0, torch.from_numpy(rows), addition)
        with within(PASS, a_pass(segments, len(case.owners), case.width)):
            assert torch.allclose(gated(x).reshape(-1, 5), expected, atol=1e-4)


@contextmanager
def reference_forward(
    model: Any, ladders: dict[str, RankLadder], names: list[str], plans: list[np.ndarray], width: int
) -> Iterator[None]:
    """Add the gate form to the model by hooks.

    The plan of a sequence, `plans[row]` (tokens, rungs), ends at the last column. Padding gets nothing.
    """

    def addition(name: str, x: Tensor) -> Tensor:
        added = torch.zeros(*x.shape[:2], model.get_submodule(name).weight.numel() // x.shape[2])
        for row, (adapter_name, plan) in enumerate(zip(names, plans, strict=True)):
            module = ladders[adapter_name].modules.get(name) if adapter_name in ladders else None
            if module is not None:
                seen = min(x.shape[1], len(plan))
                added[row, x.shape[1] - seen :] = gate_form(module, x[row, -seen:], torch.from_numpy(plan[-seen:]))
        return added

    every = dict.fromkeys(name for ladder in ladders.values() for name in ladder.modules)
    with linear_outputs_plus(model, addition, every):
        yield


def generation_by_gate_form(
    architecture: str, ladders: dict[str, RankLadder], names: list[str], inputs: dict[str, Tensor], new_tokens: int
) -> tuple[Tensor, Tensor]:
    """Greedy generation by the paper's definition: without a cache, with the gates of all tokens in every pass."""
    model = build(architecture)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    schedulers = [
        RuntimeScheduler(CHANGING, ladders[name].rung_ranks if name in ladders else [0.0], model.config.vocab_size)
        for name in names
    ]
    plans = [
        scheduler.step(row[real.bool()].tolist()).weights
        for scheduler, row, real in zip(schedulers, ids, mask, strict=True)
    ]
    logits = []
    for _ in range(new_tokens):
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        with torch.no_grad(), reference_forward(model, ladders, names, plans, ids.shape[1]):
            logits.append(model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1])
        tokens = logits[-1].argmax(-1)
        entropies = torch.distributions.Categorical(logits=logits[-1]).entropy()
        ids = torch.cat([ids, tokens[:, None]], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        plans = [
            np.concatenate([plan, scheduler.step([token], [entropy]).weights])
            for plan, scheduler, token, entropy in zip(
                plans, schedulers, tokens.tolist(), entropies.tolist(), strict=True
            )
        ]
    return ids[:, -new_tokens:], torch.stack(logits, dim=1)


def uneven(ladder: RankLadder, seed: int) -> RankLadder:
    """The ladder with other rungs, on which every module has its own ranks."""
    rng = np.random.default_rng(seed)
    return ladder.with_ranks(
        {
            name: [0, *sorted(rng.integers(0, module.rank + 1, size=3).tolist()), module.rank]
            for name, module in ladder.modules.items()
        }
    )


@pytest.mark.parametrize("gain", GROUPING.values(), ids=GROUPING)
@pytest.mark.parametrize("names", [["a", "a", "a"], ["b", "__base__", "a"]], ids=["one adapter", "mixed batch"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_generation_equals_the_gate_form_without_any_cache(
    monkeypatch: pytest.MonkeyPatch, architecture: str, names: list[str], gain: float
) -> None:
    monkeypatch.setattr(grouping, "GROUPING_GAIN", gain)
    ladders = {
        "a": uneven(RankLadder.from_peft(adapter(architecture)), 5),
        "b": RankLadder.from_peft(adapter(architecture, seed=2)),
    }
    model = ChunkWiseModel(build(architecture), ladders, CHANGING)
    tokens, logits = greedy(model, prompts(), 20, adapter_names=names)
    expected_tokens, expected_logits = generation_by_gate_form(architecture, ladders, names, prompts(), 20)
    assert torch.equal(tokens, expected_tokens)
    assert (logits - expected_logits).abs().max() < 1e-3
    assert model.trace is not None
    adapted = [sequence for sequence in model.trace.sequences if sequence.adapter]
    assert all(len(sequence.chunks) > 3 and len(set(sequence.ranks)) > 1 for sequence in adapted)
    assert len({rank for sequence in adapted for rank in sequence.ranks}) > 3


@pytest.mark.parametrize("architecture", TYPICAL)
def test_a_changing_plan_with_a_cache_equals_one_pass_over_the_whole_text(architecture: str) -> None:
    model = ChunkWiseModel(build(architecture), adapter(architecture), CHANGING)
    cached = greedy(model, prompts(), 24)
    whole = greedy(model, prompts(), 24, use_cache=False)
    assert torch.equal(cached[0], whole[0])
    assert (cached[1] - whole[1]).abs().max() < 1e-3


@pytest.mark.parametrize("kind", ["lm_head", "saved_head", "saved_embedding", "one_layer", "wide"])
def test_a_changing_plan_runs_every_kind_of_adapter(kind: str) -> None:
    ladders = {"a": RankLadder.from_peft(adapter("llama", kind)), "b": RankLadder.from_peft(adapter("llama"))}
    model = ChunkWiseModel(build("llama"), ladders, CHANGING)
    cached = greedy(model, prompts(), 12, adapter_names=["a", "b", "a"])
    whole = greedy(model, prompts(), 12, adapter_names=["a", "b", "a"], use_cache=False)
    assert torch.equal(cached[0], whole[0])
    assert (cached[1] - whole[1]).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("beams", "options"), [(1, {"use_cache": False}), (1, {"prefill_chunk_size": 5}), (3, {"prefill_chunk_size": 5})]
)
def test_a_changing_plan_does_not_depend_on_the_split_into_passes(beams: int, options: dict[str, Any]) -> None:
    model = ChunkWiseModel(build("llama"), adapter("llama"), CHANGING)
    inputs = prompts((12, 12))
    whole = model.generate(**inputs, max_new_tokens=16, do_sample=False, num_beams=beams)
    trace = model.trace
    cut = model.generate(**inputs, max_new_tokens=16, do_sample=False, num_beams=beams, **options)
    assert torch.equal(cut, whole)
    assert trace is not None and model.trace is not None
    assert [sequence.tokens for sequence in model.trace.sequences] == [sequence.tokens for sequence in trace.sequences]
    for ours, expected in zip(model.trace.sequences, trace.sequences, strict=True):
        assert ours.ranks == pytest.approx(expected.ranks)


def test_beams_of_one_batch_keep_the_adapter_of_their_prompt() -> None:
    folders = {"a": adapter("llama"), "b": adapter("llama", seed=2)}
    model = ChunkWiseModel(build("llama"), folders, CHANGING)
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 16, "do_sample": False}
    ids = prompts((7, 7))["input_ids"]
    names = ["b", "a"]
    together = model.generate(ids, adapter_names=names, **options)
    for row, name in enumerate(names):
        alone = model.generate(ids[row : row + 1], adapter_names=name, **options)
        assert torch.equal(together[2 * row : 2 * row + 2], alone)


@pytest.mark.parametrize(
    ("name", "members", "counts"), [("expert", ("a",), (5, 4, 7)), ("experts.0", ("a", "__base__"), (5, 4, 6, 7))]
)
def test_a_module_that_sees_unknown_tokens_refuses_gates_per_token(
    name: str, members: tuple[str, ...], counts: tuple[int, ...]
) -> None:
    module = random_module(torch.Generator().manual_seed(0), 6, 5, (0, 4))
    gated = gated_layer(name, nn.Linear(6, 5), {"a": module}, FastPaths())
    plan = np.array([[1, 0], [0, 1]] * 3, np.float32)
    with within(PASS, a_pass(segments_of("a", plan, np.array([0.0, 4.0]), None), 2, 3, members)):
        for tokens in counts:
            with pytest.raises(EngineError, match=name):
                gated(torch.randn(tokens, 6))


def test_a_routed_expert_runs_at_full_rank_where_tokens_have_their_own_gates() -> None:
    module = random_module(torch.Generator().manual_seed(0), 6, 5, (0, 4))
    linear = nn.Linear(6, 5)
    gated = gated_layer("experts.0", linear, {"a": module}, FastPaths())
    plan = np.array([[1, 0], [0, 1]] * 3, np.float32)
    with torch.no_grad(), within(PASS, a_pass(segments_of("a", plan, np.array([0.0, 4.0]), None), 2, 3)):
        for tokens in (1, 6, 40):
            x = torch.randn(tokens, 6)
            assert torch.allclose(gated(x), linear(x) + x @ module.down.T @ module.up.T, atol=1e-4)


def test_a_module_that_sees_routed_tokens_runs_if_all_tokens_have_the_same_gates() -> None:
    module = random_module(torch.Generator().manual_seed(0), 6, 5, (0, 4))
    linear = nn.Linear(6, 5)
    gated = gated_layer("experts.0", linear, {"a": module}, FastPaths())
    with torch.no_grad(), within(PASS, a_pass([Segment("a", 1)], 2, 3, is_constant=True)):
        for tokens in (1, 6, 40):
            x = torch.randn(tokens, 6)
            assert torch.allclose(gated(x), linear(x) + x @ module.down.T @ module.up.T, atol=1e-4)


def test_rank_zero_runs_the_base_and_scale_one_half_adds_half() -> None:
    def logits(share: float, scale: float) -> Tensor:
        config = ChunkWiseConfig.preset("lossless").model_copy(
            update={"selection": SelectionConfig(rank_shares=(share,), scales=(scale,))}
        )
        ladder = RankLadder.from_peft(adapter("llama", "lm_head"))
        head_only = RankLadder({"lm_head": ladder.modules["lm_head"]})
        return ChunkWiseModel(build("llama"), head_only, config)(**prompts((9,))).logits

    base = build("llama")(**prompts((9,))).logits
    assert torch.equal(logits(0.0, 1.0), base)
    assert torch.equal(logits(1.0, 0.0), base)
    assert torch.allclose(logits(1.0, 0.5) - base, (logits(1.0, 1.0) - base) / 2, atol=1e-5)
