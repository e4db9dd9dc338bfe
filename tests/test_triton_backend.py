"""The Triton backend adds the same as plain products. Without a GPU, it runs in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chunkwise_lora import ChunkWiseConfig
from chunkwise_lora.backends import AnyBackend, Columns, Limits, PreparedPass
from chunkwise_lora.backends.torch_products import TorchBackend
from chunkwise_lora.ladder import LadderModule
from chunkwise_lora.method import segments as grouping
from chunkwise_lora.method.batch import BatchPlanner, Span
from chunkwise_lora.method.segments import PassPlan, Segment, segments_of
from chunkwise_lora.method.sequence import AdapterInfo, SequencePlanner

pytest.importorskip("triton", reason="Triton is not installed")

from chunkwise_lora.backends.triton import table as tables
from chunkwise_lora.backends.triton.backend import FIRST_RANK, FIRST_RUNGS, FIRST_SLOTS, TritonBackend
from chunkwise_lora.backends.triton.schedule import Schedule

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYERS = {
    "qkv": (40, [Columns(0, 48), Columns(48, 16), Columns(70, 16)]),
    "down": (72, [Columns(0, 40)]),
}
"""Inputs and columns of every layer. Outputs 64 to 70 of the first layer belong to no module."""
RANKS = {"a": 3, "b": 17, "c": 40}
RUNGS = {"a": 1, "b": 4, "c": 9}


def adapter(rank: int, rungs: int, seed: int = 0) -> dict[str, list[LadderModule | None]]:
    """Random modules of at most this rank by layer; some layers have no module."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)

    def module(inputs: int, outputs: int, own: int) -> LadderModule:
        up, down = torch.randn(outputs, own, generator=generator), torch.randn(own, inputs, generator=generator)
        ranks = [*sorted(rng.integers(0, own + 1, rungs - 1).tolist()), own]
        return LadderModule(up / own**0.5, down / inputs**0.5, torch.ones(own), tuple(ranks))

    (inputs, (q, _, v)), (inputs_down, (o,)) = LAYERS.values()
    modules: dict[str, list[LadderModule | None]] = {
        "qkv": [module(inputs, q.width, rank), None, module(inputs, v.width, (rank + 1) // 2)]
    }
    return modules if seed % 2 else modules | {"down": [module(inputs_down, o.width, rank)]}


class BackendRun:
    """A backend with the layers, and the pass that it runs."""

    prepared: PreparedPass
    passes: list[PreparedPass]

    def __init__(self, backend: AnyBackend) -> None:
        self.backend = backend
        self.layers = {name: backend.add_layer(name, *shape) for name, shape in LAYERS.items()}

    def plan(self, plan: PassPlan) -> None:
        vars(self).pop("prepared", None)  # an engine, too, ends a pass before it prepares the next one
        self.prepared = self.backend.prepare(plan)

    def added(self, layer: str, y: Tensor, x: Tensor) -> Tensor:
        """y with the adapter product added. Rows after those of the pass are padding."""
        y, tokens = y.clone(), self.prepared.plan.tokens
        self.backend.apply(self.layers[layer], y[:tokens], x[:tokens], self.prepared)
        return y


def both(dtype: torch.dtype = torch.float32, adapters: int = 3) -> tuple[BackendRun, BackendRun]:
    """The Triton backend and the plain backend with the same layers, without adapters."""
    return BackendRun(TritonBackend(DEVICE, dtype, Limits(64, adapters))), BackendRun(TorchBackend(DEVICE, dtype))


def assert_same(pair: tuple[BackendRun, ...], rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Check that both backends add the same in every layer; returns what they add."""
    results = []
    for layer, (inputs, columns) in LAYERS.items():
        x = torch.randn(rows, inputs).to(DEVICE, dtype)
        y = torch.randn(rows, columns[-1].offset + columns[-1].width).to(DEVICE, dtype)
        result, expected = (each.added(layer, y, x) for each in pair)
        tolerance = 1e-5 if dtype == torch.float32 else 0.03
        assert torch.allclose(result.float(), expected.float(), rtol=tolerance, atol=10 * tolerance)
        results.append((result - y).flatten())
    return torch.cat(results)


def weights_of(kinds: list[str], rungs: int, rng: np.random.Generator) -> np.ndarray:
    weights = np.zeros((len(kinds), rungs), np.float32)
    for row, kind in zip(weights, kinds, strict=True):
        first, second = rng.integers(0, rungs, 2)
        share = {"whole": 1.0, "fading": 0.25, "scaled": 1.5, "off": 0.0}[kind]
        row[first] += share
        row[second] += 0.75 if kind == "fading" else 0.0
    return weights


@pytest.mark.parametrize("gain", [1e9, -1e9], ids=["never grouped", "always grouped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=10)  # the interpreter is slow
@given(
    tokens=st.lists(
        st.tuples(st.sampled_from(["base", *RANKS]), st.sampled_from(["whole", "fading", "scaled", "off"])),
        min_size=1,
        max_size=24,
    ),
    padding=st.integers(0, 3),
    alike=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_a_mixed_pass_adds_what_products_add(
    gain: float, dtype: torch.dtype, tokens: list[tuple[str, str]], padding: int, alike: bool, seed: int
) -> None:
    pair = both(dtype)
    for name, rank in RANKS.items():
        for each in pair:
            each.backend.load(name, adapter(rank, RUNGS[name], rank))
    rng, segments = np.random.default_rng(seed), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouping, "GROUPING_GAIN", gain)
        for name, rungs in RUNGS.items():
            rows = np.array([row for row, (owner, _) in enumerate(tokens) if owner == name])
            if len(rows):
                weights = weights_of(["whole" if alike else tokens[row][1] for row in rows], rungs, rng)
                ranks = np.linspace(0, RANKS[name], rungs)
                segments += segments_of(name, weights, ranks, None if len(rows) == len(tokens) else rows)
    planned(pair, segments, len(tokens))
    torch.manual_seed(seed)
    assert_same(pair, len(tokens) + padding, dtype)


def test_passes_of_a_planner_add_what_products_add() -> None:
    pair = both()
    planner = BatchPlanner(50)
    for name, config in [("a", "lossless"), ("b", "balanced"), ("c", "compact")]:
        ranks = np.linspace(0, RANKS[name], RUNGS[name])
        info = AdapterInfo(name, name, ranks, ranks.astype(int))
        planner.open(f"request of {name}", SequencePlanner(info, ChunkWiseConfig.preset(config), 50, [1, 2]))
        for each in pair:
            each.backend.load(name, adapter(RANKS[name], RUNGS[name]))
    position, rng = 0, np.random.default_rng(0)
    for count in (12, 1, 1, 1):  # a prompt, then decode
        names = ["request of a", "base", "request of b", "request of c"]
        ids = rng.integers(0, 50, (4, count)).tolist()
        plan = planner.plan([Span(name, position, count) for name in names], lambda ids=ids: ids)
        for each in pair:
            each.plan(plan)
        assert assert_same(pair, 4 * count).any()
        position += count


def planned(pair: tuple[BackendRun, ...], segments: list[Segment], tokens: int) -> None:
    plan = PassPlan(tuple(segments), 1, tokens)
    for each in pair:
        each.plan(plan)


def test_adapters_can_be_loaded_and_unloaded() -> None:
    pair = triton, _ = both(adapters=2)
    segments = [Segment(name, 0, None, np.array([row])) for row, name in enumerate(["a", "b", "c"])]
    plan = PassPlan(tuple(segments), 1, 4)

    def put(name: str, seed: int = 0) -> None:
        for each in pair:
            each.backend.load(name, adapter(5, 1, seed))

    def drop(name: str) -> None:
        for each in pair:
            each.backend.unload(name)

    empty = {name: layer.table.nbytes for name, layer in triton.backend.layers.items()}
    for change in [
        lambda: put("a"),
        lambda: put("b", 2),
        lambda: put("a", 1),  # in its own place, without the second layer
        lambda: drop("a"),
        lambda: drop("a"),
        lambda: put("c", 4),
        lambda: drop("b"),
        lambda: put("a", 6),
    ]:
        change()
        for each in pair:
            each.plan(plan)  # the same plan object, as from a planner with constant plans
        assert assert_same(pair, 4).any()
        assert triton.backend.adapters == pair[1].backend.adapters
    drop("a")
    drop("c")
    assert {name: layer.table.nbytes for name, layer in triton.backend.layers.items()} == empty
    for each in pair:
        each.plan(plan)
    assert not assert_same(pair, 4).any()


def test_an_adapter_takes_memory_of_its_own_rank() -> None:
    triton, _ = both()
    before = sum(layer.table.nbytes for layer in triton.backend.layers.values())
    for name, rank in RANKS.items():
        modules = adapter(rank, RUNGS[name])
        triton.backend.load(name, modules)
        numbers = sum(one.rank * one.cost for of_layer in modules.values() for one in of_layer if one)
        after = sum(layer.table.nbytes for layer in triton.backend.layers.values())
        assert after - before == 4 * numbers
        before = after


@pytest.mark.parametrize(("rank", "rungs"), [(FIRST_RANK + 1, 2), (4 * FIRST_RANK, 2), (8, FIRST_RUNGS + 1), (80, 70)])
def test_an_adapter_may_be_larger_than_the_others(rank: int, rungs: int) -> None:
    pair = both()
    for name, its_rank, its_rungs in [("a", 3, 2), ("b", rank, rungs), ("c", 7, 5)]:
        for each in pair:
            each.backend.load(name, adapter(its_rank, its_rungs))
        segments = [
            Segment("a", 1, None, np.array([1])),
            Segment("b", rungs - 1, None, np.array([2])),
            Segment("b", 1, None, np.array([3])),
            Segment("c", 4, None, np.array([4])),
        ]
        planned(pair, segments[: {"a": 1, "b": 3, "c": 4}[name]], 5)
        assert assert_same(pair, 5).any()


def test_a_schedule_is_filled_again_only_for_another_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    triton, _ = both()
    triton.backend.load("a", adapter(3, 1))
    sizes: list[int] = []
    update = Schedule.update

    def count(schedule: Schedule, slots: Any, weights: Any) -> None:
        sizes.append(len(slots))
        update(schedule, slots, weights)

    monkeypatch.setattr(Schedule, "update", count)
    two, three, idle = PassPlan((Segment("a", 0),), 1, 2), PassPlan((Segment("a", 0),), 1, 3), PassPlan((), 1, 2)
    for plan in [two, two, idle, two, three, three, two]:
        triton.plan(plan)
    assert sizes == [2, 3, 2]


def test_passes_may_run_in_turns_and_while_adapters_change() -> None:
    pair = both(adapters=1)
    segment = Segment("a", 0, None, np.array([1]))
    for each in pair:
        each.backend.load("a", adapter(3, 1))
        passes = [each.backend.prepare(PassPlan((segment,), 1, tokens)) for tokens in (2, 3)]
        each.passes = [*passes, each.backend.prepare(PassPlan((replace(segment, rows=np.array([0])),), 1, 3))]

    def results(which: int) -> Tensor:
        for each in pair:
            each.prepared = each.passes[which]
        return assert_same(pair, each.prepared.plan.tokens)

    assert results(0).any() and results(2).any() and results(1).any() and results(0).any()
    triton, _ = pair
    triton.backend.unload("a")
    triton.backend.load("b", adapter(80, 70))  # in the same place, with more rungs
    y = torch.randn(3, 40).to(DEVICE)
    for prepared in triton.passes:
        triton.prepared = prepared
        added = triton.added("down", y, torch.randn(3, 72).to(DEVICE))
        assert torch.equal(added, y), "another adapter never takes its place"


def test_without_limits_there_is_room_for_any_number_of_adapters_and_tokens() -> None:
    pair = BackendRun(TritonBackend(DEVICE, torch.float32)), BackendRun(TorchBackend(DEVICE, torch.float32))
    for number in range(FIRST_SLOTS + 1):
        for each in pair:
            each.backend.load(str(number), adapter(3, 1, number))
        if number in (0, FIRST_SLOTS):
            rows = [np.array([row]) for row in range(2 * number + 1)]
            segments = [Segment(str(row % (number + 1)), 0, None, of_row) for row, of_row in enumerate(rows)]
            planned(pair, segments, len(rows))
            assert assert_same(pair, len(rows)).any()
    planned(pair, [Segment("0", 0)], 2)
    assert assert_same(pair, 2).any(), "a schedule with more room than needed"


def test_gradients_flow_through_the_product() -> None:
    pair = both()
    for each in pair:
        each.backend.load("b", adapter(17, 4))
    weights = np.array([[0, 0.5, 0, 0.5], [0, 0, 1, 0], [0, 0, 0, 0]], np.float32)
    planned(pair, [Segment("b", 3, weights, np.array([0, 2, 3])), Segment("b", 2, None, np.array([1]))], 4)
    gradients = []
    for each in pair:
        torch.manual_seed(0)
        x = torch.randn(4, 40, device=DEVICE, requires_grad=True)
        y = x @ torch.randn(40, 86, device=DEVICE)
        result = each.backend.apply(each.layers["qkv"], y, x, each.prepared)
        assert not torch.equal(result, y), "the layer's own output stays as it was"
        gradients.append(torch.autograd.grad(result.square().sum(), x)[0])
    assert torch.allclose(*gradients, atol=1e-4) and gradients[0][1].any()


def test_a_pass_without_segments_adds_nothing() -> None:
    pair = both()
    for each in pair:
        each.backend.load("a", adapter(3, 1))
    planned(pair, [Segment("a", 0)], 3)
    assert assert_same(pair, 3).any()
    planned(pair, [], 3)
    assert not assert_same(pair, 3).any()


@pytest.mark.parametrize(("x_dtype", "y_dtype"), [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
def test_a_layer_may_compute_in_another_dtype(x_dtype: torch.dtype, y_dtype: torch.dtype) -> None:
    pair = both(torch.bfloat16)
    for each in pair:
        each.backend.load("a", adapter(3, 1))
    planned(pair, [Segment("a", 0)], 3)
    x, y = torch.randn(72, 4).T.to(DEVICE, x_dtype), torch.randn(4, 40).to(DEVICE, y_dtype)
    result, expected = (each.added("down", y, x) for each in pair)
    assert torch.equal(result[3], y[3]), "padding"
    assert not torch.equal(result, y)
    assert torch.allclose(result, expected, atol=0.05)


def capture(run: Callable[[], object]) -> Callable[[], object]:
    """Capture what `run` launches, without computing it. Returns what replays it: a CUDA graph, or on a CPU the same
    launches with the same arguments."""
    if DEVICE.type == "cuda":
        run()  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay
    launches: list[Callable[[], object]] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            launch = self.kernel[grid]
            return lambda *given, **named: launches.append(partial(launch, *given, **named))

    with (
        patch.object(tables, "shrink_kernel", Recorder(tables.shrink_kernel)),
        patch.object(tables, "expand_kernel", Recorder(tables.expand_kernel)),
    ):
        run()
    return lambda: [launch() for launch in launches]


def test_a_captured_pass_follows_each_plan_and_each_change_of_the_adapters() -> None:
    """One pass per number of tokens, captured before any adapter is loaded; plans have as many tokens or fewer."""
    backend = TritonBackend(DEVICE, torch.float32, Limits(512, 3, rank=40))
    triton, torch_run = BackendRun(backend), BackendRun(TorchBackend(DEVICE, torch.float32))
    fixed = {tokens: backend.fixed_pass(tokens) for tokens in (1, 4, 9, 300)}
    layout, graphs = backend.layout, []
    for tokens, prepared in fixed.items():
        for name, (inputs, columns) in LAYERS.items():
            x = torch.zeros(tokens, inputs, device=DEVICE)
            y = torch.zeros(tokens, columns[-1].offset + columns[-1].width, device=DEVICE)
            run = partial(backend.apply, triton.layers[name], y, x, prepared)
            graphs.append((tokens, name, x, y, capture(run)))

    def load(name: str, rank: int, rungs: int, seed: int) -> None:
        for each in (triton, torch_run):
            each.backend.load(name, adapter(rank, rungs, seed))

    def check(*segments: Segment, tokens: int) -> bool:
        """Whether anything is added. Rows of padding are not read, and do not change."""
        plan, changed = PassPlan(segments, 1, tokens), False
        torch_run.plan(plan)
        for size, name, x, y, replay in graphs:
            if size < tokens:
                continue
            backend.refill(fixed[size], plan)
            x.normal_()
            x[tokens:] = torch.nan
            before = y.normal_().clone()
            replay()
            expected = torch_run.added(name, before, x)
            assert torch.allclose(y, expected, atol=1e-4)
            assert torch.equal(y[tokens:], before[tokens:])
            changed |= not torch.equal(y, before)
        return changed

    fading = np.array([[0, 0.25, 0.75, 0], [0, 0, 0, 1.5], [0, 0, 0, 0]], np.float32)
    mixed = [Segment("a", 0, None, np.array([0, 5])), Segment("b", 3, fading, np.array([1, 3, 8]))]
    assert not check(tokens=4), "no adapter"
    load("a", 3, 1, 0)
    load("b", 17, 4, 2)
    assert check(*mixed, tokens=9)
    assert check(Segment("a", 0), tokens=1), "fewer tokens, on the same graphs"
    load("a", 40, 1, 4)  # in its own place, with a higher rank
    assert check(*mixed, tokens=9)
    load("b", 5, 4, 6)  # with fewer directions, as under a budget
    assert check(*mixed, tokens=9)
    for each in (triton, torch_run):
        each.backend.unload("a")
    assert not check(Segment("a", 0, None, np.array([1, 2])), tokens=3), "an adapter that is gone"
    load("c", 7, 9, 8)  # in the place of a, where the schedules still name it
    assert check(*mixed, tokens=9), "b alone"
    assert check(Segment("c", 8, None, np.array([0])), mixed[1], tokens=9)
    assert not check(tokens=2)
    assert backend.layout == layout


def test_a_reserved_rank_keeps_captured_passes_valid() -> None:
    backend = TritonBackend(DEVICE, torch.float32, Limits(64, 3, rank=40))
    BackendRun(backend)
    layout = backend.layout
    backend.load("a", adapter(64, FIRST_RUNGS))
    assert backend.layout == layout, "40 is doubled from 16, and so are the sizes of the kernels"
    backend.load("b", adapter(65, 2))
    assert backend.layout > layout
    layout = backend.layout
    backend.load("c", adapter(3, FIRST_RUNGS + 1))
    assert backend.layout > layout


def test_a_fixed_pass_is_filled_again_only_for_another_plan_or_other_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    triton, _ = both()
    triton.backend.load("a", adapter(3, 1))
    fixed, sizes, update = triton.backend.fixed_pass(4), list[int](), Schedule.update

    def count(schedule: Schedule, slots: Any, weights: Any, tokens: int) -> None:
        sizes.append(len(slots))
        update(schedule, slots, weights, tokens)

    monkeypatch.setattr(Schedule, "update", count)
    two, three = PassPlan((Segment("a", 0),), 1, 2), PassPlan((Segment("a", 0),), 1, 3)
    for plan in [two, two, three, three]:
        triton.backend.refill(fixed, plan)
    triton.backend.load("a", adapter(5, 1))
    triton.backend.refill(fixed, three)
    assert sizes == [2, 3, 3]
