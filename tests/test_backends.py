"""Backends compute the adapter product of the gate form, and the registry chooses the one that runs."""

from __future__ import annotations

import gc
import sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from chunkwise_lora import EngineError
from chunkwise_lora.backends import AnyBackend, Columns, Limits, PreparedPass, backend_on, register_backend, registry
from chunkwise_lora.backends.native.backend import FEW_TOKENS, NativeBackend
from chunkwise_lora.backends.torch_products import TorchBackend
from chunkwise_lora.ladder import LadderModule
from chunkwise_lora.method.segments import PassPlan, Segment

CPU = torch.device("cpu")
KINDS: list[type[AnyBackend]] = [TorchBackend, NativeBackend]


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 5, FEW_TOKENS, FEW_TOKENS + 1])
@pytest.mark.parametrize("weighted", [False, True], ids=["one rung", "a weight per rung"])
@pytest.mark.parametrize("adapters", [0, 1, 3], ids=["all tokens", "some tokens", "several adapters"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_adds_the_gate_form_of_each_module(
    kind: type[AnyBackend], tokens: int, weighted: bool, adapters: int, dtype: torch.dtype
) -> None:
    backend = kind(CPU, dtype)
    columns = [Columns(0, 8), Columns(8, 300), Columns(310, 20), Columns(330, 4)]
    width_in = 70
    layer = backend.add_layer("layer", width_in, columns)
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, width_in, generator=generator).to(dtype)
    y = torch.randn(tokens, 334, generator=generator).to(dtype)
    expected = y.float().clone()
    segments = [Segment("not there", 0, None, np.arange(tokens)[3::4].copy())]
    for number in range(max(1, adapters)):
        q, k, v = modules_of([(8, 6), (300, 5), (4, 2)], width_in, [[0, 3, 6], [1, 1, 5], [0, 0, 2]], number)
        of_layer = [q, k, None, v]
        backend.load(str(number), {"layer": of_layer})
        rows = torch.arange(tokens)[number :: 4 if adapters else 1].clone()
        weights = torch.tensor([[0.0, 0.0, 1.0], [0.25, 0.75, 0.0], [0.0, 0.0, 0.0]])[torch.arange(len(rows)) % 3]
        given_weights = weights if weighted else torch.tensor([[0.0, 1.0, 0.0]]).expand(len(rows), 3)
        for module, where in zip(of_layer, columns, strict=True):
            if module is not None:
                gates = given_weights @ module.gate_table()
                down, up = module.down.to(dtype).float(), module.up.to(dtype).float()
                expected[rows, where.offset : where.offset + where.width] += (x[rows].float() @ down.T * gates) @ up.T
        if len(rows):
            top, rows_given = 2 if weighted else 1, rows.numpy() if adapters else None
            segments.append(Segment(str(number), top, weights.numpy() if weighted else None, rows_given))
    before = y.data_ptr()
    y = backend.apply(layer, y, x, backend.prepare(PassPlan(tuple(segments), 1, tokens)))
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    assert y.data_ptr() == before, "in place"
    assert torch.allclose(y.float(), expected, atol=tolerance, rtol=tolerance / 5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [2, FEW_TOKENS + 1])
def test_loaded_and_unloaded_adapters_add_what_the_plan_says(kind: type[AnyBackend], tokens: int) -> None:
    modules = {name: modules_of([(8, 3)], 12, [[0, 3]], seed) for seed, name in enumerate("abc")}
    backend = kind(CPU, torch.float32)
    layer = backend.add_layer("layer", 12, [Columns(0, 8)])
    x = torch.randn(tokens, 12)

    def added(*adapters: str) -> Tensor:
        rows = [np.arange(tokens)[n :: len(adapters)].copy() for n in range(len(adapters))]
        segments = [Segment(name, 1, None, of_adapter) for name, of_adapter in zip(adapters, rows, strict=True)]
        return backend.apply(layer, torch.zeros(tokens, 8), x, backend.prepare(PassPlan(tuple(segments), 1, tokens)))

    def product(name: str) -> Tensor:
        (module,) = modules[name]
        return x @ module.down.T @ module.up.T

    backend.load("1", {"layer": modules["a"]})
    backend.load("2", {"layer": modules["b"]})
    assert torch.allclose(added("1"), product("a"), atol=1e-4)
    assert torch.allclose(added("2", "1")[::2], product("b")[::2], atol=1e-4)
    backend.load("2", {"layer": modules["c"]})
    assert torch.allclose(added("2", "1")[::2], product("c")[::2], atol=1e-4)
    backend.unload("1")
    assert not added("2", "1")[1::2].any()
    assert backend.adapters == {"2"}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_through_the_product(kind: type[AnyBackend]) -> None:
    backend = kind(CPU, torch.float32)
    layer = backend.add_layer("layer", 6, [Columns(0, 5)])
    (module,) = modules_of([(5, 4)], 6, [[0, 4]])
    backend.load("a", {"layer": [module]})
    prepared = backend.prepare(PassPlan((Segment("a", 1),), 1, 3))
    x = torch.randn(3, 6, requires_grad=True)
    weight = torch.randn(5, 6)
    y = x @ weight.T
    result = backend.apply(layer, y, x, prepared)
    assert not torch.equal(y, result), "the layer's own output stays as it was"
    (gradient,) = torch.autograd.grad(result.sum(), x)
    assert torch.allclose(gradient, (weight + module.up @ module.down).sum(0).expand(3, -1), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 3), (1, 40)], ids=["few tokens", "many tokens"])
def test_rows_of_tokens_may_have_gaps_between_them_in_memory(kind: type[AnyBackend], shape: tuple[int, int]) -> None:
    backend = kind(CPU, torch.float32)
    layer = backend.add_layer("layer", 6, [Columns(0, 5)])
    (module,) = modules_of([(5, 4)], 6, [[0, 4]])
    backend.load("a", {"layer": [module]})
    prepared = backend.prepare(PassPlan((Segment("a", 1),), *shape))
    x, y = torch.randn(*shape, 12)[..., ::2], torch.randn(5, *shape).permute(1, 2, 0)
    expected = y + x @ module.down.T @ module.up.T
    assert torch.allclose(backend.apply(layer, y, x, prepared), expected, atol=1e-4)


@pytest.mark.parametrize("reason", ["a CPU", "no Triton", "switched off", "float64"])
def test_without_a_gpu_or_triton_another_backend_is_chosen(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    if reason == "switched off":
        monkeypatch.setenv("CHUNKWISE_TRITON", "0")
    if reason == "no Triton":
        monkeypatch.setitem(sys.modules, "chunkwise_lora.backends.triton.backend", None)
    seen: list[str] = []
    monkeypatch.setattr(registry.logger, "warning", lambda message, *_: seen.append(message))
    device = torch.device("cpu" if reason == "a CPU" else "cuda")
    dtype = torch.float64 if reason == "float64" else torch.float32
    if reason == "float64":
        pytest.importorskip("triton", reason="Triton is not installed")
    assert isinstance(backend_on(device, dtype, Limits(8, 2)), (TorchBackend, NativeBackend))
    assert len(seen) == (reason == "no Triton")


@pytest.mark.parametrize("limits", [Limits(8, 2), None], ids=["limits", "no limits"])
def test_on_a_gpu_triton_is_chosen(limits: Limits | None, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("triton backend")
    module.TritonBackend = Fast  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "chunkwise_lora.backends.triton.backend", module)
    assert isinstance(backend_on(torch.device("cuda"), torch.bfloat16, limits), Fast)


class Fast(TorchBackend):
    """A backend that another package registers."""

    name = "fast"


def test_a_registered_backend_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    register_backend("fast", lambda: Fast)
    assert isinstance(backend_on(CPU, torch.float32), Fast)
    assert type(backend_on(CPU, torch.float32, name="torch")) is TorchBackend


def test_an_unknown_backend_is_refused_by_name() -> None:
    with pytest.raises(EngineError, match=r"'fastest' is unknown; choose one of torch, native, triton"):
        backend_on(CPU, torch.float32, name="fastest")


def test_without_a_compiler_the_native_backend_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chunkwise_lora.backends.native.kernels", lambda dtype: None)
    assert type(backend_on(CPU, torch.float32)) is TorchBackend
    with pytest.raises(EngineError, match="native does not run on cpu"):
        backend_on(CPU, torch.float32, name="native")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [3, FEW_TOKENS + 1])
def test_passes_of_several_threads_each_run_their_own_adapters(kind: type[AnyBackend], tokens: int) -> None:
    modules = {name: modules_of([(8, 3)], 12, [[0, 3]], seed) for seed, name in enumerate("abcd")}
    backend = kind(CPU, torch.float32)
    layers = [backend.add_layer(str(number), 12, [Columns(0, 8)]) for number in range(4)]
    for name, of_layer in modules.items():
        backend.load(name, dict.fromkeys(("0", "1", "2", "3"), of_layer))
    expected = {name: (module.up @ module.down).T for name, (module,) in modules.items()}

    def run(name: str) -> float:
        x, worst = torch.randn(tokens, 12), 0.0
        for _ in range(100):
            prepared = backend.prepare(PassPlan((Segment(name, 1),), 1, tokens))
            for layer in layers:
                y = backend.apply(layer, torch.zeros(tokens, 8), x, prepared)
                worst = max(worst, float((y - x @ expected[name]).abs().max()))
        return worst

    with ThreadPoolExecutor(4) as threads:
        assert max(threads.map(run, "abcd")) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [3, FEW_TOKENS + 1])
def test_a_prepared_pass_keeps_the_factors_of_its_adapters(kind: type[AnyBackend], tokens: int) -> None:
    backend = kind(CPU, torch.float32)
    layer = backend.add_layer("layer", 12, [Columns(0, 8)])
    (old,), (new,) = (modules_of([(8, 3)], 12, [[0, 3]], seed) for seed in range(2))
    plan, x = PassPlan((Segment("a", 1),), 1, tokens), torch.randn(tokens, 12)

    def added(prepared: PreparedPass) -> Tensor:
        return backend.apply(layer, torch.zeros(tokens, 8), x, prepared)

    backend.load("a", {"layer": [old]})
    before = backend.prepare(plan)
    backend.load("a", {"layer": [new]})
    replaced = backend.prepare(plan)
    backend.unload("a")
    gc.collect()
    assert torch.allclose(added(before), x @ old.down.T @ old.up.T, atol=1e-4)
    assert torch.allclose(added(replaced), x @ new.down.T @ new.up.T, atol=1e-4)
    assert not added(backend.prepare(plan)).any()
