"""Plans stay right in vLLM's CUDA graphs. A CPU has none, so a stand-in freezes what a graph freezes.

vLLM pads, dispatches and captures as on a GPU. At a capture the stand-in notes what each layer launches. At a replay
exactly these launches run again, whatever Python would decide now.
"""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from chunkwise_lora import EngineError
from chunkwise_lora.backends import Columns, Limits
from chunkwise_lora.backends.torch_products import TorchBackend
from chunkwise_lora.engines.requested_config import KEY
from chunkwise_lora.engines.vllm import frontend, manager, settings
from chunkwise_lora.engines.vllm import graphs as graph_passes
from chunkwise_lora.engines.vllm.graphs import GraphPass
from chunkwise_lora.engines.vllm.layers import EmbeddingAdapters, LayerAdapters
from chunkwise_lora.engines.vllm.settings import ServerSettings
from chunkwise_lora.ladder.peft_files import CONFIG_NAME
from chunkwise_lora.ladder.rank_ladder import RUNGS
from chunkwise_lora.method.segments import PassPlan, Segment
from conftest import E2E, PROMPTS, WIKI, Engine

pytest.importorskip("triton", reason="Triton is not installed")

import gpu_stand_in
from chunkwise_lora.backends.triton.backend import TritonBackend
from chunkwise_lora.backends.triton.table import AdapterTable

SIZES = [1, 2, 4, 8]
TOKENS = 8
SHORT = ["The king", "name[The", "He", "= Kar"]
"""Prompts of few tokens, so that some passes with prompts run as graphs, too."""


class Graphs:
    """Stands for vLLM's `CUDAGraphWrapper` around a model."""

    def __init__(self, model: Any, running: GraphPass) -> None:
        self.model, self.running = model, running
        self.launches: dict[Any, dict[str, list[Any]]] = {}
        """By graph, and by name of the layer: the passes of the backend that it launches."""
        self.counts: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from vllm.config import CUDAGraphMode
        from vllm.forward_context import get_forward_context

        context = get_forward_context()
        if context.cudagraph_runtime_mode == CUDAGraphMode.NONE:
            self.counts["eager"] += 1
            return self.model(*arguments, **options)
        graph, backend = context.batch_descriptor, self.running.backend
        is_captured, launches = graph in self.launches, self.launches.setdefault(graph, {})
        self.counts["replayed with adapters" if graph.has_lora else "replayed"] += is_captured
        apply = backend.apply

        def note(layer: Any, y: Tensor, x: Tensor, prepared: Any) -> Tensor:
            launches.setdefault(layer.name, []).append(prepared)
            return apply(layer, y, x, prepared)

        def launch(adapters: LayerAdapters, y: Tensor, x: Tensor) -> None:
            for prepared in launches.get(adapters.layer.name, ()):
                apply(adapters.layer, y, x, prepared)

        with pytest.MonkeyPatch.context() as patch:
            if is_captured:
                patch.setattr(LayerAdapters, "add", launch)
                patch.setattr(EmbeddingAdapters, "add", lambda *_: None)
            else:
                patch.setattr(backend, "apply", note)
            return self.model(*arguments, **options)


@dataclass(frozen=True)
class Batch:
    """Requests that run together."""

    prompts: list[str]
    adapters: list[str | Path | None]
    extra: dict[str, Any]

    def run(self, engine: Engine) -> list[list[int]]:
        """The new tokens of each request."""
        for number, (prompt, adapter) in enumerate(zip(self.prompts, self.adapters, strict=True)):
            engine.add(str(number), prompt, adapter, TOKENS, **(self.extra if adapter else {}))
        found = engine.run()
        return [found[str(number)] for number in range(len(self.prompts))]


def changed(folder: Path, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Path:
    """An adapter with factors A and B made of those of `wiki`."""
    folder.mkdir()
    tensors, config = load_file(f"{WIKI}/adapter_model.safetensors"), json.loads(Path(WIKI, CONFIG_NAME).read_text())
    rank, scale = config["r"], config["lora_alpha"] / config["r"]
    for name in [name for name in tensors if "lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        tensors[name], tensors[other] = (factor.contiguous() for factor in change(tensors[name], tensors[other]))
        rank = len(tensors[name])
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / CONFIG_NAME).write_text(json.dumps({**config, "r": rank, "lora_alpha": scale * rank}))
    return folder


@pytest.fixture(scope="module")
def batches(with_embedding: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Batch]:
    folder, balanced = tmp_path_factory.mktemp("adapters"), {"chunkwise_preset": "balanced"}
    low = changed(folder / "low", lambda a, b: (a[:3], 4 * b[:, :3]))
    high = changed(folder / "high", lambda a, b: (torch.cat([a, a.flip(1)]), torch.cat([b, b], dim=1)))
    return {
        "mixed": Batch(SHORT[:3], [WIKI, E2E, None], balanced),
        "long prompts": Batch(PROMPTS, [WIKI, None, E2E, WIKI], balanced),
        "one": Batch(SHORT[:1], [E2E], {}),
        "base": Batch(SHORT, [None] * 4, {}),
        "other ranks": Batch(SHORT, [low, WIKI, low, None], {"chunkwise_mean_rank": 0.5}),
        "embedding": Batch(SHORT[:3], [with_embedding, WIKI, None], {}),
        "high": Batch(SHORT[:3], [high, WIKI, None], {}),
    }


@pytest.fixture(scope="module")
def expected(
    new_engine: Callable[..., Engine], batches: dict[str, Batch], singles: list[Batch]
) -> dict[str, list[list[int]]]:
    """What an engine without graphs generates for each batch."""
    engine = new_engine()
    found = {name: batch.run(engine) for name, batch in batches.items()}
    found["alone"] = [single.run(engine)[0] for single in singles]
    base = Batch(SHORT, [None] * 4, {}).run(engine)
    for name in ("mixed", "one", "other ranks", "embedding", "high"):
        assert any(tokens != plain for tokens, plain in zip(found[name], base, strict=False))
    return found


@pytest.fixture(scope="module")
def singles(batches: dict[str, Batch]) -> list[Batch]:
    """Requests of many kinds."""
    chance, low = random.Random(0), batches["other ranks"].adapters[0]
    extra = [{}, {"chunkwise_preset": "balanced"}, {"chunkwise_preset": "compact"}, {"chunkwise_mean_rank": 0.25}]
    return [
        Batch([chance.choice(PROMPTS + SHORT)], [chance.choice([WIKI, E2E, low, None])], chance.choice(extra))
        for _ in range(30)
    ]


@pytest.fixture(scope="module")
def graphed(expected: dict[str, list[list[int]]], new_engine: Callable[..., Engine]) -> Iterator[tuple[Engine, Graphs]]:
    """An engine that has captured its graphs."""
    from vllm.config import CUDAGraphMode, VllmConfig

    def keep(config: VllmConfig, server: ServerSettings) -> bool:
        config.compilation_config.cudagraph_capture_sizes = SIZES
        config.compilation_config.max_cudagraph_capture_size = SIZES[-1]
        config.compilation_config.cudagraph_num_of_warmups = 1
        return server.cuda_graphs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdapterTable, "add", gpu_stand_in.add)
        with pytest.MonkeyPatch.context() as at_start:
            at_start.setattr(frontend, "_keeps_graphs", keep)
            at_start.setattr(manager, "backend_on", TritonBackend)
            at_start.setenv("VLLM_CPU_CI_ENV", "1")  # the model is traced, but not compiled for real
            engine = new_engine(additional_config={KEY: {"cuda_graphs": True}}, max_lora_rank=16, enforce_eager=False)
        runner = engine.runner
        graphs = runner.model = Graphs(runner.model, runner.chunkwise._manager.ladders.running)
        runner.cudagraph_dispatcher.initialize_cudagraph_keys(CUDAGraphMode.FULL_AND_PIECEWISE)
        for mode, descriptors in runner.cudagraph_dispatcher.get_capture_descs():
            runner._capture_cudagraphs(descriptors, mode)
        assert len(graphs.launches) == 4 * len(SIZES), "whole and in pieces, with and without adapters"
        yield engine, graphs


@pytest.mark.parametrize("name", ["mixed", "long prompts", "one", "base", "other ranks"])
def test_replays_follow_the_plan_of_each_pass(
    name: str, batches: dict[str, Batch], expected: dict[str, list[list[int]]], graphed: tuple[Engine, Graphs]
) -> None:
    engine, graphs = graphed
    graphs.counts.clear()
    assert batches[name].run(engine) == expected[name]
    assert graphs.counts["replayed" if name == "base" else "replayed with adapters"] >= TOKENS - 1
    assert graphs.counts["eager"] <= 1, "the prompts"


def test_requests_that_come_and_go_get_what_they_get_alone(
    singles: list[Batch], expected: dict[str, list[list[int]]], graphed: tuple[Engine, Graphs]
) -> None:
    engine, graphs = graphed
    graphs.counts.clear()
    chance, found = random.Random(1), dict[str, list[int]]()
    for number, single in enumerate(singles):
        (prompt,), (adapter,) = single.prompts, single.adapters
        engine.add(str(number), prompt, adapter, TOKENS, **(single.extra if adapter else {}))
        for _ in range(chance.randrange(4)):
            found |= engine.step()
    found |= engine.run()
    assert [found[str(number)] for number in range(len(singles))] == expected["alone"]
    assert graphs.counts["replayed with adapters"] > graphs.counts["eager"] > 0


def test_an_adapter_is_replaced_under_its_graphs(
    batches: dict[str, Batch], expected: dict[str, list[list[int]]], graphed: tuple[Engine, Graphs], tmp_path: Path
) -> None:
    from vllm.lora.request import LoRARequest

    engine, graphs = graphed
    folder = tmp_path / "adapter"
    for number, (adapter, tokens) in enumerate([(WIKI, None), (E2E, expected["one"][0]), (WIKI, None)]):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(adapter, folder)
        graphs.counts.clear()
        request = LoRARequest("replaced", 100, str(folder), load_inplace=True)
        engine.llm.llm_engine.add_request(str(number), SHORT[0], engine.params(TOKENS), lora_request=request)
        (found,) = engine.run().values()
        assert found == (tokens or Batch(SHORT[:1], [adapter], {}).run(engine)[0])
        assert graphs.counts["replayed with adapters"] >= TOKENS - 1


def test_an_adapter_gets_smaller_under_its_graphs(graphed: tuple[Engine, Graphs]) -> None:
    """As a budget for adapters makes it."""
    engine, graphs = graphed
    whole, low = (Batch(SHORT[1:2], [E2E], extra) for extra in ({}, {"chunkwise_mean_rank": 1 / RUNGS}))
    of_whole, of_low = whole.run(engine), low.run(engine)
    assert of_whole != of_low
    worker, key = engine.runner.chunkwise._manager, engine.ids[E2E]
    modules = worker.loaded(key).modules
    for part, tokens in ((worker.loaded(key).up_to(1), of_low), (modules, of_whole)):
        worker.ladders.backend.load(str(key), part)
        graphs.counts.clear()
        assert whole.run(engine) == tokens
        assert graphs.counts["replayed with adapters"] >= TOKENS - 1


def test_passes_of_vllm_itself_do_not_disturb_others(
    batches: dict[str, Batch], expected: dict[str, list[list[int]]], graphed: tuple[Engine, Graphs]
) -> None:
    """Between the passes of requests, as a rank without requests runs them in data parallelism."""
    engine, graphs = graphed
    graphs.counts.clear()
    for number in range(3):
        assert batches["mixed"].run(engine) == expected["mixed"]
        for tokens in SIZES:
            engine.runner._dummy_run(tokens, uniform_decode=True, num_active_loras=number)
    assert graphs.counts["replayed"] == len(SIZES), "with no adapter"


def test_a_pass_with_an_adapted_embedding_runs_without_a_graph(
    batches: dict[str, Batch], expected: dict[str, list[list[int]]], graphed: tuple[Engine, Graphs]
) -> None:
    engine, graphs = graphed
    graphs.counts.clear()
    assert batches["embedding"].run(engine) == expected["embedding"]
    assert not graphs.counts["replayed with adapters"] and graphs.counts["eager"] >= TOKENS
    assert batches["mixed"].run(engine) == expected["mixed"]
    assert graphs.counts["replayed with adapters"] >= TOKENS - 1


def test_graphs_without_adapters_launch_nothing(graphed: tuple[Engine, Graphs]) -> None:
    _, graphs = graphed
    assert all(bool(launches) == graph.has_lora for graph, launches in graphs.launches.items())


def test_an_adapter_above_the_reserved_rank_ends_the_use_of_graphs(
    batches: dict[str, Batch],
    expected: dict[str, list[list[int]]],
    graphed: tuple[Engine, Graphs],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """This is the last test with these graphs."""
    engine, graphs = graphed
    seen = messages(monkeypatch, graph_passes)
    for name in ("high", "mixed", "base"):
        graphs.counts.clear()
        assert batches[name].run(engine) == expected[name]
        assert graphs.counts.keys() == {"eager"}
    assert all("start the server with a higher --max-lora-rank" in message for message in seen) and seen


def messages(monkeypatch: pytest.MonkeyPatch, module: Any) -> list[str]:
    """What a module logs. vLLM's logger gives a message only once in a process."""
    seen: list[str] = []
    logger = SimpleNamespace(
        info_once=lambda message, *given: seen.append(message % given),
        warning_once=lambda message, *given: seen.append(message % given),
    )
    monkeypatch.setattr(module, "logger", logger)
    return seen


def test_a_graph_that_cannot_run_a_pass_is_refused() -> None:
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import BatchDescriptor, override_forward_context

    with pytest.raises(EngineError, match="backend torch does not run in CUDA graphs"):
        GraphPass(TorchBackend(torch.device("cpu"), torch.float32))
    backend = TritonBackend(torch.device("cpu"), torch.float32, Limits(8, 2, rank=16))
    layer, running = backend.add_layer("layer", 4, [Columns(0, 4)]), GraphPass(backend)
    running.reserve([2])
    x, y = torch.zeros(2, 3, 4)[:2]

    def within(graph: BatchDescriptor) -> Any:
        context: Any = SimpleNamespace(cudagraph_runtime_mode=CUDAGraphMode.FULL, batch_descriptor=graph)
        return override_forward_context(context)

    with (
        within(BatchDescriptor(2, has_lora=True)),
        pytest.raises(EngineError, match="layer gets 3 rows in a pass of 2"),
    ):
        running.add(layer, y, x)
    with (
        within(BatchDescriptor(3, has_lora=True)),
        pytest.raises(EngineError, match=r"3 tokens.* none of the sizes \[2\]"),
    ):
        running.add(layer, y, x)
    running.begin(2)
    running.plan(PassPlan((Segment("a", 0),), 1, 2), np.array([1]))
    with within(BatchDescriptor(2)), pytest.raises(EngineError, match="cannot run adapters a"):
        running.forward(lambda: None)
    backend.add_layer("another", 4, [Columns(0, 4)])
    with within(BatchDescriptor(2, has_lora=True)), pytest.raises(EngineError, match="cannot run adapters a"):
        running.forward(lambda: None)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"asked": False}, "can be tried"),
        ({"cuda": False}, "no CUDA device"),
        ({"triton": False}, "Triton is not installed"),
        ({"variable": "0"}, "CHUNKWISE_TRITON=0"),
        ({"dtype": torch.float64}, "float64"),
        ({"runner": "pooling"}, "pooling model"),
        ({"mode": "NONE"}, ""),
    ],
)
def test_where_graphs_cannot_run_adapters_they_are_switched_off(
    changes: dict[str, Any], says: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.config import CUDAGraphMode

    case = SimpleNamespace(
        **{"asked": True, "cuda": True, "triton": True, "variable": "", "dtype": torch.float16, "runner": "generate"}
        | {"mode": "FULL_AND_PIECEWISE"}
        | changes
    )
    config: Any = SimpleNamespace(
        lora_config=SimpleNamespace(fully_sharded_loras=False, enable_tower_connector_lora=False, max_lora_rank=64),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, use_ubatching=False),
        speculative_config=None,
        use_v2_model_runner=False,
        additional_config={KEY: {"cuda_graphs": case.asked}},
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode[case.mode]),
        model_config=SimpleNamespace(dtype=case.dtype, runner_type=case.runner),
    )
    monkeypatch.setattr(frontend.current_platform, "is_cuda", lambda: case.cuda)
    monkeypatch.setattr(frontend, "find_spec", lambda name: case.triton or None)
    monkeypatch.setenv("CHUNKWISE_TRITON", case.variable)
    seen = messages(monkeypatch, frontend)
    frontend.prepare(config)
    is_on = says is None
    assert (config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE) == is_on
    assert settings.of_server(config.additional_config).cuda_graphs == is_on
    assert len(seen) == (case.mode != "NONE")
    assert all(("up to rank 64" if is_on else says) in message for message in seen)
