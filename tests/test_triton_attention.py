"""The Triton attention of a decode step equals plain attention over what the cache holds, and appends in place."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from chunkwise_lora.backends.triton import attention
from chunkwise_lora.engines.transformers.cache.pool import Int8Pool

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


class Pools:
    """Random keys and values in a hot pool with room to spare, and maybe some in a cold pool."""

    def __init__(self, shape: tuple[int, int, int], cold: int, hot: int, int8_heads: list[int], dtype: torch.dtype):
        batch, heads, width = shape
        self.hot = [torch.randn(batch, heads, hot + 3, width).to(DEVICE, dtype) for _ in range(2)]
        self.cold: list[Int8Pool] = []
        self.used = cold, hot
        for _ in range(2 if cold else 0):
            states = torch.randn(batch, heads, cold, width).to(DEVICE, dtype)
            pool = Int8Pool(states, torch.tensor(int8_heads, device=DEVICE, dtype=torch.long))
            pool.append(states, 5)
            pool.append(states[:, :, :1], 5)  # so that there is room
            pool.used = cold
            self.cold.append(pool)

    def rows(self, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The two tensors that the kernels take."""
        numbers = [self.hot[0].data_ptr(), self.hot[1].data_ptr(), self.hot[0].shape[2], *[0] * 9]
        if self.cold:
            addresses = [getattr(pool, name).data_ptr() for pool in self.cold for name in ("codes", "scales", "others")]
            first = self.cold[0]
            numbers[3:] = [*addresses, first.codes.shape[2], len(first.int8_heads), first.places.data_ptr()]
        step = [*self.used, 0 if mask is None else mask.data_ptr(), 0 if mask is None else mask.stride(0)]
        rows = torch.empty(attention.POOLS, dtype=torch.int64, device=DEVICE), torch.empty(4, dtype=torch.int64)
        attention.on_device(numbers, rows[0])
        return rows[0], torch.tensor(step, device=DEVICE)

    def states(self) -> tuple[Tensor, Tensor]:
        """Keys and values (batch, heads, slots, width), cold slots first."""
        hot = [storage[:, :, : self.used[1]] for storage in self.hot]
        keys, values = [pool.read(states) for pool, states in zip(self.cold, hot, strict=True)] if self.cold else hot
        return keys, values


def assert_close(result: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert result.dtype == dtype
    assert (result.double() - expected).norm() <= TOLERANCES[dtype] * expected.norm()


@settings(max_examples=12, phases=[Phase.explicit, Phase.generate])  # the interpreter is slow
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.sampled_from([8, 16, 24])),
    group=st.sampled_from([1, 2, 17]),
    cold=st.sampled_from([0, 1, 63, 64, 150]),
    hot=st.sampled_from([1, 2, 65, 200]),
    int8=st.sets(st.integers(0, 2)),
    masked=st.booleans(),
    programs=st.sampled_from([1, 8, 32]),
    dtype=st.sampled_from(list(TOLERANCES)),
    seed=st.integers(0, 2**31),
)
def test_it_equals_plain_attention(
    shape: tuple[int, int, int],
    group: int,
    cold: int,
    hot: int,
    int8: set[int],
    masked: bool,
    programs: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    batch, heads, width = shape
    pools = Pools(shape, cold, hot, sorted(head for head in int8 if head < heads), dtype)
    mask = None
    if masked:
        mask = torch.zeros(batch, cold + hot + 7, dtype=torch.uint8, device=DEVICE)
        mask[:, : cold + hot] = torch.rand(batch, cold + hot) < 0.4
        mask[:, cold + hot - 1] = 1
    query = torch.randn(batch, 1, heads * group, width).to(DEVICE, dtype).transpose(1, 2)
    keys, values = (states.double().repeat_interleave(group, 1) for states in pools.states())
    scores = query.double() @ keys.transpose(2, 3) * 0.3
    if mask is not None:
        scores.masked_fill_(mask[:, None, None, : cold + hot] == 0, -torch.inf)
    expected = (scores.softmax(-1) @ values).transpose(1, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "PROGRAMS", programs)
        assert_close(attention.attend(query, *pools.rows(mask), heads, 0.3), expected, dtype)


def test_unseen_slots_and_room_are_not_read() -> None:
    pools = Pools((1, 2, 16), 70, 90, [0], torch.float32)
    mask = (torch.arange(160, device=DEVICE)[None] % 3 == 0).to(torch.uint8)
    query = torch.randn(1, 4, 1, 16, device=DEVICE)
    expected = attention.attend(query, *pools.rows(mask), 2, 0.5)
    for pool, storage in zip(pools.cold, pools.hot, strict=True):
        cold, hot = mask[0, :70] == 0, mask[0, 70:] == 0
        pool.scales[:, :, 70:], pool.others[:, :, 70:], storage[:, :, 90:] = (torch.nan,) * 3
        pool.scales[:, :, :70][:, :, cold], pool.others[:, :, :70][:, :, cold] = torch.nan, torch.nan
        storage[:, :, :90][:, :, hot] = torch.nan
    assert torch.equal(attention.attend(query, *pools.rows(mask), 2, 0.5), expected)


def test_a_sequence_that_sees_no_slot_gets_zeros() -> None:
    pools = Pools((2, 1, 16), 0, 5, [], torch.float32)
    mask = torch.tensor([[0] * 5, [1] * 5], dtype=torch.uint8, device=DEVICE)
    result = attention.attend(torch.randn(2, 1, 1, 16, device=DEVICE), *pools.rows(mask), 1, 0.5)
    assert not result[0].any() and result[1].any()


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_new_token_is_written_into_the_last_slot_and_nowhere_else(dtype: torch.dtype) -> None:
    pools = Pools((2, 3, 24), 0, 5, [], dtype)
    before = [storage.clone() for storage in pools.hot]
    new = [torch.randn(2, 1, 3, 24).to(DEVICE, dtype).transpose(1, 2) for _ in range(2)]
    attention.append(*new, *pools.rows(None))
    for storage, old, states in zip(pools.hot, before, new, strict=True):
        assert torch.equal(storage[:, :, 4:5], states)
        storage[:, :, 4] = old[:, :, 4]
        assert torch.equal(storage, old)


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from chunkwise_lora.backends.triton.attention_kernels import append_kernel, attend_kernel, combine_kernel

types = dict.fromkeys(["query", "keys", "values", "output"], "*bf16") | {"scaling": "fp32"}
types |= dict.fromkeys(["partial", "norms"], "*fp32") | dict.fromkeys(["pools", "step"], "*i64")
for group in 1, 4:
    constants = dict(HEADS=8, GROUP=group, WIDTH=128, SPLITS=16, BLOCK_G=16, BLOCK_D=128, BLOCK_N=64, WIDEN=False)
    for kernel in append_kernel, attend_kernel, combine_kernel:
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
        numbers = [i for i, name in enumerate(names) if signature[name] not in ("constexpr", "fp32")]
        aligned = {(i,): [["tt.divisibility", 16]] for i in numbers}
        source = ASTSource(kernel, signature, {name: constants[name] for name in names if name in constants}, aligned)
        ptx = compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
        assert kernel is not attend_kernel or "mma" in ptx
"""


def test_the_kernels_compile_for_a_gpu_without_having_one() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE], env=environment, capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr
