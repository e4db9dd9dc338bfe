"""The adapter product of one linear layer: our kernels, PyTorch's products, PEFT's layer and vLLM's kernels.

Every time is that of the GPU for the whole layer, base product included, as replays of a CUDA graph. A graph runs
several copies of the layer one after the other, which together do not fit into the GPU's cache: in a model, too, other
weights are read between two uses of an adapter. PEFT's layer copies indices to the GPU for a batch of several adapters,
which a graph cannot hold; it is timed without a graph there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from gpu_parts.cells import Cell, Settings
from gpu_parts.timing import Run, captured, interleaved, relative_error

FEATURES = 4096
"""Inputs and outputs of the layer: those of the attention of a 7B model."""
COLD_BYTES = 150e6
"""The copies of a layer have at least this number of bytes, three times the cache of an H100."""
MOST_COPIES = 32
BASE, OURS, HALF, PRODUCTS, PEFT, VLLM = "base", "ours", "ours, half rank", "PyTorch products", "PEFT", "vLLM"
Factors = tuple[Tensor, Tensor]

MIXED = (8, 16, 32, 64, 128)
"""Ranks that the adapters of a batch of mixed ranks have in turn."""
BATCHES: dict[Sequence[int], list[tuple[int, int]]] = {
    (16,): [(1, 1), (8, 1), (8, 8), (64, 1), (64, 32), (64, 64), (512, 1), (512, 64)],
    (64,): [(1, 1), (8, 8), (64, 32), (64, 64), (512, 64)],
    MIXED: [(64, 32), (64, 64), (512, 64)],
    (8,): [(1, 1), (64, 32)],
    (128,): [(1, 1), (64, 32)],
}
"""By ranks, the numbers of tokens and adapters."""
TINY: dict[Sequence[int], list[tuple[int, int]]] = {(4,): [(1, 1), (5, 2)], (2, 4): [(5, 2)]}


def cells(settings: Settings) -> Iterator[Cell]:
    """Yield one cell per batch."""
    for ranks, batches in (TINY if settings.tiny else BATCHES).items():
        for tokens, adapters in batches:
            rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
            name = f"rank {rank}, {tokens} tokens, {adapters} adapters"
            inputs = {"vllm": settings.vllm_kernels is not None}
            yield Cell(name, partial(measure, settings, ranks, tokens, adapters), inputs)


def measure(settings: Settings, ranks: Sequence[int], tokens: int, adapters: int) -> dict[str, Any]:
    """Return the ms per layer and the relative error of each method."""
    device, features = settings.device, 64 if settings.tiny else FEATURES
    dtype = torch.float16 if settings.tiny else settings.dtype  # Triton's interpreter multiplies no bfloat16
    of_tokens = torch.arange(tokens, device=device) % adapters
    total_rank = sum(ranks[slot % len(ranks)] for slot in range(adapters))
    nbytes = 2 * features * (features + 2 * total_rank)
    count = 1 if settings.tiny else min(MOST_COPIES, int(COLD_BYTES / nbytes) + 1)
    with torch.inference_mode():
        copies = [Layer(features, ranks, of_tokens, dtype, settings) for _ in range(count)]
        first = copies[0].methods
        exact = copies[0].exact()
        errors = {name: relative_error(run(), exact) for name, run in first.items() if name not in (BASE, HALF)}
        in_graph = [name for name in first if name != PEFT or adapters == 1]
        runs = {
            name: captured(partial(_run_all, [layer.methods[name] for layer in copies]), device) for name in in_graph
        }
        ms = interleaved(runs, device, rounds=3 if settings.tiny else 21)
        if PEFT not in runs:
            ms |= interleaved({PEFT: first[PEFT]}, device, rounds=3, calls=1 if settings.tiny else count)
            ms[PEFT] *= count
    return {"ms": {name: value / count for name, value in ms.items()}, "errors": errors, "copies": count}


def _run_all(runs: Sequence[Run]) -> None:
    for run in runs:
        run()


class Layer:
    """A linear layer with its own weights, adapters, input and output."""

    def __init__(
        self, features: int, ranks: Sequence[int], of_tokens: Tensor, dtype: torch.dtype, settings: Settings
    ) -> None:
        from chunkwise_lora.backends.triton.schedule import Schedule
        from chunkwise_lora.backends.triton.table import AdapterTable, Directions

        def normal(*shape: int) -> Tensor:
            return (torch.randn(shape, device=settings.device) / shape[-1] ** 0.5).to(dtype)

        tokens, adapters = len(of_tokens), int(of_tokens.max()) + 1
        of_adapters = [ranks[slot % len(ranks)] for slot in range(adapters)]
        self.weight, self.x = normal(features, features), normal(tokens, features)
        self.factors = [(normal(rank, features), normal(features, rank)) for rank in of_adapters]
        self.of_tokens = of_tokens
        directions = [
            [Directions(down, up, (rank // 2, rank))]
            for (down, up), rank in zip(self.factors, of_adapters, strict=True)
        ]
        self._table = AdapterTable.of(directions, device=settings.device, dtype=dtype)
        slots = of_tokens.cpu().numpy()
        schedules = {}
        for name, rung in ((OURS, 1), (HALF, 0)):
            schedules[name] = Schedule(tokens, adapters, 2, settings.device)
            schedules[name].update(slots, np.tile(np.eye(2, dtype=np.float32)[rung], (tokens, 1)))
        self._rows = [torch.nonzero(of_tokens == slot)[:, 0] for slot in range(adapters)]
        self.methods: dict[str, Run] = {
            BASE: self._base,
            **{name: partial(self._ours, schedule) for name, schedule in schedules.items()},
            PRODUCTS: self._products,
            PEFT: self._peft(of_adapters, slots),
        }
        """By name, what returns the layer's output (tokens, features)."""
        if settings.vllm_kernels is not None:
            from gpu_parts.vllm_kernels import LoraKernels

            kernels = LoraKernels(settings.vllm_kernels, self.factors, of_tokens)
            self.methods[VLLM] = partial(self._vllm, kernels)

    def exact(self) -> Tensor:
        """Return the output in float64."""
        y = self.x.double() @ self.weight.double().T
        for (down, up), rows in zip(self.factors, self._rows, strict=True):
            y[rows] += self.x[rows].double() @ down.double().T @ up.double().T
        return y

    def _base(self) -> Tensor:
        return nn.functional.linear(self.x, self.weight)

    def _ours(self, schedule: Any) -> Tensor:
        y = self._base()
        self._table.add(y, self.x, schedule)
        return y

    def _products(self) -> Tensor:
        y = self._base()
        if len(self.factors) == 1:
            ((down, up),) = self.factors
            return y.addmm_(nn.functional.linear(self.x, down), up.T)
        for (down, up), rows in zip(self.factors, self._rows, strict=True):
            y.index_add_(0, rows, nn.functional.linear(nn.functional.linear(self.x[rows], down), up))
        return y

    def _vllm(self, kernels: Any) -> Tensor:
        y = self._base()
        kernels.add(y, self.x)
        return y

    def _peft(self, of_adapters: Sequence[int], slots: np.ndarray) -> Run:
        """Return PEFT's forward of a layer with the same adapters."""
        holder = nn.Sequential(nn.Linear(*reversed(self.weight.shape), bias=False, device="meta"))
        holder[0].weight = nn.Parameter(self.weight, requires_grad=False)
        names = [f"adapter{slot}" for slot in range(len(of_adapters))]
        for name, rank in zip(names, of_adapters, strict=True):
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"], init_lora_weights=False)
            inject_adapter_in_model(config, holder, name)
        layer: Any = holder[0]
        for name, (down, up) in zip(names, self.factors, strict=True):
            layer.lora_A[name].weight, layer.lora_B[name].weight = (
                nn.Parameter(factor, requires_grad=False) for factor in (down, up)
            )
        layer.eval()
        if len(names) == 1:
            return partial(layer, self.x)
        return partial(layer, self.x, adapter_names=[names[slot] for slot in slots])


def table(measured: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table: the ms of the layer, and what the adapters add, relative to our kernels."""
    lines = [
        "Microseconds of one layer with its adapters; in brackets what the adapters add to the base, divided by what "
        "they add with our kernels.",
        "",
    ]
    names = [BASE, OURS, HALF, PRODUCTS, PEFT, VLLM]
    lines += [f"| | {' | '.join(names)} | worst error |", f"|---|{'---:|' * (len(names) + 1)}"]
    for cell, result in measured.items():
        ms = result["ms"]
        own = max(ms[OURS] - ms[BASE], 1e-6)
        shown = [
            ""
            if name not in ms
            else f"{ms[name] * 1e3:.1f}"
            if name in (BASE, OURS)
            else f"{ms[name] * 1e3:.1f} ({(ms[name] - ms[BASE]) / own:.2f})"
            for name in names
        ]
        lines.append(f"| {cell} | {' | '.join(shown)} | {max(result['errors'].values()):.0e} |")
    return lines
