"""Decode and prefill of base, PEFT merged, PEFT unmerged and ChunkWise, interleaved in one process.

    python benchmarks/decode.py --shape 135m --rank 16 --rounds 9

`embedded` is the model that comes with the package, with its `wiki` adapter; `135m` has random weights in the shape
of SmolLM-135M and a random adapter on all linear layers. Random weights time like trained ones, but their text is not
language: what the plans choose there says nothing.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import Progress
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from chunkwise_lora import ChunkWiseConfig, embedded
from chunkwise_lora.evaluation.compare import compare, contestants
from chunkwise_lora.rendering import comparison_table

SMOLLM_135M = LlamaConfig(
    hidden_size=576,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    intermediate_size=1536,
    vocab_size=49152,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)


def random_model(config: LlamaConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Random weights in `dtype`."""
    torch.set_default_dtype(dtype)
    try:
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def random_adapter(config: LlamaConfig, rank: int, folder: Path) -> Path:
    """A PEFT adapter on all linear layers, small and random on both sides."""
    torch.manual_seed(1)
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(random_model(config, torch.bfloat16), lora, autocast_adapter_dtype=False)
    model.save_pretrained(folder)
    return folder


def main(
    shape: Annotated[Literal["embedded", "135m"], typer.Option(help="Which model.")] = "135m",
    rank: Annotated[int, typer.Option(help="Rank of the random adapter.")] = 16,
    context: Annotated[int, typer.Option(help="Prompt tokens.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 32,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds after the warm-up.")] = 9,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results here too.")] = None,
) -> None:
    """Print a table of medians."""
    torch.manual_seed(0)
    presets = {name: ChunkWiseConfig.preset(name) for name in ("lossless", "balanced")}
    with tempfile.TemporaryDirectory() as folder:
        if shape == "embedded":
            base = AutoModelForCausalLM.from_pretrained(embedded.BASE, dtype=torch.bfloat16).eval()
            adapter = embedded.ADAPTERS["wiki"]
        else:
            base = random_model(SMOLLM_135M, torch.bfloat16)
            adapter = random_adapter(SMOLLM_135M, rank, Path(folder))
        entrants = contestants(base, adapter, presets)
    prompt = torch.randint(3, base.config.vocab_size, (1, context))
    with Progress(transient=True) as progress:
        task = progress.add_task(shape, total=len(entrants) * (rounds + 2))
        results = compare(
            entrants, prompt, new_tokens=new_tokens, rounds=rounds, advance=lambda: progress.advance(task)
        )
    Console().print(comparison_table(results))
    print(f"{shape}, bfloat16, context {context}, {new_tokens} new tokens, {rounds} rounds")
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
