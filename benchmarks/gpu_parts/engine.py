"""The transformers engine beside the base, PEFT, and merged and unmerged models that are compiled.

The models have random weights. The caches of baselines are filled with random numbers, which changes no time. A method
is measured in three turns, at long contexts in one. Every turn runs each method once, and begins with another one. Only
one cache of a method lives at a time, so that long contexts fit. Compiled methods run transformers' static cache, with
`torch.compile` and CUDA graphs, as transformers itself does.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel, StaticCache

from chunkwise_lora.benchmark.measure import random_prompt
from chunkwise_lora.benchmark.methods import BASE, MERGED, UNMERGED, Method, methods, sharing_weights
from chunkwise_lora.benchmark.run import Run
from chunkwise_lora.benchmark.shapes import SHAPES, random_adapter, random_model
from chunkwise_lora.engines.transformers import ChunkWiseModel, FastPaths
from chunkwise_lora.engines.transformers.versions import CACHE
from chunkwise_lora.method.config import ChunkWiseConfig
from gpu_parts.cells import Cell, Settings

MERGED_COMPILED, PEFT_COMPILED = "PEFT merged, compiled", "PEFT unmerged, compiled"
COMPILED = {MERGED_COMPILED: MERGED, PEFT_COMPILED: UNMERGED}
"""Compiled methods by the method whose model they compile."""
LOSSLESS, BALANCED, COMPACT = (f"ChunkWise {name}" for name in ("lossless", "balanced", "compact"))
EAGER = "ChunkWise lossless, no graphs"
PRESETS = ("lossless", "balanced", "compact")
RANK = 16

TINY = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=60,
    eos_token_id=None,
)


@dataclass(frozen=True)
class Case:
    """One batch of prompts, and the methods that run it."""

    shape: str
    context: int
    batch: int
    methods: tuple[str, ...]
    is_prefill: bool = False
    """Whether the prefill is timed instead of decode steps."""

    @property
    def name(self) -> str:
        """The name of its cell."""
        kind = "prefill" if self.is_prefill else "decode"
        return f"{self.shape}, {kind}, context {self.context}, batch {self.batch}"


EVERY = (BASE, UNMERGED, LOSSLESS, EAGER, BALANCED, COMPACT, MERGED_COMPILED, PEFT_COMPILED)
CASES = (
    Case("7B", 1024, 1, EVERY),
    Case("7B", 4096, 1, (BASE, MERGED, UNMERGED, LOSSLESS, BALANCED), is_prefill=True),
    Case("7B", 32_768, 1, (UNMERGED, LOSSLESS, BALANCED, COMPACT, PEFT_COMPILED)),
    Case("7B", 8192, 8, (BALANCED, PEFT_COMPILED)),  # no memory for more
    Case("1B", 1024, 1, EVERY),
    Case("1B", 32_768, 1, (BASE, UNMERGED, LOSSLESS, BALANCED, COMPACT)),
    Case("1B", 8192, 8, (BASE, UNMERGED, LOSSLESS, BALANCED, COMPACT)),
    Case("1B", 8192, 1, (BASE, UNMERGED, LOSSLESS, BALANCED, COMPACT)),
)
"""The most important first, and those of a shape that need the merged model before the others."""
TINY_CASES = (
    Case("tiny", 24, 1, EVERY),
    Case("tiny", 24, 2, (BASE, MERGED, UNMERGED, LOSSLESS), is_prefill=True),
)


def cells(settings: Settings) -> Iterator[Cell]:
    """Yield one cell per case."""
    models: dict[str, Models] = {}
    for case in TINY_CASES if settings.tiny else CASES:
        yield Cell(case.name, partial(_measure, case, settings, models), {"methods": list(case.methods)})


def _measure(case: Case, settings: Settings, models: dict[str, Models]) -> dict[str, Any]:
    if case.shape not in models:
        models.clear()  # frees the weights of the shape before
        free_memory(settings.device)
        models[case.shape] = Models(case.shape, settings)
    try:
        return models[case.shape].measure(case)
    finally:
        free_memory(settings.device)


class Models:
    """The methods that run one shape. All share the base's weights, except the merged model."""

    def __init__(self, shape: str, settings: Settings) -> None:
        shape_config = TINY if settings.tiny else SHAPES[shape]
        base = random_model(shape_config, settings.dtype, settings.device)
        folder = random_adapter(shape_config, 4 if settings.tiny else RANK, settings.scratch / shape)
        configs = {name: ChunkWiseConfig.preset(name) for name in PRESETS}
        self.methods = {method.name: method for method in methods(base, {"adapter": folder}, configs)}
        config = configs["lossless"]
        eager = ChunkWiseModel(sharing_weights(base), folder, config, FastPaths(graphs=False))
        self.methods[EAGER] = Method(EAGER, eager.base, chunkwise=eager, config=config)
        self._settings = settings
        self._base = base
        self._compiled: dict[str, Callable[..., Any]] = {}
        self._static: StaticCache | None = None

    def measure(self, case: Case) -> dict[str, Any]:
        """Return per method the ms per step and the memory above the weights, which all turns share."""
        if not {MERGED, MERGED_COMPILED} & set(case.methods):  # its weights are needed for caches
            self.methods.pop(MERGED, None)
            self._compiled.pop(MERGED_COMPILED, None)
            free_memory(self._settings.device)
        tiny = self._settings.tiny
        turns, steps = (1, 2) if tiny else (3, 24) if case.context * case.batch <= MANY_TOKENS else (1, 48)
        prompt = random_prompt(self._base, case.batch, case.context)
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in case.methods}
        length = case.context + turns * (WARM_UP + steps)
        try:
            for turn in range(turns):
                first = turn % len(case.methods)
                for name in (*case.methods[first:], *case.methods[:first]):
                    found[name].append(self._turn(case, name, prompt, steps, length))
                    free_memory(self._settings.device)
        finally:
            self._static = None
        return {name: _summary(of_method) for name, of_method in found.items()}

    @torch.no_grad()
    def _turn(self, case: Case, name: str, prompt: Tensor, steps: int, length: int) -> dict[str, Any]:
        device = self._settings.device
        before = _allocated(device)
        run = self._start(name, prompt, length)
        try:
            if case.is_prefill:
                run.prefill()
                return {"ms": self._prefill(name, prompt, length), "memory": _peak(device) - before}
            prefill = run.prefill() if name.startswith("ChunkWise") else run.fill()
            run.decode(WARM_UP)
            _reset_peak(device)
            ms = run.decode(steps)
            return {
                "ms": ms,
                "prefill_ms": prefill,
                "memory": _peak(device) - before,
                "kv_bytes": run.kv_bytes,
                "planning_ms": run.scheduler_seconds * 1e3 / (WARM_UP + steps),
            }
        finally:
            run.close()

    def _prefill(self, name: str, prompt: Tensor, length: int) -> float:
        run = self._start(name, prompt, length)
        try:
            return run.prefill()
        finally:
            run.close()

    def _start(self, name: str, prompt: Tensor, length: int) -> Any:
        if name not in COMPILED:
            return Run(self.methods[name], prompt, length)
        method = self.methods[COMPILED[name]]
        model: PreTrainedModel = method.model.base_model.model if name == PEFT_COMPILED else method.model
        if name not in self._compiled:
            self._compiled[name] = _compiled(model, self._settings.device)
        if self._static is None:  # one for all compiled methods: another cache would be compiled again
            self._static = StaticCache(config=model.config, max_cache_len=length)
        return CompiledRun(self._compiled[name], method, prompt, self._static)


MANY_TOKENS = 4096
"""Batches with more tokens than this run in one turn, because their prefill takes seconds."""

WARM_UP = 4
"""Steps before the timed ones: two compile and record, the others repeat."""


class CompiledRun(Run):
    """A generation by a compiled model, with a static cache."""

    def __init__(self, forward: Callable[..., Any], method: Method, prompt: Tensor, cache: StaticCache) -> None:
        super().__init__(method, prompt, 0)
        self._compiled_forward = forward
        cache.reset()
        self.cache = cache
        self._position = torch.full((len(prompt), 1), prompt.shape[1], device=prompt.device)

    def _pass(self, tokens: Tensor) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        output = self._compiled_forward(
            input_ids=tokens, position_ids=self._position, **{CACHE: self.cache}, use_cache=True, logits_to_keep=1
        )
        self._next = output.logits[:, -1].argmax(-1, keepdim=True)
        self._position = self._position + 1


def _compiled(model: PreTrainedModel, device: torch.device) -> Callable[..., Any]:
    if device.type != "cuda":
        return torch.compile(model.forward, backend="aot_eager")  # it needs no C++ compiler
    return torch.compile(model.forward, mode="reduce-overhead", dynamic=False)


def _summary(turns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: statistics.median(turn[name] for turn in turns) for name in turns[0] if turns[0][name] is not None}


def free_memory(device: torch.device) -> None:
    """Free what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def table(measured: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table per case."""
    lines = ["Medians over turns. Memory is that above the weights, while decoding or at the peak of a prefill.", ""]
    lines += ["| | ms | of PEFT | of PEFT compiled | memory, GB | KV cache, GB | planning, ms |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|"]
    for cell, of_methods in measured.items():
        lines.append(f"| **{cell}** | | | | | | |")
        for name, one in of_methods.items():
            ratios = [
                f"{one['ms'] / of_methods[other]['ms']:.2f}" if other in of_methods else ""
                for other in (UNMERGED, PEFT_COMPILED)
            ]
            sizes = [f"{one[key] / 1e9:.2f}" if one.get(key) else "" for key in ("memory", "kv_bytes")]
            planning = f"{one['planning_ms']:.2f}" if one.get("planning_ms") else ""
            lines.append(f"| {name} | {one['ms']:.2f} | {' | '.join([*ratios, *sizes, planning])} |")
    return lines
