"""`chunkwise bench`."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from chunkwise_lora import embedded
from chunkwise_lora.cli.loading import load_base_and_tokenizer
from chunkwise_lora.cli.options import JsonOption, device_named, dtype_named
from chunkwise_lora.cli.output import console, progress_bar, write_json
from chunkwise_lora.cli.rendering import bench_table
from chunkwise_lora.errors import ChunkWiseError
from chunkwise_lora.method.config import PRESETS, ChunkWiseConfig

CONTEXTS, BATCHES, ALL_PRESETS = [128, 512], [1], list(PRESETS)


def bench(
    model: Annotated[str, typer.Option(help="Base model: a folder or a name on the hub.")] = str(embedded.BASE),
    adapter: Annotated[
        str, typer.Option(help="PEFT adapter: a folder, a name on the hub, or an embedded one.")
    ] = "wiki",
    random_weights: Annotated[
        str | None,
        typer.Option(metavar="SHAPE", help="Instead: random weights in a known shape, 135M, 360M, 1B or 7B."),
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the random adapters.")] = 16,
    adapters: Annotated[
        int, typer.Option(min=1, help="So many random adapters, which the sequences of a batch take in turns.")
    ] = 1,
    contexts: Annotated[list[int], typer.Option(min=16, help="Prompt tokens, one or more numbers.")] = CONTEXTS,
    batch: Annotated[list[int], typer.Option(min=1, help="Sequences per batch, one or more numbers.")] = BATCHES,
    presets: Annotated[list[str], typer.Option(help=f"One or more of {', '.join(PRESETS)}.")] = ALL_PRESETS,
    contestants: Annotated[
        list[str] | None, typer.Option(help="Only those whose names start so, besides PEFT unmerged.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that a round decodes.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds of decoding.")] = 7,
    prefill_rounds: Annotated[
        int, typer.Option(min=0, help="Rounds of prefill. 0: fill the rivals' caches at random and time decoding only.")
    ] = 3,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    slow: Annotated[
        list[str] | None, typer.Option(help="Fast paths to switch off: kernels, attention, products.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw latency and memory against context into this PNG.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Time and weigh ChunkWise beside the base model, PEFT merged and PEFT unmerged.

    One process, the same weights, threads and attention for all, in interleaved rounds: ratios are medians of paired
    rounds. The base model without its adapter shows the limit for any adapter. Peaks are of the process above the
    loaded weights, or of the GPU.
    """
    from chunkwise_lora.benchmark import measure as benchmark
    from chunkwise_lora.benchmark.shapes import SHAPES, random_adapter, random_model
    from chunkwise_lora.engines.transformers.layers import FastPaths

    known = [name for name in FastPaths.__dataclass_fields__ if name in (slow or [])]
    if unknown := sorted(set(slow or []) - set(known)):
        raise ChunkWiseError(f"--slow {unknown[0]}: choose from {', '.join(FastPaths.__dataclass_fields__)}")
    if random_weights is not None and random_weights not in SHAPES:
        raise ChunkWiseError(f"--random-weights {random_weights}: choose one of {', '.join(SHAPES)}")
    if adapters > 1 and random_weights is None:
        raise ChunkWiseError("--adapters makes random adapters; give --random-weights too")
    configs = {name: ChunkWiseConfig.preset(name) for name in presets}
    with tempfile.TemporaryDirectory() as scratch:
        if random_weights is None:
            base = load_base_and_tokenizer(model)[0].to(device_named(device), dtype_named(dtype))
            folders = {"adapter": embedded.find(adapter)}
        else:
            shape = SHAPES[random_weights]
            base = random_model(shape, dtype_named(dtype), device_named(device))
            names = [f"random-{seed}" for seed in range(1, adapters + 1)]
            folders = {
                name: random_adapter(shape, rank, Path(scratch) / name, seed) for seed, name in enumerate(names, 1)
            }
        fast = FastPaths(**dict.fromkeys(known, False))
        entrants = benchmark.contestants(base, folders, configs, caches=True, fast=fast)
    wanted = (benchmark.UNMERGED, *(contestants or [""]))
    entrants = [entrant for entrant in entrants if entrant.name.startswith(wanted)]
    cells = [(size, context) for size in batch for context in contexts]
    results = []
    with progress_bar() as progress:
        task = progress.add_task("", total=len(cells) * len(entrants) * (rounds + max(prefill_rounds, 1)))
        for size, context in cells:
            progress.update(task, description=f"context {context}, batch {size}")
            results += benchmark.measure(
                entrants,
                benchmark.random_prompt(base, size, context),
                new_tokens=new_tokens,
                rounds=rounds,
                prefill_rounds=prefill_rounds,
                advance=lambda: progress.advance(task),
            )
    machine = benchmark.machine(base.device)
    console.print(bench_table(results))
    share = max(result.scheduler_ms / result.decode_ms for result in results)
    console.print(
        f"{random_weights or model}, {dtype}, {rounds} rounds of {new_tokens} tokens, {prefill_rounds} of prefill; "
        f"planning is at most {share:.1%} of a step; {machine}"
    )
    if plot is not None:
        from chunkwise_lora.benchmark.plots import plot_bench

        plot_bench(results, plot)
    write_json(json_file, {"machine": machine, "results": [asdict(result) for result in results]})
