"""`chunkwise demo`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from chunkwise_lora import examples
from chunkwise_lora.cli.generations import generate, print_costs, print_generations, print_sequence
from chunkwise_lora.cli.loading import load_base_and_tokenizer
from chunkwise_lora.cli.options import JsonOption, dtype_named
from chunkwise_lora.cli.output import console, print_plain, write_json
from chunkwise_lora.cli.progress import progress
from chunkwise_lora.cli.rendering import llama_table, rank_legend, sample_table
from chunkwise_lora.errors import ChunkWiseError, escaped_lines
from chunkwise_lora.method.config import ChunkWiseConfig
from chunkwise_lora.token_text import token_texts

if TYPE_CHECKING:
    import torch

    from chunkwise_lora.ladder import RankLadder

PROMPTS = {
    "squad": "The lighthouse of Karsund was built in 1868 by the engineer Thomas Hale. Its light can be seen from a "
    "distance of 33 kilometres. The last keeper left in 1987, and since 1994 a local trust has run the station.\n"
    "Question: Who built the lighthouse?\nAnswer:",
    "e2e": "name[Blue Spice], eatType[coffee shop], food[Italian], priceRange[cheap], area[city centre] ->",
    "wiki": " = Aldhaven = \n \n Aldhaven is a town in the north of the island of",
}
"""A prompt for each adapter."""

ALONE_TOKENS = 24
"""Tokens that the base model generates alone."""


def demo(
    engine: Annotated[
        str, typer.Option(help="transformers, or llama-cpp, which is compared with llama.cpp's own LoRA.")
    ] = "transformers",
    folder: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder with a base model, `base`, and adapters, some of `squad`, `e2e` and `wiki`, instead of the "
            "examples; for transformers only.",
        ),
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=2, max=512, help="Tokens to generate per prompt.")] = 48,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which decoding is timed.")] = 3,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, or bfloat16 or float16, in which rounding changes some answers; for transformers only.",
            show_default="float32",
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Show the method on the example model: texts coloured by rank, and a comparison with PEFT or llama.cpp."""
    if engine not in ("transformers", "llama-cpp"):
        raise ChunkWiseError(f"--engine {engine}: choose transformers or llama-cpp")
    for option, value in {"--folder": folder, "--dtype": dtype}.items():
        if value is not None and engine == "llama-cpp":
            raise ChunkWiseError(f"{option} is only for --engine transformers; leave it out")
    adapters = _adapters(folder)
    if engine == "llama-cpp":
        content = _in_llama_cpp(adapters, new_tokens, rounds)
    else:
        model = str(folder / "base") if folder else examples.BASE
        content = _in_transformers(model, dtype_named(dtype or "float32"), adapters, new_tokens, rounds)
    write_json(json_file, {"engine": engine, **content})


def _adapters(folder: Path | None) -> dict[str, Path]:
    """The folders of the adapters to show, by name."""
    found = {path.name: path for path in folder.glob("*")} if folder else examples.ladders()
    adapters = {name: found[name] for name in PROMPTS if name in found}
    if not adapters and folder is None:
        examples.find(next(iter(PROMPTS)))  # the error says how to install them
    if not adapters:
        raise ChunkWiseError(f"--folder {folder}: holds none of the adapters {', '.join(PROMPTS)}")
    return adapters


def _in_transformers(
    model: str, dtype: torch.dtype, adapters: Mapping[str, Path], new_tokens: int, rounds: int
) -> dict[str, Any]:
    """Generate and compare in transformers. Returns the results as plain data."""
    from chunkwise_lora.benchmark.sample import run_sample
    from chunkwise_lora.engines.transformers import ChunkWiseModel

    ladders, policy = _with_policies(adapters)
    base, tokenizer = load_base_and_tokenizer(model)
    base = base.to(dtype)
    prompts = [PROMPTS[name] for name in ladders]
    alone, _ = generate(base, tokenizer, prompts, max_new_tokens=ALONE_TOKENS, do_sample=False)
    _introduce(ladders, policy)
    with ChunkWiseModel(base, ladders) as chunkwise:
        generations = print_generations(
            chunkwise, tokenizer, prompts, list(ladders), max_new_tokens=new_tokens, do_sample=False
        )
    _print_alone(ladders, tokenizer.batch_decode(alone, skip_special_tokens=True))
    with progress() as reports:
        advance = reports.begin("comparing with PEFT")
        results = run_sample(base, tokenizer, adapters, ladders, policy, rounds=rounds, advance=advance)
    console.print(sample_table(results))
    print_plain(
        f"{str(dtype).removeprefix('torch.')}, one sequence, means over the adapters; x is the ratio to PEFT "
        "unmerged. The scores are those of a small sample, which is too little to judge quality. If you use only one "
        "adapter, merge it: nothing is faster."
    )
    return {**generations, "comparison": [asdict(result) for result in results]}


def _in_llama_cpp(adapters: Mapping[str, Path], new_tokens: int, rounds: int) -> dict[str, Any]:
    """Generate and compare in llama.cpp. Returns the results as plain data."""
    from chunkwise_lora.engines.llama_cpp.library import check_installed

    model = examples.gguf_file()
    check_installed()

    from chunkwise_lora.benchmark.llama_cpp import measure_llama, method_count
    from chunkwise_lora.benchmark.sizes import Sizes
    from chunkwise_lora.engines.llama_cpp import BASE, ChunkWiseLlama

    ladders, policy = _with_policies(adapters)
    threads = os.cpu_count() or 1
    options: dict[str, Any] = {"n_ctx": 1024, "n_threads": threads, "n_threads_batch": threads, "verbose": False}
    llm = ChunkWiseLlama(str(model), ladders, max_sequences=len(ladders), flash_attn=True, **options)
    prompts = [PROMPTS[name] for name in ladders]
    alone = llm.create_completions(prompts, adapter=BASE, max_tokens=ALONE_TOKENS, temperature=0.0)["choices"]
    answers = llm.create_completions(prompts, adapter=list(ladders), max_tokens=new_tokens, temperature=0.0)["choices"]
    trace = llm.trace
    assert trace is not None
    _introduce(ladders, policy)
    generations = []
    for prompt, answer, sequence in zip(prompts, answers, trace.sequences, strict=True):
        pieces = token_texts(llm, sequence.tokens)
        print_sequence(sequence, pieces, len(llm.tokenize(prompt.encode(), add_bos=False, special=True)))
        said = {"prompt": prompt, "text": answer["text"], "mean_rank": sequence.mean_rank}
        generations.append({**said, **asdict(sequence)})
    print_costs(trace)
    _print_alone(ladders, [choice["text"] for choice in alone])
    name, ladder = next(iter(ladders.items()))
    assert ladder.policy is not None
    configs = {"lossless": ChunkWiseConfig.preset("lossless"), policy: ladder.policy}
    with progress() as reports:
        advance = reports.steps("comparing with llama.cpp", rounds * method_count(configs))
        results = measure_llama(model, [ladder], configs, [256], Sizes(32, rounds, threads), advance)
    console.print(llama_table(results))
    print_plain(f"Adapter {name}, one sequence, medians of {rounds} rounds; x is a ratio.")
    return {"generations": generations, "comparison": [asdict(result) for result in results]}


def _with_policies(adapters: Mapping[str, Path]) -> tuple[dict[str, RankLadder], str]:
    """The ladders by name, and the name of their policies: the calibrated ones, or `balanced` for all."""
    from chunkwise_lora.ladder import RankLadder

    ladders = {name: RankLadder.load(path) for name, path in adapters.items()}
    if all(ladder.policy for ladder in ladders.values()):
        return ladders, "calibrated"
    balanced = ChunkWiseConfig.preset("balanced")
    return {name: replace(ladder, policy=balanced) for name, ladder in ladders.items()}, "balanced"


def _introduce(ladders: Mapping[str, RankLadder], policy: str) -> None:
    """Print what is shown, and the legend of the colours."""
    count = {1: "One prompt", 2: "Two prompts", 3: "Three prompts"}[len(ladders)]
    each = ", each with its own adapter" if len(ladders) > 1 else ""
    print_plain(f"{count} in one batch on one base model{each}. The {policy} policy gives every token a rank:")
    console.print(rank_legend(max(ladder.rung_ranks[-1] for ladder in ladders.values())))


def _print_alone(names: Mapping[str, Any], texts: Sequence[str]) -> None:
    """Print how the base model alone continues the prompts, one line each."""
    print_plain("Without an adapter, the base model continues:")
    for name, text in zip(names, texts, strict=True):
        line = Text(f"{name}: ", "bold").append(escaped_lines(" ".join(text.split())), "default")
        line.truncate(console.width, overflow="ellipsis")
        console.print(line)
