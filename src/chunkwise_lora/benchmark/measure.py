"""Latency and memory of several methods, measured in one process and in interleaved rounds."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import peft
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from chunkwise_lora.benchmark.memory import PeakMemory
from chunkwise_lora.benchmark.methods import BASE, UNMERGED, Method
from chunkwise_lora.benchmark.run import Run
from chunkwise_lora.errors import EngineError

WARM_UP = 3
"""Tokens decoded before decoding is timed."""


@dataclass(frozen=True)
class Measurement:
    """The time and memory of one method for one batch of prompts. Times are medians over rounds."""

    name: str
    context: int
    """Prompt tokens of each sequence."""
    batch: int
    """Sequences that run together."""
    prefill_ms: float | None
    """Milliseconds of the prefill of the whole batch; None if no prefill was run."""
    decode_ms: float
    """Milliseconds per decode step. A step gives every sequence one token."""
    decode_ratio: float
    """Median over rounds of the decode time divided by PEFT unmerged's time in the same round."""
    decode_spread: tuple[float, float]
    """Lower and upper quartile of that ratio over rounds."""
    decode_over_base: float | None
    """The same ratio to the base model without adapter; None if the base model is not among the methods."""
    prefill_ratio: float | None
    """Ratio of prefill times to PEFT unmerged, as `decode_ratio`; None if prefills are not compared."""
    prefill_over_base: float | None
    """Ratio of prefill times to the base model, as `decode_over_base`; None if prefills are not compared."""
    adapter_bytes_per_pass: float
    """Bytes of adapter weights read per forward pass, averaged over passes."""
    kv_bytes: int
    """Bytes of storage of the KV cache's tensors after the prompt and the warm-up steps."""
    kv_bytes_in_use: int
    """The same without room for later tokens."""
    peak_bytes: int | None
    """Largest memory of the process (or GPU) during prefill and warm-up steps, in bytes above its memory before them;
    None if unknown or if prefills are not compared."""
    scheduler_ms: float
    """Milliseconds of planning per decode step."""
    rounds: int
    """Rounds of decoding."""
    prefill_rounds: int
    """Rounds of prefill; 0 if prefills are not compared."""


@dataclass
class _Record:
    """The measurements of one method."""

    prefills: list[float] = field(default_factory=list)
    """Milliseconds, one value per round."""
    decodes: list[float] = field(default_factory=list)
    """Milliseconds per step, one value per round."""
    peak_bytes: int | None = None
    kv_bytes: int = 0
    kv_bytes_in_use: int = 0
    planned_before: float = 0.0
    """Seconds spent on planning before the first decode round."""


@torch.inference_mode()
def measure(
    methods: Sequence[Method],
    prompt: Tensor,
    *,
    new_tokens: int,
    rounds: int,
    prefill_rounds: int | None = None,
    advance: Callable[[], None] = lambda: None,
) -> list[Measurement]:
    """Time the prefill of `prompt` and greedy decoding, with all methods in interleaved rounds.

    Every round of prefill begins a new generation. Every round of decoding continues the last generation by
    `new_tokens`. The contexts of all methods thus grow equally, and a long prompt is not run again for each round.

    Args:
        methods: The methods to measure; one of them must be PEFT unmerged. Their order rotates from round to round.
        prompt: (batch, tokens) token ids.
        new_tokens: Tokens per sequence that a round of decoding adds.
        rounds: Rounds of decoding.
        prefill_rounds: Rounds of prefill, by default as many as `rounds`. With 0, the caches of baselines are filled
            with random keys and values, which does not change the time of a decode step; prefill times and peaks are
            then not compared.
        advance: Called after each piece of work, max(prefill_rounds, 1) + rounds times per method.

    Raises:
        EngineError: The prompt and the new tokens need more positions than the model has.
    """
    prefill_rounds = rounds if prefill_rounds is None else prefill_rounds
    length = prompt.shape[1] + WARM_UP + rounds * new_tokens
    _refuse_too_long(methods[0], prompt.shape[1], rounds, new_tokens, length)
    records = {method.name: _Record() for method in methods}
    runs: dict[str, Run] = {}
    _warm_up(methods, prompt)
    try:
        for number in range(max(prefill_rounds, 1)):
            for method in _rotated(methods, number):
                if method.name in runs:
                    runs.pop(method.name).close()  # frees its cache before the peak is measured
                record = records[method.name]
                with PeakMemory(prompt.device) as peak:
                    run = runs[method.name] = Run(method, prompt, length)
                    if prefill_rounds or method.chunkwise is not None:
                        record.prefills.append(run.prefill())
                    else:
                        run.fill()
                    run.decode(WARM_UP)
                record.peak_bytes, record.kv_bytes = peak.bytes, run.kv_bytes
                record.kv_bytes_in_use = run.kv_bytes_in_use
                del run
                advance()
        for name, run in runs.items():
            records[name].planned_before = run.scheduler_seconds
        for number in range(rounds):
            for method in _rotated(methods, number):
                records[method.name].decodes.append(runs[method.name].decode(new_tokens))
                advance()
    finally:
        for run in runs.values():
            run.close()
    return _measurements(records, runs, prompt, new_tokens, prefill_rounds)


def _refuse_too_long(method: Method, context: int, rounds: int, new_tokens: int, length: int) -> None:
    positions = getattr(method.model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise EngineError(
            f"a context of {context} tokens and {rounds} rounds of {new_tokens} tokens need {length} positions, but "
            f"the model has {positions} positions; use a shorter context, fewer rounds or fewer new tokens"
        )


def _warm_up(methods: Sequence[Method], prompt: Tensor) -> None:
    """Run every method once, so that weights are in memory and kernels are compiled before anything is timed."""
    for method in methods:
        run = Run(method, prompt[:, :8], 8 + WARM_UP)
        try:
            run.prefill()
            run.decode(WARM_UP)
        finally:
            run.close()


def _measurements(
    records: Mapping[str, _Record], runs: Mapping[str, Run], prompt: Tensor, new_tokens: int, prefill_rounds: int
) -> list[Measurement]:
    compared = prefill_rounds > 0
    decodes = {name: record.decodes for name, record in records.items()}
    prefills = {name: record.prefills for name, record in records.items()}
    results = []
    for name, record in records.items():
        run, rounds = runs[name], len(record.decodes)
        ratios = _ratios(record.decodes, decodes[UNMERGED])
        quartiles = statistics.quantiles(ratios, n=4) if rounds > 1 else [ratios[0]] * 3
        results.append(
            Measurement(
                name=name,
                context=prompt.shape[1],
                batch=len(prompt),
                prefill_ms=statistics.median(record.prefills) if record.prefills else None,
                decode_ms=statistics.median(record.decodes),
                decode_ratio=statistics.median(ratios),
                decode_spread=(quartiles[0], quartiles[2]),
                decode_over_base=_median_ratio(decodes, name, BASE),
                prefill_ratio=_median_ratio(prefills, name, UNMERGED) if compared else None,
                prefill_over_base=_median_ratio(prefills, name, BASE) if compared else None,
                adapter_bytes_per_pass=run.adapter_bytes,
                kv_bytes=record.kv_bytes,
                kv_bytes_in_use=record.kv_bytes_in_use,
                peak_bytes=record.peak_bytes if compared else None,
                scheduler_ms=(run.scheduler_seconds - record.planned_before) * 1e3 / (rounds * new_tokens),
                rounds=rounds,
                prefill_rounds=prefill_rounds,
            )
        )
    return results


def _ratios(own: Sequence[float], other: Sequence[float]) -> list[float]:
    return [mine / theirs for mine, theirs in zip(own, other, strict=True)]


def _median_ratio(times: Mapping[str, Sequence[float]], name: str, other: str) -> float | None:
    """Median over rounds of the time of `name` divided by that of `other`; None if `other` was not measured."""
    return statistics.median(_ratios(times[name], times[other])) if other in times else None


def _rotated(methods: Sequence[Method], number: int) -> Iterator[Method]:
    """The methods in the order of round `number`. Every round begins with another method than the round before."""
    first = number % len(methods)
    yield from (*methods[first:], *methods[:first])


def random_prompt(model: PreTrainedModel, batch: int, context: int) -> Tensor:
    """(batch, context) random token ids, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.get_input_embeddings().num_embeddings, (batch, context), generator=generator)
    return ids.to(model.device)


def machine(device: torch.device) -> str:
    """The processor or GPU, the number of threads, and the versions of PyTorch, transformers and PEFT."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = f"{models[0] if models else platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"
        name += f", {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
