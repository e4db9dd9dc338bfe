"""`chunkwise bench`."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chunkwise_lora import examples
from chunkwise_lora.cli.loading import load_base_and_tokenizer
from chunkwise_lora.cli.options import DeviceOption, JsonOption, device_named, dtype_named, path_given
from chunkwise_lora.cli.output import console, print_plain, write_json
from chunkwise_lora.cli.progress import progress
from chunkwise_lora.cli.rendering import bench_table, llama_table
from chunkwise_lora.errors import ChunkWiseError
from chunkwise_lora.method.config import PRESETS, ChunkWiseConfig

if TYPE_CHECKING:
    from chunkwise_lora.engines.transformers.fast_paths import FastPaths

CONTEXTS, BATCHES, ALL_PRESETS = [128, 512], [1], list(PRESETS)


def bench(
    engine: Annotated[
        str,
        typer.Option(help="transformers, or llama-cpp, which is compared with llama.cpp's own LoRA."),
    ] = "transformers",
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Base model: a folder or a name on the hub; for llama-cpp a GGUF file. By default smollm2, the "
            "example.",
        ),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            help="PEFT adapter: a folder, owner/name on the hub, or the name of an example. By default wiki; for "
            "llama-cpp a random one of --rank."
        ),
    ] = None,
    random_weights: Annotated[
        str | None,
        typer.Option(
            metavar="SHAPE",
            help="Measure random weights in the shape of a known model (135M, 360M, 1B or 7B) instead of --model and "
            "--adapter.",
        ),
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank of random adapters.")] = 16,
    adapters: Annotated[
        int,
        typer.Option(
            min=1,
            help="Number of random adapters, with --random-weights. The sequences of a batch use them in turn.",
        ),
    ] = 1,
    contexts: Annotated[list[int], typer.Option(min=16, help="Prompt lengths in tokens, one or more.")] = CONTEXTS,
    batch: Annotated[list[int], typer.Option(min=1, help="Batch sizes in sequences, one or more.")] = BATCHES,
    presets: Annotated[
        list[str], typer.Option(help=f"Presets of ChunkWise, one or more of {', '.join(PRESETS)}.")
    ] = ALL_PRESETS,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help="Measure only methods whose names begin with one of these words, such as base, PEFT or ChunkWise. "
            "PEFT unmerged is always measured, because all ratios compare with it."
        ),
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that every sequence decodes per round.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of decoding.")] = 7,
    prefill_rounds: Annotated[
        int,
        typer.Option(
            min=0,
            help="Rounds of prefill. With 0 the caches of the baselines are filled with random numbers, and only "
            "decoding is timed.",
        ),
    ] = 3,
    dtype: Annotated[
        str, typer.Option(help="Number format of weights and KV cache: float32, bfloat16 or float16.")
    ] = "bfloat16",
    threads: Annotated[int, typer.Option(min=1, help="Threads of llama-cpp.")] = 1,
    device: DeviceOption = "cpu",
    slow: Annotated[
        list[str] | None, typer.Option(help="Fast paths to switch off: kernels, attention, products, graphs.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="PNG file to write, with plots of latency and memory against the context.",
            parser=path_given,
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Measure the latency and memory of ChunkWise, the base model, PEFT merged and PEFT unmerged.

    All methods run in one process with the same weights and threads, in interleaved rounds. Ratios divide by the time
    of PEFT unmerged in the same round; the table shows their median over rounds. The base model without an adapter
    shows what the adapter costs. Peak memory is the memory of the process, or of the GPU, above the loaded weights.
    """
    if engine == "llama-cpp":
        sizes = (new_tokens, rounds, threads)
        write_json(json_file, {"results": _bench_llama(model, adapter or rank, contexts, presets, sizes)})
        return
    if engine != "transformers":
        raise ChunkWiseError(f"--engine {engine}: choose transformers or llama-cpp")
    model = model or examples.BASE
    source = examples.find(adapter or "wiki")

    from chunkwise_lora.benchmark.measure import machine, measure, random_prompt
    from chunkwise_lora.benchmark.methods import chosen
    from chunkwise_lora.benchmark.methods import methods as all_methods
    from chunkwise_lora.benchmark.shapes import SHAPES, random_adapter, random_model

    fast = _fast_paths(slow or [])
    if random_weights is not None and random_weights not in SHAPES:
        raise ChunkWiseError(f"--random-weights {random_weights}: choose one of {', '.join(SHAPES)}")
    if adapters > 1 and random_weights is None:
        raise ChunkWiseError("--adapters makes random adapters and needs --random-weights; give both or neither")
    configs = {name: ChunkWiseConfig.preset(name) for name in presets}
    with tempfile.TemporaryDirectory() as scratch:
        if random_weights is None:
            folders = {"adapter": source}
            base = load_base_and_tokenizer(model, device_named(device))[0].to(dtype_named(dtype))
        else:
            shape = SHAPES[random_weights]
            base = random_model(shape, dtype_named(dtype), device_named(device))
            names = [f"random-{seed}" for seed in range(1, adapters + 1)]
            folders = {
                name: random_adapter(shape, rank, Path(scratch) / name, seed) for seed, name in enumerate(names, 1)
            }
        measured = chosen(all_methods(base, folders, configs, caches=True, fast=fast), methods or [""])
    results = []
    with progress() as reports:
        for size in batch:
            for context in contexts:
                pieces = len(measured) * (rounds + max(prefill_rounds, 1))
                results += measure(
                    measured,
                    random_prompt(base, size, context),
                    new_tokens=new_tokens,
                    rounds=rounds,
                    prefill_rounds=prefill_rounds,
                    advance=reports.steps(f"context {context}, batch {size}", pieces),
                )
    console.print(bench_table(results))
    planning = max(result.scheduler_ms / result.decode_ms for result in results)
    print_plain(
        f"{random_weights or model}, {dtype}, {rounds} rounds of {new_tokens} tokens, {prefill_rounds} rounds of "
        f"prefill. Planning takes at most {planning:.1%} of a decode step. {machine(base.device)}"
    )
    if plot is not None:
        from chunkwise_lora.benchmark.plots import plot_bench

        plot_bench(results, plot)
    write_json(json_file, {"machine": machine(base.device), "results": [asdict(result) for result in results]})


def _bench_llama(
    model: str | None, adapter: str | int, contexts: list[int], presets: list[str], sizes: tuple[int, int, int]
) -> list[dict[str, Any]]:
    """Measure llama.cpp and print the table. `adapter` may be the rank of a random one."""
    source = examples.find(adapter) if isinstance(adapter, str) else adapter
    configs = {name: ChunkWiseConfig.preset(name) for name in presets}
    path = examples.find_gguf(model)

    from chunkwise_lora.engines.llama_cpp.library import check_installed

    check_installed()

    from chunkwise_lora.benchmark.llama_cpp import Sizes, measure_llama
    from chunkwise_lora.ladder import RankLadder

    ladder = source if isinstance(source, int) else RankLadder.load(source)
    given = Sizes(*sizes)
    with progress() as reports:
        advance = reports.steps("llama.cpp", len(contexts) * given.rounds * (len(configs) + 2))
        results = measure_llama(path, ladder, configs, contexts, given, advance)
    console.print(llama_table(results))
    return [asdict(result) for result in results]


def _fast_paths(switched_off: list[str]) -> FastPaths:
    from chunkwise_lora.engines.transformers.fast_paths import FastPaths

    known = list(FastPaths.__dataclass_fields__)
    for name in switched_off:
        if name not in known:
            raise ChunkWiseError(f"--slow {name}: choose from {', '.join(known)}")
    return FastPaths(**dict.fromkeys(switched_off, False))
