"""Time the attention of one new token over a cache: PyTorch's sdpa, Inductor and the package's C kernel.

    python benchmarks/decode_attention.py [--slots 1024 --slots 4096] [--heads 9 --kv-heads 3]

Each line is one layer of a model in bfloat16. Times are medians of interleaved calls, in microseconds. In the
column "kernel, INT8" seven eighths of the slots are INT8, in "Inductor, INT8" all are.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from chunkwise_lora.engines.transformers.cache import ChunkWiseLayer


def products(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of query (kv_heads, group, 1, width), written as products and sums that a compiler can fuse."""
    scores = (query.float() * keys.float()[:, None]).sum(-1) * query.shape[-1] ** -0.5
    return (scores.softmax(-1)[..., None] * values.float()[:, None]).sum(2)


def int8_products(query: Tensor, keys: Tensor, scales: Tensor, values: Tensor, value_scales: Tensor) -> Tensor:
    """The same with INT8 keys and values (kv_heads, slots, width) and their scales (kv_heads, slots, 1)."""
    scores = (query.float() * keys.float()[:, None]).sum(-1) * scales[..., 0].float()[:, None] * query.shape[-1] ** -0.5
    weights = scores.softmax(-1) * value_scales[..., 0].float()[:, None]
    return (weights[..., None] * values.float()[:, None]).sum(2)


def layer_of(states: Tensor, cold: int) -> ChunkWiseLayer:
    """A cache layer that holds states (2, 1, heads, slots, width), the first `cold` of them in INT8."""
    layer = ChunkWiseLayer()
    layer.update(*states)
    if cold:
        slots = torch.arange(states.shape[3])[None]
        layer.rearrange(to_cold=slots[:, :cold], hot=slots[:, cold:])
    return layer


def main(
    slots: Annotated[list[int] | None, typer.Option(help="Slots of the cache. May be repeated.")] = None,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 9,
    kv_heads: Annotated[int, typer.Option(help="Key-value heads.")] = 3,
    width: Annotated[int, typer.Option(help="Numbers per head.")] = 64,
    rounds: Annotated[int, typer.Option(help="Timed calls of each method.")] = 41,
) -> None:
    """Time the attention of one layer and print a table."""
    torch.set_grad_enabled(False)
    group = heads // kv_heads
    fused, fused_int8 = (torch.compile(f, dynamic=True) for f in (products, int8_products))
    table = Table("slots", "sdpa", "float32 products", "Inductor", "kernel", "Inductor, INT8", "kernel, INT8")
    for count in slots or [128, 1024, 4096, 8192]:
        states = torch.randn(2, 1, kv_heads, count, width).bfloat16()
        query = torch.randn(1, heads, 1, width).bfloat16()
        grouped = query.view(kv_heads, group, 1, width)
        full, mixed, cold = (layer_of(states, share) for share in (0, count * 7 // 8, count))
        keys, values = states[:, 0]
        assert cold.cold is not None
        int8 = [getattr(pool, name)[0] for pool in cold.cold for name in ("codes", "scales")]

        def sdpa(states: Tensor = states, query: Tensor = query) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(query, *states, enable_gqa=True)

        def widened(states: Tensor = states, query: Tensor = query) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(query.float(), *states.float(), enable_gqa=True)

        runs: list[Callable[[], Tensor]] = [
            sdpa,
            widened,
            lambda q=grouped, k=keys, v=values: fused(q, k, v),
            lambda layer=full, q=query: layer.attend(q, None, width**-0.5),
            lambda q=grouped, int8=int8: fused_int8(q, *int8),
            lambda layer=mixed, q=query: layer.attend(q, None, width**-0.5),
        ]
        times: list[list[float]] = [[] for _ in runs]
        for turn in range(rounds + 3):
            for run, of_run in zip(runs, times, strict=True):
                start = time.perf_counter()
                run()
                if turn > 2:
                    of_run.append(time.perf_counter() - start)
        table.add_row(str(count), *(f"{statistics.median(of_run) * 1e6:,.0f}" for of_run in times))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
