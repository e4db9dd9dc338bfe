"""Latency of adapters in llama.cpp: the base model, llama.cpp's own LoRA, and ChunkWise, in interleaved rounds."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llama_cpp import Llama

from chunkwise_lora.engines.llama_cpp import ChunkWiseLlama
from chunkwise_lora.engines.llama_cpp.base_model import base_of
from chunkwise_lora.errors import EngineError
from chunkwise_lora.ladder import LadderModule, RankLadder, even_ranks
from chunkwise_lora.ladder.gguf import GgufBase, write_gguf
from chunkwise_lora.method.config import ChunkWiseConfig

BASE, OWN = "base, no adapter", "llama.cpp's own LoRA"
MODULES = {
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.qkv_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",  # also names the gate and up of Phi-3 in one
    "mlp.down_proj",
}
"""Modules of a random adapter, as transformers names them; those that the model has."""


@dataclass(frozen=True)
class LlamaMeasurement:
    """The times of one method. They are medians over rounds, and ratios are medians of the ratios of each round."""

    name: str
    context: int
    """Prompt tokens."""
    prefill_ms: float
    decode_ms: float
    """Milliseconds per new token."""
    prefill_over_base: float
    decode_over_base: float
    prefill_over_own: float
    """Ratio to llama.cpp's own LoRA, with factors in float16."""
    decode_over_own: float


@dataclass
class _Record:
    prefills: list[float] = field(default_factory=list)
    decodes: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    new_tokens: int = 32
    """Tokens that a round decodes."""
    rounds: int = 7
    """Rounds of each context."""
    threads: int = 1
    """Threads of llama.cpp."""


def measure_llama(
    model: str | Path,
    ladder: RankLadder | int,
    presets: Mapping[str, ChunkWiseConfig],
    contexts: Sequence[int],
    sizes: Sizes,
    advance: Callable[[], None] = lambda: None,
) -> list[LlamaMeasurement]:
    """Time prompts of random tokens, and the tokens after them, one by one. Sampling is not timed.

    Args:
        model: A GGUF file.
        ladder: The adapter, or the rank of a random one on all linear modules.
        presets: Settings of ChunkWise by the name that the results show.
        contexts: Prompt lengths in tokens.
        sizes: How much is measured.
        advance: Called after each method of a round.

    Raises:
        EngineError: The model cannot be loaded, or the adapter does not fit it.
    """
    options: dict[str, Any] = {
        "n_ctx": max(contexts) + sizes.new_tokens,
        "n_threads": sizes.threads,
        "n_threads_batch": sizes.threads,
        "flash_attn": True,
        "verbose": False,
    }
    base = ChunkWiseLlama(str(model), **options)  # it refuses what cannot be read
    facts = base_of(base)
    adapter = random_ladder(facts, ladder) if isinstance(ladder, int) else ladder
    methods: dict[str, Any] = {BASE: Llama(str(model), **options)}
    with tempfile.TemporaryDirectory(prefix="chunkwise-") as folder:
        path = Path(folder) / "adapter.gguf"
        write_gguf(adapter, path, base=facts, dtype="f16")
        methods[OWN] = Llama(str(model), lora_path=str(path), **options)
    for name, config in presets.items():
        methods[f"ChunkWise {name}"] = ChunkWiseLlama(str(model), adapter, chunkwise_config=config, **options)
    results = []
    for context in contexts:
        records = {name: _Record() for name in methods}
        ids = np.random.default_rng(0).integers(3, base.n_vocab(), context + sizes.new_tokens).tolist()
        for number in range(sizes.rounds):
            order = list(methods)
            for name in order[number % len(order) :] + order[: number % len(order)]:
                _round(methods[name], ids, context, records[name])
                advance()
        results += [_result(name, context, records) for name in methods]
    return results


def _round(llm: Llama, ids: Sequence[int], context: int, record: _Record) -> None:
    llm.reset()
    start = time.perf_counter()
    llm.eval(ids[:context])
    middle = time.perf_counter()
    for token in ids[context:]:
        llm.eval([token])
    end = time.perf_counter()
    record.prefills.append(1e3 * (middle - start))
    record.decodes.append(1e3 * (end - middle) / (len(ids) - context))


def _result(name: str, context: int, records: Mapping[str, _Record]) -> LlamaMeasurement:
    def ratio(times: str, other: str) -> float:
        pairs = zip(getattr(records[name], times), getattr(records[other], times), strict=True)
        return statistics.median(own / its for own, its in pairs)

    return LlamaMeasurement(
        name,
        context,
        statistics.median(records[name].prefills),
        statistics.median(records[name].decodes),
        *(ratio(times, BASE) for times in ("prefills", "decodes")),
        *(ratio(times, OWN) for times in ("prefills", "decodes")),
    )


def random_ladder(base: GgufBase, rank: int, seed: int = 0) -> RankLadder:
    """Return a ladder of small random weights for all linear modules of a base model.

    Raises:
        EngineError: The file is one of several parts, so that its modules are not known.
    """
    if base.shapes is None:
        raise EngineError(f"{base.source}: is a part of a model; give --adapter, or join the parts to one file")
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    key = next(key for key, name in MODEL_ARCH_NAMES.items() if name == base.architecture.name)
    names, generator, modules = get_tensor_name_map(key, base.blocks), torch.Generator().manual_seed(seed), {}
    for layer in range(base.blocks):
        for part in sorted(MODULES):
            name = f"model.layers.{layer}.{part}"
            shape = base.shapes.get(f"{names.get_name(name)}.weight")
            if shape is not None:
                outputs, inputs = shape
                up = 0.02 * torch.randn(outputs, rank, generator=generator) / rank**0.5
                down = torch.randn(rank, inputs, generator=generator) / inputs**0.5
                modules[name] = LadderModule(up, down, torch.ones(rank), even_ranks(rank, min(8, rank)))
    return RankLadder(modules)
