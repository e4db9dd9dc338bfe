"""The kernels compute what PyTorch does, for every shape, mask and pool; without a compiler all runs on PyTorch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from chunkwise_lora import ChunkWiseModel
from chunkwise_lora.backends import native
from chunkwise_lora.backends.native import Kernels, kernels
from chunkwise_lora.backends.segments import FEW_TOKENS
from chunkwise_lora.engines.transformers.attention import attention
from chunkwise_lora.engines.transformers.cache import ChunkWiseLayer
from chunkwise_lora.engines.transformers.layers import FastPaths, Step, WideProduct
from models import adapter, build, greedy, prompts

DTYPES = [torch.float32, torch.bfloat16]


def kernels_of(dtype: torch.dtype) -> Kernels:
    found = kernels(dtype)
    if found is None:
        pytest.skip("no C compiler here")
    return found


def assert_close(result: Tensor, expected: Tensor, summands: Tensor | None = None) -> None:
    """Within rounding of the result's own precision, or where they cancel, of the sum of `summands`' sizes."""
    tolerance = 1e-5 if result.dtype == torch.float32 else 2**-8
    size = float((expected if summands is None else summands).abs().max())
    assert torch.allclose(result.double(), expected.double(), rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=st.integers(0, 2**31), tokens=st.integers(1, 6), rank=st.integers(1, 70), width=st.integers(1, 600))
def test_adding_an_adapter_is_two_products_with_gates_between(
    dtype: torch.dtype, seed: int, tokens: int, rank: int, width: int
) -> None:
    torch.manual_seed(seed)
    x, y = torch.randn(tokens, 40).to(dtype), torch.randn(tokens, width).to(dtype)
    down, up = torch.randn(rank, 40).to(dtype) / 6, torch.randn(rank, width).to(dtype)
    rows = torch.randperm(tokens)[: max(1, tokens // 2)]
    gates = torch.rand(len(rows), rank)
    sizes = y.double().abs() + x.double().abs() @ down.double().T.abs() @ up.double().abs()
    expected = y.double()
    expected[rows] += (x[rows].double() @ down.double().T * gates) @ up.double()
    kernels_of(dtype).add_adapter(y, x, down, up, gates, rows)
    assert_close(y, expected, sizes)
    expected = y.double() + x.double() @ down.double().T @ up.double()
    kernels_of(dtype).add_adapter(y, x, down, up, None, None)
    assert_close(y, expected, sizes)


@given(seed=st.integers(0, 2**31), tokens=st.integers(1, 9), width=st.integers(1, 300), bias=st.booleans())
def test_a_product_of_few_tokens_is_that_of_float32(seed: int, tokens: int, width: int, bias: bool) -> None:
    torch.manual_seed(seed)
    x, linear = torch.randn(tokens, width).bfloat16(), nn.Linear(width, 33, bias=bias).bfloat16()
    expected = linear.float()(x.float()).detach()
    linear.bfloat16()
    assert_close(kernels_of(torch.bfloat16).multiply(x.float(), linear.weight, linear.bias), expected)


@pytest.mark.parametrize("tokens", [FEW_TOKENS, FEW_TOKENS + 1])
@pytest.mark.parametrize("use_kernels", [True, False])
def test_a_widened_product_is_the_linear_layer(tokens: int, use_kernels: bool) -> None:
    linear, x = nn.Linear(24, 10).bfloat16(), torch.randn(1, tokens, 24).bfloat16()
    wide = WideProduct(linear, Step(), use_kernels)
    with torch.no_grad():
        assert_close(wide(x), linear.float()(x.float()))
    linear.bfloat16()
    assert wide(x).requires_grad, "with gradients it is the layer itself"


def test_a_row_without_a_slot_gets_nothing_as_sdpa_gives() -> None:
    layer, states = ChunkWiseLayer(), torch.randn(2, 1, 1, 5, 8)
    kernels_of(torch.float32)
    layer.update(*states)
    assert not layer.attend(torch.randn(1, 2, 1, 8), torch.zeros(1, 1, 1, 5, dtype=torch.bool), 1.0).any()


def test_values_that_are_not_the_cache_s_own_are_attended_to_as_given() -> None:
    layer, states = ChunkWiseLayer(), torch.randn(2, 1, 1, 5, 8)
    keys, values = layer.update(*states)
    query = torch.randn(1, 1, 1, 8)
    output, _ = attention(nn.Module(), query, keys, 2 * values, None)
    expected = nn.functional.scaled_dot_product_attention(query, keys, 2 * values).transpose(1, 2)
    assert torch.allclose(output, expected)
    assert not layer.read_by_attention


def test_a_model_cast_after_attaching_runs_as_one_cast_before() -> None:
    model = ChunkWiseModel(build("llama").bfloat16(), adapter("llama"))
    late, early = model.model.float(), build("llama").bfloat16().float()
    expected = greedy(
        early,
        prompts((6,)),
        4,
    )[1]
    assert torch.allclose(greedy(model, prompts((6,)), 4, adapter_names="__base__")[1], expected, atol=1e-4)
    assert late is model.model


def test_a_widened_input_is_shared_until_it_changes_in_place() -> None:
    step, x = Step(), torch.ones(2, 3).bfloat16()
    first = step.widen(x)
    assert step.widen(x) is first
    x += 1
    assert torch.equal(step.widen(x), x.float())
    step.clear()
    with torch.inference_mode():
        x = torch.ones(2).bfloat16()
        step.widen(x)
        x += 1
        assert torch.equal(step.widen(x), x.float())


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
        layer.quantise(slots[:, :cold])
        layer.sweep(None, slots[:, cold:])
    query = 2 * torch.randn(batch, heads * group, 1, width).to(dtype)
    mask = None
    if masked:
        mask = torch.rand(batch, 1, 1, cold + hot) > 0.3
        mask[..., -1] = True  # as ever, a token sees itself
    kernels_of(dtype)
    assert layer.attends(query, mask)
    output = layer.attend(query, mask, 0.2)
    layer.dtype = torch.float32  # so that INT8 is widened without rounding
    keys, values = (states.double() for states in layer.read())
    expected = nn.functional.scaled_dot_product_attention(
        query.double(), keys, values, mask, scale=0.2, enable_gqa=True
    )
    assert_close(output, expected.transpose(1, 2))


@pytest.mark.parametrize("tokens", [1, 3])
def test_what_no_kernel_takes_goes_to_sdpa_over_the_widened_cache(tokens: int) -> None:
    layer, states = ChunkWiseLayer(use_kernels=False), torch.randn(2, 1, 2, 20, 8)
    layer.update(*states)
    slots = torch.arange(20)[None]
    layer.quantise(slots[:, :10])
    layer.sweep(None, slots[:, 10:])
    new = torch.randn(2, 1, 2, tokens, 8)
    layer.read_by_attention = True
    keys, values = layer.update(*new)
    assert keys.shape[2] == 10 + tokens, "only the hot pool is handed over"
    query, mask = torch.randn(1, 2, tokens, 8), torch.rand(1, 1, tokens, 20 + tokens) > 0.2
    output, _ = attention(nn.Module(), query, keys, values, mask)
    assert torch.equal(output, nn.functional.scaled_dot_product_attention(query, *layer.read(), mask).transpose(1, 2))


@pytest.mark.parametrize("how", ["switched off", "no compiler", "a compiler that fails", "not there"])
def test_without_kernels_the_same_tokens_come_from_pytorch(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ChunkWiseModel(build("llama"), adapter("llama"))
    expected = greedy(model, prompts(), 24)[0]
    if how == "switched off":
        monkeypatch.setenv("CHUNKWISE_KERNELS", "0")
    elif how == "no compiler":
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setattr(native.shutil, "which", lambda name: None)
    else:
        monkeypatch.setenv("CC", "false" if how == "a compiler that fails" else "/no/such/compiler -m64")
    monkeypatch.setattr(native, "kernels", native.kernels.__wrapped__)
    for module in ("cache", "layers"):
        monkeypatch.setattr(f"chunkwise_lora.engines.transformers.{module}.kernels", native.kernels)
    assert native.kernels(torch.float32) is None
    slow = ChunkWiseModel(build("llama"), adapter("llama"))
    assert torch.equal(greedy(slow, prompts(), 24)[0], expected)


@pytest.mark.parametrize("switched_off", ["kernels", "attention", "products"])
def test_each_fast_path_can_be_switched_off_alone(switched_off: str) -> None:
    fast = FastPaths(**{switched_off: False})
    expected = greedy(ChunkWiseModel(build("llama"), adapter("llama")), prompts(), 24)[0]
    assert torch.equal(greedy(ChunkWiseModel(build("llama"), adapter("llama"), fast=fast), prompts(), 24)[0], expected)
