"""Many tenants: one decode step of 32 sequences, each with an adapter of its own.

The model has the layers of the 7B shape, but fewer of them: every layer takes the same time, and adapters of 32 layers
take minutes to load. All adapters hold the same numbers, each in its own memory.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from chunkwise_lora.benchmark.measure import random_prompt
from chunkwise_lora.benchmark.methods import methods
from chunkwise_lora.benchmark.run import Run
from chunkwise_lora.benchmark.shapes import SHAPES, random_adapter, random_model
from chunkwise_lora.ladder import RankLadder
from chunkwise_lora.method.config import ChunkWiseConfig
from gpu_parts import engine
from gpu_parts.cells import Cell, Settings

LAYERS = 4
CONFIGS = {"lossless": ChunkWiseConfig.uniform(1.0), "half rank": ChunkWiseConfig.uniform(0.5)}


def cells(settings: Settings) -> Iterator[Cell]:
    """Yield one cell per rank."""
    tenants, context = (3, 16) if settings.tiny else (32, 128)
    for rank in (4,) if settings.tiny else (64, 16):
        inputs = {"layers": LAYERS, "context": context}
        yield Cell(f"{tenants} tenants, rank {rank}", partial(measure, settings, rank, tenants, context), inputs)


@torch.no_grad()
def measure(settings: Settings, rank: int, tenants: int, context: int) -> dict[str, Any]:
    """Return the ms per step of each method."""
    config = copy.deepcopy(engine.TINY if settings.tiny else SHAPES["7B"])
    config.num_hidden_layers = min(LAYERS, config.num_hidden_layers)
    base = random_model(config, settings.dtype, settings.device)
    folder = random_adapter(config, rank, settings.scratch / f"tenant-{rank}")
    ladder = RankLadder.load(folder)
    names = [f"tenant{number}" for number in range(tenants)]
    made = methods(base, dict.fromkeys(names, folder), CONFIGS, ladders=dict.fromkeys(names, ladder))
    rounds, steps = (1, 1) if settings.tiny else (5, 8)
    prompt = random_prompt(base, tenants, context)
    runs = {method.name: Run(method, prompt, context + engine.WARM_UP + rounds * steps) for method in made}
    try:
        for run in runs.values():
            run.prefill()
            run.decode(engine.WARM_UP)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                times[name].append(run.decode(steps))
    finally:
        for run in reversed(runs.values()):
            run.close()
    adapter_bytes = sum(module.cost * module.rank for module in ladder.modules.values()) * settings.dtype.itemsize
    return {
        "ms": {name: statistics.median(of_method) for name, of_method in times.items()},
        "bytes": {
            "base": sum(parameter.nbytes for parameter in base.parameters()),
            "adapters": tenants * adapter_bytes,
        },
    }


def table(measured: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table per cell."""
    lines = [f"One step of a model of {LAYERS} layers of the 7B shape; in brackets the ratio to the base.", ""]
    for cell, result in measured.items():
        ms, nbytes = result["ms"], result["bytes"]
        shown = ", ".join(f"{name} {value:.2f} ms ({value / ms[engine.BASE]:.2f})" for name, value in ms.items())
        bound = 1 + nbytes["adapters"] / nbytes["base"]
        lines.append(f"- {cell}: {shown}. By the bytes that a step reads, full rank takes at least {bound:.2f}.")
    return lines
