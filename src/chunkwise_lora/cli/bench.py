"""`chunkwise bench`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chunkwise_lora import examples
from chunkwise_lora.benchmark.sizes import Sizes
from chunkwise_lora.cli.loading import load_base_and_tokenizer
from chunkwise_lora.cli.options import DeviceOption, JsonOption, device_named, dtype_named, path_given
from chunkwise_lora.cli.output import console, print_plain, write_json
from chunkwise_lora.cli.progress import progress
from chunkwise_lora.cli.rendering import bench_table, llama_table
from chunkwise_lora.errors import ChunkWiseError
from chunkwise_lora.method.config import PRESETS, ChunkWiseConfig

if TYPE_CHECKING:
    from chunkwise_lora.engines.transformers.fast_paths import FastPaths
    from chunkwise_lora.ladder import RankLadder

CONTEXTS, BATCHES, ALL_PRESETS = [128, 512], [1], list(PRESETS)


ONLY = {
    "transformers": ("methods", "prefill_rounds", "dtype", "device", "slow", "plot"),
    "llama-cpp": ("threads", "factors"),
}
"""Options that one engine alone has."""


def bench(
    ctx: typer.Context,
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
            help="Number of random adapters, with --random-weights; for llama-cpp also without. The sequences of a "
            "batch use them in turn.",
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
    factors: Annotated[
        str, typer.Option(help="Number format of llama-cpp's adapters in ChunkWise: float16, float32 or int8.")
    ] = "float16",
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
    _check_options(ctx)
    source = None if adapter is None else examples.find(adapter)
    configs = {name: ChunkWiseConfig.preset(name) for name in presets}
    if engine == "llama-cpp":
        from chunkwise_lora.engines.llama_cpp.library import check_installed

        check_installed()
        sizes = [
            Sizes(new_tokens=new_tokens, rounds=rounds, threads=threads, batch=size, factors=factors) for size in batch
        ]
        with _gguf_file(model, random_weights) as path:
            ladders = _random_ladders(path, adapters, rank) if source is None else [_ladder(source)]
            write_json(json_file, {"results": _bench_llama(path, ladders, contexts, configs, sizes)})
        return
    model = model or examples.BASE

    from chunkwise_lora.benchmark.measure import machine, measure, random_prompt
    from chunkwise_lora.benchmark.methods import chosen
    from chunkwise_lora.benchmark.methods import methods as all_methods
    from chunkwise_lora.benchmark.shapes import SHAPES, random_adapter, random_model

    fast = _fast_paths(slow or [])
    with tempfile.TemporaryDirectory() as scratch:
        if random_weights is None:
            folders = {"adapter": source or examples.find("wiki")}
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


def _check_options(ctx: typer.Context) -> None:
    """Refuse options that the engine does not have, or that contradict one another."""
    given, engine = ctx.params, ctx.params["engine"]
    if engine not in ONLY:
        raise ChunkWiseError(f"--engine {engine}: choose {' or '.join(ONLY)}")
    for other, names in ONLY.items():
        for name in names:
            if other != engine and _is_given(ctx, name):
                raise ChunkWiseError(f"--{name.replace('_', '-')} belongs to --engine {other}; leave it out")
    shape, is_transformers = given["random_weights"], engine == "transformers"
    if shape is not None:
        from chunkwise_lora.benchmark.shapes import SHAPES

        if shape not in SHAPES:
            raise ChunkWiseError(f"--random-weights {shape}: choose one of {', '.join(SHAPES)}")
        if given["model"] is not None:
            raise ChunkWiseError("--random-weights stands for --model; leave out one of them")
        if given["adapter"] is not None and is_transformers:
            raise ChunkWiseError("--random-weights comes with random adapters; leave out --adapter")
    if given["adapter"] is not None or (shape is None and is_transformers):
        for name in ("adapters", "rank"):
            if _is_given(ctx, name):
                remedy = "it needs --random-weights" if is_transformers else "leave out --adapter"
                raise ChunkWiseError(f"--{name} is for random adapters; {remedy}")


def _is_given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


@contextmanager
def _gguf_file(model: str | None, shape: str | None) -> Iterator[Path]:
    """Give the GGUF file of a model, or a temporary one with random weights of a shape."""
    if shape is None:
        yield examples.find_gguf(model)
        return

    from chunkwise_lora.benchmark.random_gguf import write_random_gguf
    from chunkwise_lora.benchmark.shapes import SHAPES

    with tempfile.TemporaryDirectory(prefix="chunkwise-") as folder:
        yield write_random_gguf(SHAPES[shape], Path(folder) / "model.gguf")


def _ladder(source: str | Path) -> RankLadder:
    from chunkwise_lora.ladder import RankLadder

    return RankLadder.load(source)


def _random_ladders(path: Path, count: int, rank: int) -> list[RankLadder]:
    from chunkwise_lora.benchmark.llama_cpp import random_ladder
    from chunkwise_lora.ladder.gguf import GgufBase

    base = GgufBase.load(path)
    return [random_ladder(base, rank, seed) for seed in range(count)]


def _bench_llama(
    path: Path,
    ladders: list[RankLadder],
    contexts: list[int],
    configs: dict[str, ChunkWiseConfig],
    sizes: list[Sizes],
) -> list[dict[str, Any]]:
    """Measure llama.cpp and print the table. If the first adapter has a policy of its own, it is measured too."""
    from chunkwise_lora.benchmark.llama_cpp import measure_llama, method_count

    if ladders[0].policy is not None:
        configs = {**configs, "calibrated": ladders[0].policy}
    results = []
    with progress() as reports:
        for one in sizes:
            advance = reports.steps(f"llama.cpp, batch {one.batch}", len(contexts) * one.rounds * method_count(configs))
            results += measure_llama(path, ladders, configs, contexts, one, advance)
    console.print(llama_table(results))
    return [asdict(result) for result in results]


def _fast_paths(switched_off: list[str]) -> FastPaths:
    from chunkwise_lora.engines.transformers.fast_paths import FastPaths

    known = list(FastPaths.__dataclass_fields__)
    for name in switched_off:
        if name not in known:
            raise ChunkWiseError(f"--slow {name}: choose from {', '.join(known)}")
    return FastPaths(**dict.fromkeys(switched_off, False))
