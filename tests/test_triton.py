"""The Triton kernels compute the gate form and read no other data. Without a GPU, they run in the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chunkwise_lora.errors import EngineError
from chunkwise_lora.ladder import LadderModule

pytest.importorskip("triton", reason="Triton is not installed")

from chunkwise_lora.backends import Columns
from chunkwise_lora.backends.triton import schedule as scheduling
from chunkwise_lora.backends.triton import table as tables
from chunkwise_lora.backends.triton.schedule import Schedule, most_blocks, plan_blocks
from chunkwise_lora.backends.triton.table import AdapterTable, Directions, adjacent

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RANKS = [0, 1, 3, 16, 17, 40, 64]


def factors(rank: int, inputs: int, width: int, rungs: int, dtype: torch.dtype = torch.float32) -> Directions:
    """Random directions, with rungs whose ranks rise to the full rank."""
    ranks = sorted(torch.randint(rank + 1, (rungs - 1,)).tolist())
    down, up = torch.randn(rank, inputs) / inputs**0.5, torch.randn(width, rank) / max(rank, 1) ** 0.5
    return Directions(down.to(DEVICE, dtype), up.to(DEVICE, dtype), (*ranks, rank))


def batch(kinds: list[str], slots: int, rungs: int) -> tuple[np.ndarray, np.ndarray]:
    """Slots (tokens,) and weights over the rungs (tokens, rungs) for tokens of the given kinds."""
    rng = np.random.default_rng(0)
    of_tokens, weights = rng.integers(0, slots, len(kinds)), np.zeros((len(kinds), rungs), np.float32)
    for token, kind in enumerate(kinds):
        rung, other = rng.integers(0, rungs, 2)
        if kind == "base":
            of_tokens[token] = -1
            weights[token, rung] = 1
        elif kind != "off":
            weights[token, rung] = -1.5 if kind == "scaled" else 1
        if kind == "fading":
            weights[token, other], weights[token, rung] = 0.25, 0.75
    return of_tokens, weights


def gate_form(y: Tensor, x: Tensor, table: AdapterTable, slots: np.ndarray, weights: np.ndarray) -> Tensor:
    """The expected result, computed token by token in float64."""
    y = y.double()
    for token, slot in enumerate(slots.tolist()):
        for i, pair in enumerate(table.factors[slot] if slot >= 0 else []):
            if pair is not None:
                down, up = (factor.double() for factor in pair)
                ranks = table.ranks[slot, i].cpu()
                gates = torch.from_numpy(weights[token]).double() @ (ranks[:, None] > torch.arange(len(down))).double()
                offset = int(table._spans[i, 0])
                added = (gates.to(y.device) * (down @ x[token].double())) @ up
                y[token, offset : offset + up.shape[1]] += added
    return y


def assert_close(result: Tensor, expected: Tensor) -> None:
    """Check that the difference is within rounding in the result's dtype."""
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[result.dtype]
    atol = tolerance * float(expected.abs().max()) if expected.numel() else 0.0
    assert torch.allclose(result.double(), expected, rtol=tolerance, atol=atol)


def scheduled(slots: Any, weights: Any, table: AdapterTable, tokens: int | None = None) -> Schedule:
    slots, weights = np.asarray(slots), np.asarray(weights, np.float32)
    schedule = Schedule(max(len(slots), tokens or 0), table.slots, table.rungs, DEVICE)
    schedule.update(slots, weights, tokens)
    return schedule


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=15)  # the interpreter is slow
@given(
    seed=st.integers(0, 2**31),
    inputs=st.sampled_from([1, 8, 100, 130, 600, 1100]),
    widths=st.lists(st.sampled_from([1, 16, 33, 128, 130, 272]), min_size=1, max_size=3),
    rungs=st.integers(1, 5),
    adapters=st.lists(st.lists(st.sampled_from([None, *RANKS]), min_size=3, max_size=3), min_size=1, max_size=4),
    kinds=st.lists(st.sampled_from(["base", "off", "whole", "scaled", "fading"]), max_size=30),
    few=st.booleans(),
)
def test_a_mixed_batch_gets_the_gate_form(
    dtype: torch.dtype,
    seed: int,
    inputs: int,
    widths: list[int],
    rungs: int,
    adapters: list[list[int | None]],
    kinds: list[str],
    few: bool,
) -> None:
    torch.manual_seed(seed)
    table = AdapterTable(
        inputs, adjacent(widths), slots=len(adapters) + 1, max_rank=64, rungs=rungs, device=DEVICE, dtype=dtype
    )
    for slot, ranks in enumerate(adapters):
        pairs = zip(widths, ranks[: len(widths)], strict=True)
        table.set(slot, [None if rank is None else factors(rank, inputs, width, rungs) for width, rank in pairs])
    slots, weights = batch(kinds, len(adapters) + 1, rungs)  # the last slot stays empty
    x, y = torch.randn(len(kinds), inputs), torch.randn(len(kinds), sum(widths))
    x, y = x.to(DEVICE, dtype), y.to(DEVICE, dtype)
    expected = gate_form(y, x, table, slots, weights)
    with patch.object(scheduling, "SMALL_BLOCKS_UP_TO", 256 if few else 0):
        table.add(y, x, scheduled(slots, weights, table))
    assert_close(y, expected)


@given(
    slots=st.lists(st.integers(-1, 5), max_size=100),
    rungs=st.integers(1, 6),
    size=st.sampled_from([1, 4, 16]),
    seed=st.integers(0, 2**31),
)
def test_blocks_hold_each_token_of_an_adapter_once(slots: list[int], rungs: int, size: int, seed: int) -> None:
    of_tokens = np.array(slots, np.int64)
    weights = np.random.default_rng(seed).choice([0.0, 0.5], (len(slots), rungs)).astype(np.float32)
    order, blocks = plan_blocks(of_tokens, weights, size)
    assert sorted(order) == [t for t, slot in enumerate(slots) if slot >= 0 and weights[t].any()]
    covered = [place for start, count, _, _ in blocks for place in range(start, start + count)]
    assert covered == list(range(len(order)))
    for start, count, slot, rung in blocks:
        tokens = order[start : start + count]
        assert 1 <= count <= size
        assert set(of_tokens[tokens]) == {slot}
        assert rung == max(np.flatnonzero(weights[token])[-1] for token in tokens)
    tiles = lambda tokens: scheduling.FEW._replace(tokens=size)  # noqa: E731
    with patch.object(scheduling, "tiles_of", tiles), patch.object(tables, "tiles_of", tiles):
        assert len(blocks) <= most_blocks(len(slots), 6)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The addresses that kernels read, for tests in the interpreter."""
    if DEVICE == "cuda":
        pytest.skip("a GPU does not tell what it reads")
    from triton.runtime.interpreter import InterpreterBuilder

    addresses: set[int] = set()
    load = InterpreterBuilder.create_masked_load

    def spy(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        addresses.update(pointers.data[mask.data].tolist())
        return load(self, pointers, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", spy)
    return addresses


@pytest.mark.parametrize("few", [True, False])
def test_exactly_the_directions_and_tokens_in_use_are_read(
    few: bool, read: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduling, "SMALL_BLOCKS_UP_TO", 256 if few else 0)
    adapters = [
        [factors(70, 64, 48, 3)._replace(ranks=(0, 5, 70))],
        [factors(33, 64, 48, 3)._replace(ranks=(1, 33, 33))],
    ]
    table = AdapterTable.of(adapters, device=DEVICE, dtype=torch.float32)
    x, y = torch.randn(5, 64), torch.randn(5, 48)
    table.add(y, x, scheduled([0, 0, 1, -1, 1], np.eye(3)[[1, 0, 0, 2, 0]], table))

    def rows_read(tensor: Tensor) -> list[int]:
        row, start = tensor.stride(0) * 4, tensor.data_ptr()
        return sorted({(a - start) // row for a in read if start <= a < start + tensor.nbytes})

    for (pair,), rank in zip(table.factors, (5, 1), strict=True):
        assert [rows_read(factor) for factor in pair] == [list(range(rank))] * 2
    assert rows_read(x) == rows_read(y) == [0, 1, 2, 4]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top", [0, 1, 2])
def test_directions_above_the_highest_rung_are_never_read(top: int, dtype: torch.dtype) -> None:
    ranks = (0, 5, 20, 40)
    one = factors(40, 64, 48, 4, dtype)._replace(ranks=ranks)
    one.down[ranks[top] :] = torch.nan
    one.up[:, ranks[top] :] = torch.nan
    table = AdapterTable.of([[one]], device=DEVICE, dtype=dtype)
    weights = np.zeros((6, 4), np.float32)
    weights[:, top] = [1, 1, 0.5, 0.5, 0, 2]
    weights[3, 0] = 0.5
    x, y = torch.randn(6, 64).to(DEVICE, dtype), torch.randn(6, 48).to(DEVICE, dtype)
    before = y.clone()
    table.add(y, x, scheduled([0, 0, 0, 0, 0, -1], weights, table))
    assert y.isfinite().all()
    assert torch.equal(y, before) == (top == 0)


def test_a_block_reads_directions_only_up_to_its_highest_rung() -> None:
    one = factors(40, 64, 48, 2)._replace(ranks=(8, 40))
    one.down[8:] = torch.nan
    table = AdapterTable.of([[one]], device=DEVICE, dtype=torch.float32)
    high = np.arange(32) % 2  # 16 tokens on each rung: two blocks, for any order in the batch
    x, y = torch.randn(32, 64, device=DEVICE), torch.randn(32, 48, device=DEVICE)
    table.add(y, x, scheduled(np.zeros(32, int), np.eye(2)[high], table))
    assert y[high == 0].isfinite().all()
    assert y[high == 1].isnan().all()


def test_outputs_without_an_adapter_do_not_change_by_a_bit() -> None:
    table = AdapterTable(
        20, [Columns(40, 30), Columns(5, 10)], slots=2, max_rank=8, rungs=1, device=DEVICE, dtype=torch.float32
    )
    table.set(1, [factors(8, 20, 30, 1), factors(3, 20, 10, 1)])
    x, wide = torch.randn(5, 20, device=DEVICE), torch.randn(9, 100, device=DEVICE)
    x[[0, 4]] = torch.nan  # tokens without an adapter are not read either
    y, before = wide[2:7, 7:97], wide.clone()  # with gaps between the rows
    slots = np.array([-1, 1, 0, 1])
    schedule = scheduled(slots, np.ones((4, 1)), table, tokens=5)
    table.add(y, x, schedule)
    changed = torch.zeros_like(wide, dtype=torch.bool)
    for token in (1, 3):
        changed[2 + token, 7 + 40 : 7 + 70] = changed[2 + token, 7 + 5 : 7 + 15] = True
    assert torch.equal(wide == before, ~changed)
    assert_close(y[:4], gate_form(before[2:6, 7:97], x[:4], table, slots, np.ones((4, 1), np.float32)))


def test_a_schedule_keeps_nothing_of_the_previous_pass() -> None:
    table = AdapterTable.of([[factors(4, 32, 16, 1)], [factors(7, 32, 16, 1)]], device=DEVICE, dtype=torch.float32)
    schedule = Schedule(40, 2, 1, DEVICE)
    x = torch.randn(40, 32, device=DEVICE)
    for slots in [[0, 1] * 20, [-1] * 40, [1], [-1, 0, -1], []]:
        schedule.update(np.array(slots, int), np.ones((len(slots), 1), np.float32), tokens=40)
        assert schedule.idle == (max(slots, default=-1) < 0)
        y = torch.zeros(40, 16, device=DEVICE)
        table.add(y, x, schedule)
        expected = gate_form(torch.zeros_like(y), x, table, np.array(slots), np.ones((len(slots), 1), np.float32))
        assert_close(y, expected)


def test_slots_are_set_replaced_and_emptied_in_place() -> None:
    table = AdapterTable(32, [Columns(0, 16)], slots=2, max_rank=8, rungs=3, device=DEVICE, dtype=torch.float32)
    x, schedule = torch.randn(2, 32, device=DEVICE), scheduled([0, 1], np.eye(3)[[2, 2]], table)
    addresses = table.addresses.data_ptr(), table.ranks.data_ptr()

    def added() -> Tensor:
        y = torch.zeros(2, 16, device=DEVICE)
        table.add(y, x, schedule)
        return y.ne(0).any(1)

    assert added().tolist() == [False, False]
    empty = table.nbytes
    module = LadderModule(torch.randn(16, 5), torch.randn(5, 32), torch.ones(5), (2, 5))
    table.set(1, [module])
    assert added().tolist() == [False, True], "the third rung counts as the ladder's last, its second"
    assert table.nbytes == empty + 5 * (32 + 16) * 4
    down = weakref.ref(table.factors[1][0][0])
    table.set(0, [module])
    table.set(1, [factors(8, 32, 16, 3)])
    assert down() is None or down() is module.down
    table.remove(0)
    assert added().tolist() == [False, True]
    table.remove(1)
    assert added().tolist() == [False, False]
    assert table.nbytes == empty
    assert addresses == (table.addresses.data_ptr(), table.ranks.data_ptr())


def test_factors_in_the_table_s_layout_are_not_copied_unless_misaligned() -> None:
    down, up = torch.randn(9, 32, device=DEVICE), torch.randn(9, 16, device=DEVICE)
    table = AdapterTable.of([[Directions(down[1:], up[1:].T, (8,))]], device=DEVICE, dtype=torch.float32)
    assert [factor.data_ptr() for factor in table.factors[0][0]] == [down[1:].data_ptr(), up[1:].data_ptr()]
    shifted = torch.randn(9 * 32 + 1, device=DEVICE)[1:].view(9, 32)
    table.set(0, [Directions(shifted[:8], up[1:].T, (8,))])
    assert table.factors[0][0][0].data_ptr() % 16 == 0


def test_the_same_pass_gives_the_same_bits() -> None:
    table = AdapterTable.of([[factors(40, 2000, 64, 1)]], device=DEVICE, dtype=torch.float32)
    x, schedule = torch.randn(3, 2000, device=DEVICE), scheduled([0] * 3, np.ones((3, 1)), table)
    results = [torch.zeros(3, 64, device=DEVICE) for _ in range(3)]
    for y in results:
        table.add(y, x, schedule)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_a_captured_pass_follows_its_schedule_and_its_table() -> None:
    table = AdapterTable(256, [Columns(0, 128)], slots=2, max_rank=16, rungs=2, device=DEVICE, dtype=torch.float32)
    schedule = Schedule(32, 2, 2, DEVICE)
    x, y = torch.randn(32, 256, device=DEVICE), torch.zeros(32, 128, device=DEVICE)
    schedule.update(np.zeros(0, int), np.zeros((0, 2), np.float32), tokens=32)
    table.add(y, x, schedule)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        table.add(y, x, schedule)
    for kinds in (["whole"] * 32, ["base", "fading", "scaled"] * 3, ["base"] * 4):
        table.set(0, [factors(16, 256, 128, 2)])
        table.set(1, [factors(5, 256, 128, 2)])
        slots, weights = batch(kinds, 2, 2)
        schedule.update(slots, weights, tokens=32)
        y.zero_()
        graph.replay()
        assert_close(y, gate_form(torch.zeros_like(y), x, table, slots, weights))


def test_tables_and_schedules_refuse_arguments_that_do_not_fit() -> None:
    def table(**changes: Any) -> AdapterTable:
        usual = {"slots": 2, "max_rank": 8, "rungs": 2, "device": DEVICE, "dtype": torch.float32}
        return AdapterTable(32, [Columns(0, 16)], **(usual | changes))

    with pytest.raises(EngineError, match="float64"):
        table(dtype=torch.float64)
    with pytest.raises(EngineError, match="overlap"):
        AdapterTable(
            4, [Columns(4, 8), Columns(0, 8)], slots=1, max_rank=1, rungs=1, device=DEVICE, dtype=torch.float32
        )
    with pytest.raises(EngineError, match="no known width"):
        AdapterTable.of([None], device=DEVICE, dtype=torch.float32)
    fitting = factors(8, 32, 16, 2)
    for slot, adapter, message in [
        (2, [fitting], "slot 2"),
        (0, [fitting, fitting], "2 slices"),
        (0, [factors(8, 31, 16, 2)], "32 to 16 features"),
        (0, [factors(9, 32, 16, 2)], "raise its max_rank"),
        (0, [factors(8, 32, 16, 3)], "raise its max_rank or rungs"),
        (0, [fitting._replace(ranks=(9,))], "must rise"),
        (0, [fitting._replace(ranks=())], "must rise"),
    ]:
        with pytest.raises(EngineError, match=message):
            table().set(slot, adapter)

    schedule = Schedule(4, 2, 2, DEVICE)
    for slots, rungs, tokens, message in [
        ([0], 3, None, "rungs"),
        ([0] * 5, 2, None, "up to 4 tokens"),
        ([0, 0], 2, 1, "a pass of 1 tokens"),
        ([2], 2, None, "-1 to 1"),
        ([-2], 2, None, "-1 to 1"),
    ]:
        with pytest.raises(EngineError, match=message):
            schedule.update(np.array(slots), np.ones((len(slots), rungs), np.float32), tokens)
    schedule.update(np.array([0, 1]), np.ones((2, 2), np.float32))
    x, y = torch.randn(2, 32, device=DEVICE), torch.randn(2, 16, device=DEVICE)
    for y_, x_, table_, message in [
        (y, x[:1], table(), "fit together"),
        (y[:1], x, table(), "fit together"),
        (y[:, :15], x, table(), "fit together"),
        (y, x, table(rungs=3), "fit together"),
        (y, x.half(), table(), "must be the same"),
        (y, x, table(dtype=torch.bfloat16), "must be the same"),
        (y, torch.randn(32, 2, device=DEVICE).T, table(), "must be contiguous"),
    ]:
        with pytest.raises(EngineError, match=message):
            table_.add(y_, x_, schedule)


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from chunkwise_lora.backends.triton.kernels import expand_kernel, shrink_kernel
from chunkwise_lora.backends.triton.schedule import FEW, MANY

types = dict.fromkeys(["x", "y"], "*bf16") | dict.fromkeys(["hidden", "weights"], "*fp32") | {"addresses": "*i64"}
types |= dict.fromkeys(["ranks", "blocks", "order", "spans"], "*i32")
for tiles in FEW._replace(splits=2), MANY:
    constants = dict(SLICES=3, RUNGS=9, MAX_RANK=64, SPLITS=tiles.splits, BLOCK_T=tiles.tokens, ALIGNED=True)
    constants |= dict(BLOCK_R=tiles.directions, BLOCK_K=tiles.inputs, BLOCK_N=tiles.outputs, WIDEN=False)
    for kernel in shrink_kernel, expand_kernel:
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in constants}
        source = ASTSource(kernel, signature, {name: constants[name] for name in names if name in constants}, aligned)
        ptx = compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
        assert "mma" in ptx and "cp.async.cg" in ptx, "tensor cores, and 16 bytes per copy"
"""


def test_the_kernels_compile_for_a_gpu_without_having_one() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE], env=environment, capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr
