"""docs/extending.md: its examples run unchanged and are right, and its tables name everything that is shipped."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from chunkwise_lora import ChunkWiseConfig, ChunkWiseModel, RankLadder, RuntimeScheduler
from chunkwise_lora.backends import Columns, backend_on, registry
from chunkwise_lora.engines.base import Engine, entropies_of
from chunkwise_lora.ladder import LadderModule
from chunkwise_lora.method.complexity import TokenComplexityEstimator
from chunkwise_lora.method.config import ComplexityConfig
from chunkwise_lora.method.kv_policies import KV_POLICY_REGISTRY
from chunkwise_lora.method.segments import PassPlan, Segment
from chunkwise_lora.method.signals import SIGNAL_REGISTRY
from models import VOCABULARY, adapter, build, greedy, prompts

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
SHIPPED = SIGNAL_REGISTRY.names + KV_POLICY_REGISTRY.names


@pytest.fixture
def page(capsys: pytest.CaptureFixture[str]) -> Iterator[dict[str, Any]]:
    """The names that the examples of the page define when they run."""
    names: dict[str, Any] = {
        "__name__": "extending",
        "model": build("llama"),
        "ladder": adapter("llama"),
        "inputs": prompts((600,)),
    }
    for block in BLOCKS:
        exec(compile(block, "docs/extending.md", "exec", dont_inherit=True), names)
    yield names
    SIGNAL_REGISTRY.remove("rare_tokens")
    KV_POLICY_REGISTRY.remove("keep_large_values")
    del registry._entries["plain"]


def test_the_examples_register_a_signal_and_a_policy_that_work(page: dict[str, Any]) -> None:
    config = ComplexityConfig(entropy=0, novelty=0, attention=0, position=0, signals={"rare_tokens": 1})
    assert TokenComplexityEstimator(config, VOCABULARY).update([1, VOCABULARY - 1], [None] * 2) == [0, 1]
    trace = page["chunkwise"].trace
    assert {scheduled.kv.evict for scheduled in trace.sequences[0].chunks if scheduled.kv} <= {
        "keep_large_values",
        "snapkv",
        None,
    }
    assert trace.kv_bytes < trace.kv_bytes_full
    assert trace.kv_notes == ()
    assert ChunkWiseConfig.from_json(page["config"].to_json()) == page["config"]


def test_the_backend_of_the_page_is_chosen_and_computes_what_the_others_do(page: dict[str, Any]) -> None:
    cpu, generator = torch.device("cpu"), np.random.default_rng(0)
    assert type(backend_on(cpu, torch.float32)) is page["PlainBackend"]
    assert backend_on(cpu, torch.bfloat16).name != "plain"
    weights = generator.random((3, 3)).astype(np.float32)
    segments = (Segment("a", 2, weights, np.array([0, 2, 5])), Segment("b", 1, None, np.array([1, 3])))
    columns, x, y = [Columns(0, 6), Columns(8, 4)], torch.randn(6, 10), torch.randn(6, 12)
    outputs = []
    for name in ("plain", "torch"):
        backend = backend_on(cpu, torch.float32, name=name)
        layer = backend.add_layer("layer", 10, columns)
        for seed, key in enumerate("ab"):
            torch.manual_seed(seed)
            module = LadderModule(torch.randn(6, 4), torch.randn(4, 10), torch.ones(4), (0, 2, 4))
            backend.load(key, {"layer": [module, None]})
        prepared = backend.prepare(PassPlan(segments, 1, 6))
        backend.unload("a")
        outputs.append(backend.apply(layer, y.clone(), x, prepared))
    assert torch.allclose(*outputs, atol=1e-5)
    assert not torch.allclose(outputs[0], y)


def test_a_model_runs_on_the_backend_of_the_page(page: dict[str, Any]) -> None:
    config, inputs = ChunkWiseConfig.preset("balanced"), prompts()
    logits = greedy(ChunkWiseModel(build("llama"), adapter("llama"), config), inputs, 6)[1]
    del registry._entries["plain"]
    expected = greedy(ChunkWiseModel(build("llama"), adapter("llama"), config), inputs, 6)[1]
    registry.register_backend("plain", lambda: page["PlainBackend"])
    assert torch.allclose(logits, expected, atol=1e-4)


def test_the_engine_of_the_page_follows_the_plan_of_each_sequence(page: dict[str, Any]) -> None:
    embedding, layer = torch.randn(50, 12), nn.Linear(12, 12)
    modules = [LadderModule(torch.randn(12, 4), torch.randn(4, 12), torch.ones(4), (0, 1, 2, 3, 4)) for _ in "ab"]
    ladders = {name: RankLadder({"layer": module}) for name, module in zip("ab", modules, strict=True)}
    engine = page["OneLayerEngine"](embedding, layer, ladders)
    assert isinstance(engine, Engine)
    config = ChunkWiseConfig.preset("balanced")
    assert engine.kv_left_undone(config.kv_cache) and not engine.kv_left_undone(
        ChunkWiseConfig.preset("lossless").kv_cache
    )
    texts = {name: torch.randint(0, 50, (20,)).tolist() for name in "ab"}
    cuts, logits = {"a": [8, 9, 10, 20], "b": [5, 6, 7, 20]}, dict[str, list[Tensor]](a=[], b=[])
    for name in "ab":
        engine.open(name, name, texts[name][: cuts[name][0]], config)
    for turn in range(4):
        starts = {name: cuts[name][turn - 1] if turn else 0 for name in "ab"}
        tokens = {name: texts[name][starts[name] : cuts[name][turn]] for name in "ab"}
        for name, after in engine.step(tokens, starts).items():
            logits[name].append(after)
    for name, module in zip("ab", modules, strict=True):
        scheduler, entropies = RuntimeScheduler(config, ladders[name].rung_ranks, 50), [None] * 20
        known = dict(zip(cuts[name][:-1], [entropies_of(one[None]).item() for one in logits[name]], strict=False))
        weights = scheduler.step(texts[name], [known.get(place, none) for place, none in enumerate(entropies)]).weights
        gates = torch.from_numpy(weights) @ module.gate_table()
        x = embedding[texts[name]]
        with torch.no_grad():
            expected = (x + layer(x) + (x @ module.down.T * gates) @ module.up.T) @ embedding.T
        for after, cut in zip(logits[name], cuts[name], strict=True):
            assert torch.allclose(after, expected[cut - 1], atol=1e-3)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_signal_and_policy_is_in_the_tables(name: str) -> None:
    assert f"\n| `{name}` |" in PAGE


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_signal_and_policy_names_its_source(name: str) -> None:
    registry = SIGNAL_REGISTRY if name in SIGNAL_REGISTRY.names else KV_POLICY_REGISTRY
    assert re.search(r"arXiv\s+\d{4}\.\d{5}", registry.factory(name).__doc__ or "")
