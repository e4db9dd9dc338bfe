"""The C kernels compute the same as PyTorch for every shape, mask and pool. Without a compiler PyTorch runs alone."""

from __future__ import annotations

import copy
import ctypes
import errno
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from chunkwise_lora import ChunkWiseModel
from chunkwise_lora.backends.emulation import Widened
from chunkwise_lora.backends.native import (
    AttentionPools,
    Kernels,
    PoolTensors,
    build,
    kernels,
    layers_of,
    segments_of,
    slices_of,
    wrappers,
)
from chunkwise_lora.backends.native.backend import FEW_TOKENS
from chunkwise_lora.backends.native.selftest import works
from chunkwise_lora.engines.transformers.attention import attention
from chunkwise_lora.engines.transformers.cache import ChunkWiseLayer
from chunkwise_lora.engines.transformers.context import PASS, ForwardPass, within
from chunkwise_lora.engines.transformers.fast_paths import FastPaths
from chunkwise_lora.engines.transformers.wide_linear import WideLinear
from chunkwise_lora.errors import EngineError
from chunkwise_lora.files import user_cache_folder
from chunkwise_lora.method.segments import PassPlan
from models import adapter, greedy, prompts
from models import build as build_model

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PRECISIONS = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def kernels_of(dtype: torch.dtype) -> Kernels:
    found = kernels(dtype)
    if found is None:
        pytest.skip("no C compiler here")
    return found


def assert_close(result: Tensor, expected: Tensor, summands: Tensor | None = None) -> None:
    """Check that the difference is within rounding in the result's dtype.

    Where summands cancel, rounding is relative to the sum of the sizes of `summands`.
    """
    tolerance = PRECISIONS[result.dtype]
    size = float((expected if summands is None else summands).abs().max())
    assert torch.allclose(result.double(), expected.double(), rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    seed=st.integers(0, 2**31),
    counts=st.lists(st.integers(1, 5) | st.integers(15, 40), min_size=1, max_size=3),
    inputs=st.sampled_from([40, 41]),
    ranks=st.lists(st.integers(0, 40), min_size=2, max_size=4),
    widths=st.lists(st.integers(1, 600), min_size=1, max_size=3),
    gated=st.booleans(),
)
def test_adding_segments_equals_two_products_per_adapter_and_module(
    dtype: torch.dtype, seed: int, counts: list[int], inputs: int, ranks: list[int], widths: list[int], gated: bool
) -> None:
    torch.manual_seed(seed)
    tokens, ranks = sum(counts) + 1, sorted(ranks)
    x, y = torch.randn(tokens, inputs).to(dtype), torch.randn(tokens, sum(widths) + 5).to(dtype)
    expected, sizes = y.double(), y.double().abs()
    adapters, segments, rung = [], [], len(ranks) - 1
    for rows in torch.randperm(tokens)[: tokens - 1].split(counts):
        weights = torch.rand(len(rows), len(ranks)) * (torch.rand(len(rows), len(ranks)) > 0.3)
        modules, offset = [], 5
        for width in widths:
            down, up = torch.randn(ranks[-1], inputs).to(dtype) / 6, torch.randn(ranks[-1], width).to(dtype)
            modules.append((down, up, torch.tensor(ranks), offset))
            table = torch.arange(ranks[-1]) < torch.tensor(ranks)[:, None]
            gates = weights.double() @ table.double() if gated else table[rung].double()
            columns = slice(offset, offset + width)
            expected[rows, columns] += (x[rows].double() @ down.double().T * gates) @ up.double()
            sizes[rows, columns] += (x[rows].double().abs() @ down.double().abs().T * gates) @ up.double().abs()
            offset += width
        adapters.append(modules)
        segments.append((rung, weights if gated else None, rows))
    layers = layers_of([slices_of(modules) for modules in adapters])
    kernels_of(dtype).add_segments(y, x, layers, segments_of(segments, tokens))
    assert_close(y, expected, sizes)


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=st.integers(0, 2**31), tokens=st.integers(1, 9), width=st.integers(1, 300), bias=st.booleans())
def test_a_product_of_few_tokens_equals_that_of_float32(
    dtype: torch.dtype, seed: int, tokens: int, width: int, bias: bool
) -> None:
    torch.manual_seed(seed)
    x, linear = torch.randn(tokens, width).to(dtype), nn.Linear(width, 33, bias=bias).to(dtype)
    expected = linear.float()(x.float()).detach()
    linear.to(dtype)
    assert_close(kernels_of(dtype).multiply(x.float(), linear.weight, linear.bias), expected)


def test_a_rank_of_millions_does_not_overflow_the_stack() -> None:
    rank, y, x = 2_000_000, torch.zeros(1, 4), torch.ones(1, 4)
    down, up, ranks = torch.ones(rank, 4), torch.ones(rank, 4), torch.tensor([rank])
    kernels_of(torch.float32).add_segments(
        y, x, layers_of([slices_of([(down, up, ranks, 0)])]), segments_of([(0, None, None)], 1)
    )
    assert torch.allclose(y, torch.full((1, 4), 4.0 * rank))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("cold", [False, True])
def test_attention_over_nan_and_infinity_equals_sdpa(value: float, cold: bool) -> None:
    kernels_of(torch.float32)
    layer, states = ChunkWiseLayer(), torch.randn(1, 2, 40, 16)
    states[0, 0, 3, 3] = value
    layer.update(states, states.clone())
    if cold:
        slots = torch.arange(40)[None]
        layer.rearrange(to_cold=slots[:, :20], hot=slots[:, 20:])
    query = torch.randn(1, 4, 1, 16)
    output = layer.attend(query, None, 0.25)
    assert output is not None
    expected = nn.functional.scaled_dot_product_attention(query, *layer.read(), scale=0.25, enable_gqa=True)
    expected = expected.transpose(1, 2)
    assert torch.equal(output.isnan(), expected.isnan())
    finite = expected.isfinite()
    assert torch.allclose(output[finite], expected[finite], rtol=1e-4, atol=1e-4)


def test_every_float16_number_survives_and_every_float_is_rounded_to_the_nearest(library_file: Path) -> None:
    portable = Kernels(ctypes.CDLL(str(library_file)), torch.float16)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    bits = torch.randint(-(2**31), 2**31, (200_000,), dtype=torch.int64).to(torch.int32)
    between = (every.float() + every.roll(1).float()) / 2
    floats = torch.cat([bits.view(torch.float32), between, between.nextafter(torch.tensor(torch.inf))])
    for kernel in (portable, kernels_of(torch.float16)):
        widened = kernel.multiply(torch.ones(1, 1), every[:, None].contiguous(), None)[0]
        assert torch.equal(widened[~every.isnan()], every[~every.isnan()]) and widened[every.isnan()].isnan().all()
        rounded = kernel.multiply(floats[:, None], torch.ones(1, 1).half(), None)[:, 0]
        assert torch.equal(rounded.isnan(), floats.isnan())
        assert torch.equal(rounded[~floats.isnan()], floats.half()[~floats.isnan()])


def fitting_call() -> dict[str, Tensor | int]:
    return {
        "x": torch.ones(3, 4),
        "y": torch.ones(3, 6),
        "down": torch.ones(2, 4),
        "up": torch.ones(2, 5),
        "ranks": torch.tensor([1, 2]),
        "offset": 1,
        "weights": torch.ones(2, 2),
        "rows": torch.tensor([0, 2]),
        "rung": 1,
    }


def add(call: dict[str, Tensor | int]) -> Tensor:
    slices = slices_of([tuple(call[name] for name in ("down", "up", "ranks", "offset"))])
    segments = segments_of([tuple(call[name] for name in ("rung", "weights", "rows"))], 3)
    kernels_of(torch.float32).add_segments(call["y"], call["x"], layers_of([slices]), segments)
    return call["y"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x", torch.ones(3, 4).bfloat16()),
        ("x", torch.ones(4, 3).T),
        ("x", torch.ones(3, 4, device="meta")),
        ("x", torch.ones(3, 5)),
        ("x", torch.ones(2, 4)),
        ("y", torch.ones(3, 6).double()),
        ("y", torch.ones(3, 12)[:, ::2]),
        ("y", torch.ones(3, 5)),
        ("y", torch.ones(2, 6)),
        ("down", torch.ones(2, 4).bfloat16()),
        ("down", torch.ones(1, 4)),
        ("down", torch.ones(4, 2).T),
        ("up", torch.ones(2, 6)),
        ("up", torch.ones(2, 5).half()),
        ("ranks", torch.tensor([1, 3])),
        ("ranks", torch.tensor([2, 1])),
        ("ranks", torch.tensor([-1, 2])),
        ("ranks", torch.tensor([1, 2], dtype=torch.int32)),
        ("ranks", torch.tensor([1])),
        ("offset", 2),
        ("offset", -1),
        ("weights", torch.ones(2, 2).double()),
        ("weights", torch.ones(3, 2)),
        ("weights", torch.ones(2, 1)),
        ("rows", torch.tensor([0, 3])),
        ("rows", torch.tensor([-1, 0])),
        ("rows", torch.tensor([0, 2], dtype=torch.int32)),
        ("rung", 2),
        ("rung", -1),
    ],
)
def test_arguments_that_would_read_out_of_bounds_in_a_product_are_refused(name: str, value: Tensor | int) -> None:
    expected = torch.ones(3, 6)
    expected[[0, 2], 1:] += 12
    assert torch.equal(add(fitting_call()), expected)
    with pytest.raises(EngineError):
        add(fitting_call() | {name: value})


@pytest.mark.parametrize(
    "change",
    [
        {"query": torch.ones(1, 2, 1, 8).bfloat16()},
        {"query": torch.ones(1, 3, 1, 8)},
        {"query": torch.ones(2, 2, 1, 8)},
        {"query": torch.ones(1, 2, 1, 4)},
        {"values": torch.ones(1, 2, 5, 8).bfloat16()},
        {"values": torch.ones(1, 2, 4, 8)},
        {"values": torch.ones(1, 5, 2, 8).transpose(1, 2)},
        {"slots": (0, 6)},
        {"slots": (4, 5)},
        {"slots": (-1, 5)},
        {"places": torch.tensor([1, -1], dtype=torch.int32)},
        {"places": torch.tensor([0, -2], dtype=torch.int32)},
        {"places": torch.tensor([0, -1])},
        {"codes": torch.ones(1, 1, 2, 8, dtype=torch.int8)},
        {"scales": torch.ones(1, 1, 3, 1)},
        {"others": torch.ones(1, 1, 3, 8).bfloat16()},
        {"mask": torch.ones(1, 1, 1, 8)},
        {"mask": torch.ones(1, 1, 1, 7, dtype=torch.bool)},
        {"mask": torch.ones(1, 1, 1, 16, dtype=torch.bool)[..., ::2]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_arguments_that_would_read_out_of_bounds_in_attention_are_refused(
    change: dict[str, Tensor | tuple[int, int]],
) -> None:
    def attend(**given: Tensor | tuple[int, int]) -> Tensor:
        cold = [
            given.get("codes", torch.ones(1, 1, 3, 8, dtype=torch.int8)),
            given.get("scales", torch.ones(1, 1, 3, 1).bfloat16()),
            given.get("others", torch.ones(1, 1, 3, 8)),
        ]
        places = given.get("places", torch.tensor([0, -1], dtype=torch.int32))
        keys, values = torch.ones(1, 2, 5, 8), given.get("values", torch.ones(1, 2, 5, 8))
        pools = AttentionPools(PoolTensors(keys, *cold), PoolTensors(values, *cold), places)
        query = given.get("query", torch.ones(1, 2, 1, 8))
        return kernels_of(torch.float32).attend(query, pools, given.get("slots", (3, 5)), given.get("mask"), 1.0)

    assert torch.allclose(attend(), torch.ones(1, 1, 2, 8))
    with pytest.raises(EngineError):
        attend(**change)


def test_keys_and_values_of_different_dtypes_use_pytorch() -> None:
    layer, states = ChunkWiseLayer(), torch.randn(1, 1, 5, 8)
    layer.update(states, states.bfloat16())
    assert layer.attend(torch.randn(1, 1, 1, 8), None, 1.0) is None


def test_replaced_storage_is_not_read_at_its_old_address() -> None:
    kernels_of(torch.float32)
    layer, states, query = ChunkWiseLayer(), torch.randn(2, 1, 1, 5, 8), torch.randn(1, 1, 1, 8)
    layer.update(*states)
    layer.keys, layer.values = torch.randn(2, 1, 1, 5, 8)
    expected = nn.functional.scaled_dot_product_attention(query, layer.keys, layer.values, scale=1.0)
    assert torch.allclose(layer.attend(query, None, 1.0), expected.transpose(1, 2), atol=1e-5)
    other = copy.deepcopy(layer)
    assert torch.allclose(other.attend(query, None, 1.0), expected.transpose(1, 2), atol=1e-5)
    layer.values = layer.values.bfloat16()
    assert layer.attend(query, None, 1.0) is None
    layer.values = torch.randn(1, 5, 1, 8).transpose(1, 2)[:, :, :, :4]
    assert layer.attend(query, None, 1.0) is None


def test_generation_under_autocast_is_the_same_without_kernels() -> None:
    tokens = []
    for fast in (FastPaths(), FastPaths(kernels=False)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            tokens.append(greedy(ChunkWiseModel(build_model("llama"), adapter("llama"), fast=fast), prompts(), 12)[0])
    assert torch.equal(*tokens)


@pytest.mark.parametrize("tokens", [FEW_TOKENS, FEW_TOKENS + 1])
@pytest.mark.parametrize("use_kernels", [True, False])
def test_a_widened_product_is_the_linear_layer(tokens: int, use_kernels: bool) -> None:
    linear, x = nn.Linear(24, 10).bfloat16(), torch.randn(1, tokens, 24).bfloat16()
    owner = object()
    wide = WideLinear(owner, linear, use_kernels)
    running = ForwardPass(owner, PassPlan((), 1, tokens), {}, {}, True, True, 1)
    with torch.no_grad(), within(PASS, running):
        assert_close(wide(x), linear.float()(x.float()))
    linear.bfloat16()
    with within(PASS, running):
        assert wide(x).requires_grad, "with gradients it is the layer itself"


def test_a_row_without_a_slot_gets_zeros_as_in_sdpa() -> None:
    layer, states = ChunkWiseLayer(), torch.randn(2, 1, 1, 5, 8)
    kernels_of(torch.float32)
    layer.update(*states)
    assert not layer.attend(torch.randn(1, 2, 1, 8), torch.zeros(1, 1, 1, 5, dtype=torch.bool), 1.0).any()


def test_attention_uses_given_values_that_are_not_those_of_the_cache() -> None:
    layer, states = ChunkWiseLayer(), torch.randn(2, 1, 1, 5, 8)
    keys, values = layer.update(*states)
    query = torch.randn(1, 1, 1, 8)
    output, _ = attention(nn.Module(), query, keys, 2 * values, None)
    expected = nn.functional.scaled_dot_product_attention(query, keys, 2 * values).transpose(1, 2)
    assert torch.allclose(output, expected)
    assert not layer.read_by_attention


def test_a_model_cast_after_attaching_runs_as_one_cast_before() -> None:
    model = ChunkWiseModel(build_model("llama").bfloat16(), adapter("llama"))
    late, early = model.model.float(), build_model("llama").bfloat16().float()
    expected = greedy(
        early,
        prompts((6,)),
        4,
    )[1]
    assert torch.allclose(greedy(model, prompts((6,)), 4, adapter_names="__base__")[1], expected, atol=1e-4)
    assert late is model.model


def test_a_widened_input_is_shared_until_it_changes_in_place() -> None:
    widened, x = Widened(), torch.ones(2, 3).bfloat16()
    first = widened.of(x)
    assert widened.of(x).data_ptr() == widened.of(x.view(6)).data_ptr() == first.data_ptr()
    x += 1
    assert torch.equal(widened.of(x), x.float())
    other = x + 1
    assert torch.equal(widened.of(other), other.float())
    assert torch.equal(widened.of(x.T), x.T.float())
    with torch.inference_mode():
        x = torch.ones(2).bfloat16()
        widened.of(x)
        x += 1
        assert torch.equal(widened.of(x), x.float())


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 3),
    heads=st.integers(1, 4),
    group=st.integers(1, 4),
    width=st.sampled_from([8, 20, 64, 128]),
    cold=st.integers(0, 90),
    hot=st.integers(1, 90),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    masked=st.booleans(),
)
def test_attention_of_a_decode_step_equals_sdpa_over_the_widened_cache(
    dtype: torch.dtype,
    seed: int,
    batch: int,
    heads: int,
    group: int,
    width: int,
    cold: int,
    hot: int,
    share: float,
    masked: bool,
) -> None:
    torch.manual_seed(seed)
    layer = ChunkWiseLayer(int8_head_share=share)
    states = 2 * torch.randn(2, batch, heads, cold + hot, width).to(dtype)
    layer.update(*states)
    if cold:
        slots = torch.arange(cold + hot).expand(batch, -1)
        layer.rearrange(to_cold=slots[:, :cold], hot=slots[:, cold:])
    query = 2 * torch.randn(batch, heads * group, 1, width).to(dtype)
    mask = None
    if masked:
        mask = torch.rand(batch, 1, 1, cold + hot) > 0.3
        mask[..., -1] = True  # as always, a token sees itself
    kernels_of(dtype)
    output = layer.attend(query, mask, 0.2)
    assert output is not None
    layer.keys, layer.values = layer.keys.float(), layer.values.float()  # INT8 is then widened without rounding
    keys, values = (states.double() for states in layer.read())
    expected = nn.functional.scaled_dot_product_attention(
        query.double(), keys, values, mask, scale=0.2, enable_gqa=True
    )
    assert_close(output, expected.transpose(1, 2))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("place", ["query", "hot keys", "cold keys", "hot values", "cold values"])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_spread_in_attention_as_in_sdpa(
    dtype: torch.dtype, number: float, place: str, masked: bool
) -> None:
    layer, states = ChunkWiseLayer(), torch.randn(2, 1, 2, 70, 16).to(dtype)
    query = torch.randn(1, 4, 1, 16).to(dtype)
    if place == "query":
        query[0, 0, 0, 3] = number
    else:
        states[int("values" in place), 0, 0, 65 if "hot" in place else 30, 3] = number
    layer.update(*states)
    slots = torch.arange(70)[None]
    layer.rearrange(to_cold=slots[:, :40], hot=slots[:, 40:])
    mask = torch.arange(70)[None, None, None] % 3 != 1 if masked else None
    kernels_of(dtype)
    output = layer.attend(query, mask, 0.25).float()
    expected = nn.functional.scaled_dot_product_attention(query, *layer.read(), mask, scale=0.25, enable_gqa=True)
    assert torch.allclose(output, expected.transpose(1, 2).float(), rtol=0.05, atol=0.05, equal_nan=True)
    assert torch.isfinite(output[:, :, 2:]).all(), "the other head has read finite numbers"


def test_a_layer_with_two_element_types_as_autocast_gives_them_is_read_by_sdpa() -> None:
    layer = ChunkWiseLayer()
    keys, values = torch.randn(2, 1, 2, 40, 16)
    layer.update(keys, values.bfloat16())
    slots = torch.arange(40)[None]
    layer.rearrange(to_cold=slots[:, :20], hot=slots[:, 20:])
    held_keys, held_values = layer.read()
    assert (held_keys.dtype, held_values.dtype) == (torch.float32, torch.bfloat16)
    assert (held_values - values).abs().max() < 0.05
    assert layer.attend(torch.randn(1, 4, 1, 16), None, 1.0) is None
    assert layer.attend(torch.randn(1, 4, 1, 16).bfloat16(), None, 1.0) is None


@pytest.mark.parametrize("tokens", [1, 3])
def test_calls_without_a_kernel_use_sdpa_over_the_widened_cache(tokens: int) -> None:
    layer, states = ChunkWiseLayer(use_kernels=False), torch.randn(2, 1, 2, 20, 8)
    layer.update(*states)
    slots = torch.arange(20)[None]
    layer.rearrange(to_cold=slots[:, :10], hot=slots[:, 10:])
    new = torch.randn(2, 1, 2, tokens, 8)
    layer.read_by_attention = True
    keys, values = layer.update(*new)
    assert keys.shape[2] == 10 + tokens, "only the hot pool is handed over"
    query, mask = torch.randn(1, 2, tokens, 8), torch.rand(1, 1, tokens, 20 + tokens) > 0.2
    output, _ = attention(nn.Module(), query, keys, values, mask)
    assert torch.equal(output, nn.functional.scaled_dot_product_attention(query, *layer.read(), mask).transpose(1, 2))


@pytest.fixture(scope="session")
def library_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library for any CPU, compiled without the compiler's float16."""
    path = tmp_path_factory.mktemp("library") / "portable.so"
    try:
        command = [*build.find_compiler(), "-O1", "-shared", "-fPIC", "-DPORTABLE_FLOAT16"]
    except build.BuildError:
        pytest.skip("no C compiler here")
    subprocess.run([*command, str(build.SOURCES[0]), "-o", str(path), "-lm"], check=True, capture_output=True)
    return path


@pytest.fixture
def own_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The state of a process that has not loaded the kernels yet, with its own cache folder."""
    monkeypatch.setenv("CHUNKWISE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(wrappers, "_libraries", [])
    kernels.cache_clear()
    yield tmp_path / "cache" / "kernels"
    kernels.cache_clear()


@pytest.fixture
def compiler(tmp_path: Path, library_file: Path, monkeypatch: pytest.MonkeyPatch, own_process: Path) -> Path:
    """Replaces the compiler by a script that copies the library, and adds a line to `calls` for each call."""
    body = f'echo >> {tmp_path}/calls; while [ "$1" != -o ]; do shift; done; cp {library_file} "$2"'
    return script(tmp_path, body, monkeypatch)


def script(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a shell script the compiler."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    monkeypatch.setenv("CC", f"{path} --an-option 'of two words'")
    return folder / "calls"


def calls(compiler: Path) -> int:
    return len(compiler.read_text().splitlines()) if compiler.exists() else 0


@pytest.mark.parametrize("how", ["switched off", "no compiler", "a compiler that fails", "not there"])
def test_without_kernels_the_same_tokens_come_from_pytorch(
    how: str, own_process: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if how == "switched off":
        monkeypatch.setenv("CHUNKWISE_KERNELS", "0")
    elif how == "no compiler":
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setattr(build.shutil, "which", lambda name: None)
    else:
        monkeypatch.setenv("CC", "false" if how == "a compiler that fails" else "/no/such/compiler -m64")
    assert [kernels(dtype) for dtype in DTYPES] == [None] * 3
    slow = greedy(ChunkWiseModel(build_model("llama"), adapter("llama")), prompts(), 24)[0]
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == (how != "switched off"), "one warning, however many element types"
    assert all("twice the time" in warning and "CHUNKWISE_KERNELS=0" in warning for warning in warnings)
    monkeypatch.undo()
    kernels.cache_clear()
    assert torch.equal(greedy(ChunkWiseModel(build_model("llama"), adapter("llama")), prompts(), 24)[0], slow)


def test_a_library_is_compiled_once_for_all_processes(compiler: Path, own_process: Path) -> None:
    build.load(works)
    build.load(works)
    program = "import torch; from chunkwise_lora.backends.native import kernels; assert kernels(torch.float16)"
    subprocess.run([sys.executable, "-c", program], check=True)
    assert calls(compiler) == 1
    (path,) = own_process.iterdir()
    assert own_process.stat().st_mode & 0o777 == 0o700 and not path.stat().st_mode & 0o077


def test_the_self_test_does_not_depend_on_modes_of_pytorch(compiler: Path) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"), torch.inference_mode():
        assert kernels(torch.float32) is not None


def test_the_real_compiler_s_library_is_in_the_cache_of_the_user() -> None:
    kernels_of(torch.float32)
    assert os.environ.get("CC") or build._stored(build.cache_folder(), f"kernels-{build._key(build.find_compiler())}")


@pytest.mark.parametrize("damage", ["cut", "changed", "replaced", "others may write"])
def test_a_damaged_library_is_compiled_again(damage: str, compiler: Path, own_process: Path) -> None:
    build.load(works)
    (path,) = own_process.iterdir()
    content = bytearray(path.read_bytes())
    path.unlink()  # a library that this process has mapped must not change
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "changed":
        content[len(content) // 2] ^= 1
    path.write_bytes(b"#!/bin/sh" if damage == "replaced" else bytes(content))
    path.chmod(0o622 if damage == "others may write" else 0o600)
    build.load(works)
    assert calls(compiler) == 2
    build.load(works)
    assert calls(compiler) == 2


@pytest.mark.parametrize(
    "place", ["all may write", "a group may write", "a link", "all may write above", "below a file", "a full disk"]
)
def test_no_library_is_stored_in_an_unsafe_or_unwritable_folder(
    place: str, compiler: Path, own_process: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    cache, elsewhere = own_process.parent, own_process.parent.with_name("elsewhere")
    elsewhere.mkdir(mode=0o700)
    if place == "below a file":
        cache.touch()
    else:
        cache.mkdir()
    if place == "a link":
        own_process.symlink_to(elsewhere)
    elif place == "a full disk":

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
    elif place != "below a file":
        own_process.mkdir()
        changed = cache if place == "all may write above" else own_process
        changed.chmod(0o770 if place == "a group may write" else 0o777)
    for _ in range(2):
        build.load(works)
    assert calls(compiler) == 2
    assert not any(elsewhere.iterdir()) and (not own_process.is_dir() or not any(own_process.iterdir()))
    assert sum("not kept for the next process" in record.message for record in caplog.records) == 2
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_a_library_is_stored_below_a_sticky_folder_such_as_tmp(compiler: Path, own_process: Path) -> None:
    own_process.parent.mkdir()
    own_process.parent.chmod(0o1777)
    for _ in range(2):
        build.load(works)
    assert calls(compiler) == 1


@pytest.mark.parametrize("changed", ["CPU", "compiler", "source", "flags"])
def test_a_library_is_for_one_cpu_compiler_source_and_flags(
    changed: str, compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build.load(works)
    if changed == "CPU":
        monkeypatch.setattr(build, "_cpu", lambda: ["another"])
    elif changed == "compiler":
        os.utime(tmp_path / "compiler", (1, 1))
    elif changed == "source":
        other = tmp_path / "typed.h"
        other.write_text("// another")
        monkeypatch.setattr(build, "SOURCES", [build.SOURCES[0], other])
    else:
        monkeypatch.setattr(build, "OPTIONS", [*build.OPTIONS, "-g"])
    build.load(works)
    assert calls(compiler) == 2


def test_processes_that_compile_at_once_leave_one_whole_library(compiler: Path, own_process: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: works(build.load(works)), range(8)))
    (path,) = own_process.iterdir()
    assert build._is_whole(path)


def test_libraries_that_nobody_uses_and_leftovers_are_removed(compiler: Path, own_process: Path) -> None:
    build.load(works)
    (used,) = own_process.iterdir()
    for name, days in (("kernels-a-b.so", 91), (".new-a", 2), ("kernels-c-d.so", 89), (".new-b", 0), ("notes", 500)):
        (own_process / name).touch()
        os.utime(own_process / name, (time.time() - days * build.DAY,) * 2)
    build._remove_unused(own_process)
    assert {path.name for path in own_process.iterdir()} == {used.name, "kernels-c-d.so", ".new-b", "notes"}
    os.utime(used, (1, 1))
    build.load(works)
    assert time.time() - used.stat().st_mtime < build.DAY, "a library in use is not removed"


NONSENSE = "".join(
    f"int {name}_{kind}(void) {{ return 0; }}"
    for name in ("add_segments", "multiply", "attend")
    for kind in ("float32", "bfloat16", "float16")
)
"""The source of a library whose kernels do nothing."""


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("echo no such flag >&2; exit 1", "no such flag"),
        ("exit 3", "status 3"),
        ("exit 0", "wrote no file"),
        ('while [ "$1" != -o ]; do shift; done; echo text > "$2"', "does not work"),
        ('while [ "$1" != -o ]; do shift; done; cp EMPTY "$2"', "does not work"),
        ('while [ "$1" != -o ]; do shift; done; cp NONSENSE "$2"', "does not work"),
        ("sleep 100 & sleep 100", "within"),
        ("kill -SEGV $$", "status -11"),
    ],
)
def test_a_broken_compiler_is_reported_and_leaves_nothing(
    body: str, complaint: str, tmp_path: Path, own_process: Path, library_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, source in (("EMPTY", "int other;"), ("NONSENSE", NONSENSE)):
        if name in body:
            (tmp_path / "source.c").write_text(source)
            command = [*build.find_compiler(), "-shared", "-fPIC", "source.c", "-o", name]
            subprocess.run(command, cwd=tmp_path, check=True)
            body = body.replace(name, str(tmp_path / name))
    script(tmp_path, body, monkeypatch)
    if complaint == "within":
        monkeypatch.setattr(build, "COMPILE_SECONDS", 0.3)
    start = time.monotonic()
    with pytest.raises(build.BuildError, match=complaint):
        build.load(works)
    assert time.monotonic() - start < 20
    assert not any(own_process.iterdir())


@pytest.mark.parametrize("cc", ["'", "/no/such/compiler", "no-such-compiler -m64"])
def test_a_cc_that_does_not_exist_is_named(cc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", cc)
    with pytest.raises(build.BuildError, match="CC is"):
        build.find_compiler()


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"CHUNKWISE_CACHE_DIR": "/a/b"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/a/b"}, "/a/b/chunkwise-lora"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/someone/.cache/chunkwise-lora"),
        ({}, "/home/someone/.cache/chunkwise-lora"),
    ],
)
def test_the_cache_is_in_the_usual_folder_of_the_user(
    variables: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("CHUNKWISE_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": "/home/someone"} | variables).items():
        monkeypatch.setenv(name, value)
    assert user_cache_folder() == Path(folder)


@pytest.mark.parametrize("switched_off", ["kernels", "attention", "products"])
def test_each_fast_path_can_be_switched_off_alone(switched_off: str) -> None:
    found, expected = (
        greedy(ChunkWiseModel(build_model("llama"), adapter("llama"), fast=fast), prompts(), 24)[0]
        for fast in (FastPaths(**{switched_off: False}), FastPaths())
    )
    assert torch.equal(found, expected)
