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

from chunkwise_lora.benchmark.sizes import Sizes
from chunkwise_lora.engines.llama_cpp import ChunkWiseLlama
from chunkwise_lora.engines.llama_cpp.base_model import base_of
from chunkwise_lora.engines.llama_cpp.batch import fill
from chunkwise_lora.errors import EngineError
from chunkwise_lora.ladder import LadderModule, RankLadder, even_ranks
from chunkwise_lora.ladder.gguf import GgufBase, write_gguf
from chunkwise_lora.method.config import ChunkWiseConfig

NO_ADAPTER, OWN = "base, no adapter", "llama.cpp's own LoRA"
DEFAULTS = "base, llama-cpp-python's defaults"
"""The base model without flash attention. All others have it."""
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
    """Prompt tokens of each sequence."""
    batch: int
    """Sequences."""
    prefill_ms: float
    """Milliseconds for all prompts."""
    decode_ms: float
    """Milliseconds for a new token of every sequence."""
    prefill_over_base: float
    decode_over_base: float
    prefill_over_own: float
    """Ratio to llama.cpp's own LoRA, with factors in float16."""
    decode_over_own: float


@dataclass
class _Record:
    prefills: list[float] = field(default_factory=list)
    decodes: list[float] = field(default_factory=list)


def measure_llama(
    model: str | Path,
    ladders: Sequence[RankLadder],
    presets: Mapping[str, ChunkWiseConfig],
    contexts: Sequence[int],
    sizes: Sizes,
    advance: Callable[[], None] = lambda: None,
) -> list[LlamaMeasurement]:
    """Time prompts of random tokens, and the tokens after them, one by one. Sampling is not timed.

    Args:
        model: A GGUF file.
        ladders: The adapters; one for each sequence, or fewer.
        presets: Settings of ChunkWise by the name that the results show.
        contexts: Prompt lengths in tokens.
        sizes: How much is measured.
        advance: Called in each round after each of the methods, of which there are `method_count(presets)`.

    Raises:
        EngineError: The model cannot be loaded, or an adapter does not fit it.
    """
    length = max(contexts) + sizes.new_tokens
    options: dict[str, Any] = {
        "n_ctx": length,
        "n_threads": sizes.threads,
        "n_threads_batch": sizes.threads,
        "flash_attn": True,
        "verbose": False,
    }
    facts = base_of(ChunkWiseLlama(str(model), **options))  # it refuses what cannot be read
    adapters = {str(number): ladder for number, ladder in enumerate(ladders)}
    names = [str(row % len(ladders)) for row in range(sizes.batch)]
    methods: dict[str, _Method] = {
        DEFAULTS: _plain(model, sizes.batch, {**options, "flash_attn": False}),
        NO_ADAPTER: _plain(model, sizes.batch, options),
    }
    with tempfile.TemporaryDirectory(prefix="chunkwise-") as folder:
        files = {name: Path(folder) / f"{name}.gguf" for name in dict.fromkeys(names)}
        for name, path in files.items():
            write_gguf(adapters[name], path, base=facts, dtype="f16")
        methods[OWN] = _OneByOne([Llama(str(model), lora_path=str(files[name]), **options) for name in names])
    several = {"n_ctx": length * sizes.batch, "max_sequences": sizes.batch, "factors": sizes.factors}
    for name, config in presets.items():
        llm = ChunkWiseLlama(str(model), adapters, chunkwise_config=config, **{**options, **several})
        methods[f"ChunkWise {name}"] = _OneByOne([llm]) if sizes.batch == 1 else _Together(llm, sizes.batch, names)
    results = []
    for context in contexts:
        records = {name: _Record() for name in methods}
        shape = (sizes.batch, context + sizes.new_tokens)
        ids = np.random.default_rng(0).integers(3, methods[DEFAULTS].n_vocab, shape).tolist()
        for number in range(sizes.rounds):
            order = list(methods)
            for name in order[number % len(order) :] + order[: number % len(order)]:
                _round(methods[name], ids, context, records[name])
                advance()
        results += [_result(name, context, sizes.batch, records) for name in methods]
    return results


def method_count(presets: Mapping[str, ChunkWiseConfig]) -> int:
    """Return the number of methods that `measure_llama` compares."""
    return 3 + len(presets)


class _OneByOne:
    """Sequences that run one after another, each in a context of its own, as `llama_cpp.Llama` runs them."""

    def __init__(self, llms: Sequence[Llama]) -> None:
        self.llms = llms
        self.n_vocab = llms[0].n_vocab()

    def begin(self, prompts: Sequence[list[int]]) -> None:
        for llm, prompt in zip(self.llms, prompts, strict=True):
            llm.reset()
            llm.eval(prompt)

    def step(self, tokens: Sequence[int]) -> None:
        for llm, token in zip(self.llms, tokens, strict=True):
            llm.eval([token])


class _Together:
    """Sequences that run in one batch. In ChunkWise, `names` are their adapters."""

    def __init__(self, llm: Llama, count: int, names: Sequence[str] = ()) -> None:
        self.llm, self.count, self.names = llm, count, names
        self.n_vocab = llm.n_vocab()

    def begin(self, prompts: Sequence[list[int]]) -> None:
        if isinstance(self.llm, ChunkWiseLlama):
            requests = [self.llm.request(name) for name in self.names]
            self.llm._session.begin_batch(list(zip(range(self.count), requests, prompts, strict=True)))
        else:
            self.llm._ctx.kv_cache_clear()
        self.position = len(prompts[0])
        for sequence, prompt in enumerate(prompts):
            for start in range(0, len(prompt), self.llm.n_batch):
                self._run([(sequence, start, prompt[start : start + self.llm.n_batch])])

    def step(self, tokens: Sequence[int]) -> None:
        self._run([(sequence, self.position, [token]) for sequence, token in enumerate(tokens)])
        self.position += 1

    def _run(self, parts: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        fill(self.llm, parts)
        self.llm._ctx.decode(self.llm._batch)


_Method = _OneByOne | _Together


class _Several(Llama):
    """A model without adapters whose context holds `sequences` sequences."""

    def __init__(self, sequences: int, *arguments: Any, **options: Any) -> None:
        self.sequences = sequences
        super().__init__(*arguments, **options)

    @property
    def context_params(self) -> Any:
        return self.__dict__["context_params"]

    @context_params.setter
    def context_params(self, params: Any) -> None:
        params.n_seq_max, params.kv_unified = self.sequences, True  # before the context is made
        self.__dict__["context_params"] = params


def _plain(model: str | Path, batch: int, options: Mapping[str, Any]) -> _Method:
    """The base model."""
    if batch == 1:
        return _OneByOne([Llama(str(model), **options)])
    return _Together(_Several(batch, str(model), **{**options, "n_ctx": options["n_ctx"] * batch}), batch)


def _round(method: _Method, ids: Sequence[list[int]], context: int, record: _Record) -> None:
    start = time.perf_counter()
    method.begin([row[:context] for row in ids])
    middle = time.perf_counter()
    for position in range(context, len(ids[0])):
        method.step([row[position] for row in ids])
    end = time.perf_counter()
    record.prefills.append(1e3 * (middle - start))
    record.decodes.append(1e3 * (end - middle) / (len(ids[0]) - context))


def _result(name: str, context: int, batch: int, records: Mapping[str, _Record]) -> LlamaMeasurement:
    def ratio(times: str, other: str) -> float:
        pairs = zip(getattr(records[name], times), getattr(records[other], times), strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)

    return LlamaMeasurement(
        name,
        context,
        batch,
        statistics.median(records[name].prefills),
        statistics.median(records[name].decodes),
        *(ratio(times, NO_ADAPTER) for times in ("prefills", "decodes")),
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
