"""Generates texts and prints them, with the rank of every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.panel import Panel
from rich.text import Text

from chunkwise_lora.cli.output import console, escaped_lines, print_plain
from chunkwise_lora.cli.rendering import coloured_tokens
from chunkwise_lora.errors import shown

if TYPE_CHECKING:
    from chunkwise_lora.engines.transformers import ChunkWiseModel


def print_generations(
    model: ChunkWiseModel,
    tokenizer: Any,
    prompts: list[str],
    adapters: list[str] | None = None,
    *,
    show_ranks: bool = True,
    **options: Any,
) -> list[dict[str, Any]]:
    """Generate for all prompts in one batch, print the texts, and return each with its trace as plain data.

    Args:
        model: The model with its ladders.
        tokenizer: The tokenizer of the base model.
        prompts: The texts to continue.
        adapters: Name of the ladder for each prompt; None for the only ladder of the model.
        show_ranks: Print the prompt and its continuation coloured by rank; otherwise only the continuation, uncoloured.
        **options: Options of transformers' `generate`.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    inputs = tokenizer(prompts, return_tensors="pt", padding=len(prompts) > 1, padding_side="left")
    output = model.generate(
        inputs.input_ids,
        attention_mask=inputs.attention_mask,
        adapter_names=adapters,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    trace = model.trace
    assert trace is not None
    generations = []
    for row, sequence in enumerate(trace.sequences):
        prompt_tokens = int(inputs.attention_mask[row].sum())
        text = tokenizer.decode(output[row, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        if show_ranks:
            coloured = coloured_tokens(sequence, _pieces(tokenizer, sequence.tokens), sequence.full_rank, prompt_tokens)
            ranks = f"mean rank {sequence.mean_rank:.1f} of {sequence.full_rank:.3g}"
            chunks = f"{len(sequence.chunks)} chunk{'' if len(sequence.chunks) == 1 else 's'}"
            title = Text(f"{shown(sequence.adapter, 40)}, {ranks}, {chunks}")
            console.print(Panel(coloured, title=title))
        else:
            console.print(Text(escaped_lines(text)))
        generations.append({"prompt": prompts[row], "text": text, "mean_rank": sequence.mean_rank, **asdict(sequence)})
    print_plain(
        f"KV cache {trace.kv_bytes / 1024:,.0f} KB ({trace.kv_bytes_full / 1024:,.0f} KB in full precision, "
        f"{trace.kv_bytes_reserved / 1024:,.0f} KB reserved); "
        f"adapter {trace.adapter_bytes_read / trace.passes / 1024:,.0f} KB read per pass; "
        f"scheduler {trace.scheduler_seconds / trace.passes * 1e3:.2f} ms per pass",
        style="dim",
    )
    return generations


def _pieces(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """The text of each token. A character that consists of several tokens belongs to the last of them."""
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=False)
    return [stream.step(tokenizer.backend_tokenizer, token) or "" for token in tokens]
