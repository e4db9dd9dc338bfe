"""Time the adapters of one linear layer on a GPU: Triton kernels, plain PyTorch, and the base product alone.

    python benchmarks/triton_adapter.py [--inputs 4096 --outputs 4096] [--adapters 4] [--dtype bfloat16]

Each line is one batch, whose tokens use the adapters in turn. Times are medians in ms. With "half" every token runs at
half the rank, with "idle" no token has an adapter. The last columns replay CUDA graphs. They show the time of the GPU
alone, without launching from Python, and with data in the GPU's cache; the other columns start with a cold cache.
"Error" is the largest difference between the Triton kernels and PyTorch in float64, relative to the largest result.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

DEVICE = "cuda"
RANKS = [8, 16, 64]
TOKENS = [1, 8, 64, 512, 4096]


def gate_form(y: Tensor, x: Tensor, factors: list[tuple[Tensor, Tensor]], rows: list[Tensor], gates: Tensor) -> Tensor:
    """y plus up (g * (down x)), adapter by adapter: down (r, in), up (r, out), gates (r,)."""
    for (down, up), of_adapter in zip(factors, rows, strict=True):
        hidden = nn.functional.linear(x[of_adapter], down) * gates
        y.index_add_(0, of_adapter, hidden.to(up.dtype) @ up)
    return y


def compare(weight: Tensor, rank: int, tokens: int, adapters: int) -> tuple[list[Callable[[], Any]], float]:
    """Functions that run the base, plain PyTorch, Triton, Triton at half the rank and idle; and Triton's error."""
    from chunkwise_lora.backends.triton.schedule import Schedule
    from chunkwise_lora.backends.triton.table import AdapterTable, Directions

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, device=DEVICE) / shape[-1] ** 0.5).to(weight.dtype)

    outputs, inputs = weight.shape
    ladders = [Directions(normal(rank, inputs), normal(outputs, rank), (rank // 2, rank)) for _ in range(adapters)]
    table = AdapterTable.of([[ladder] for ladder in ladders], device=DEVICE, dtype=weight.dtype)
    factors = [(ladder.down, ladder.up.T.contiguous()) for ladder in ladders]
    slots = np.arange(tokens) % adapters
    rows = [torch.from_numpy(np.flatnonzero(slots == slot)).to(DEVICE) for slot in range(adapters)]
    gates = torch.ones(rank, device=DEVICE)
    schedules = [Schedule(tokens, adapters, 2, DEVICE) for _ in range(3)]
    for schedule, weights in zip(schedules, ([0, 1], [1, 0], [0, 0]), strict=True):
        schedule.update(slots, np.tile(np.array(weights, np.float32), (tokens, 1)))

    x, y = normal(tokens, inputs), torch.zeros(tokens, outputs, device=DEVICE, dtype=weight.dtype)
    table.add(y, x, schedules[0])
    wide = [(down.double(), up.double()) for down, up in factors]
    exact = gate_form(torch.zeros_like(y, dtype=torch.float64), x.double(), wide, rows, gates.double())
    error = float((y - exact).abs().max() / exact.abs().max())
    runs = [
        partial(nn.functional.linear, x, weight),
        partial(gate_form, y, x, factors, rows, gates),
        *(partial(table.add, y, x, schedule) for schedule in schedules),
    ]
    return runs, error


def main(
    inputs: Annotated[int, typer.Option(help="Columns of x.")] = 4096,
    outputs: Annotated[int, typer.Option(help="Columns of y.")] = 4096,
    adapters: Annotated[int, typer.Option(help="Adapters in a batch.")] = 4,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "bfloat16",
) -> None:
    """Time all batches and print a table."""
    if not torch.cuda.is_available():
        Console(stderr=True).print("This benchmark needs a CUDA GPU, and PyTorch finds none.")
        raise typer.Exit(1)
    from triton.testing import do_bench, do_bench_cudagraph

    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    weight = (torch.randn(outputs, inputs, device=DEVICE) / inputs**0.5).to(getattr(torch, dtype))
    title = f"{torch.cuda.get_device_name()}, {dtype}, {inputs} to {outputs}, {adapters} adapters, ms"
    cold, graphs = ["base", "PyTorch", "Triton", "half"], ["graph: base", "Triton", "half", "idle"]
    table = Table("rank", "tokens", *cold, *graphs, "error", title=title)
    for rank in RANKS:
        for tokens in TOKENS:
            runs, error = compare(weight, rank, tokens, adapters)
            times = [do_bench(run, return_mode="median") for run in runs[:4]]
            with torch.cuda.stream(torch.cuda.Stream()):
                times += [do_bench_cudagraph(run, return_mode="median") for run in (runs[0], *runs[2:])]
            table.add_row(str(rank), str(tokens), *(f"{ms:.3f}" for ms in times), f"{error:.0e}")
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
