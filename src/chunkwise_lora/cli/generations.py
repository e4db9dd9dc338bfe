"""Generates texts and prints them, with the rank of every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.panel import Panel
from rich.text import Text

from chunkwise_lora.cli.output import console, print_plain, write_picture
from chunkwise_lora.cli.rendering import coloured_tokens, rank_legend
from chunkwise_lora.errors import escaped_lines, shown
from chunkwise_lora.token_text import new_texts, token_texts

if TYPE_CHECKING:
    from torch import Tensor

    from chunkwise_lora.engines.transformers import ChunkWiseModel
    from chunkwise_lora.method.trace import SequenceTrace, Trace


COSTS = ("kv_bytes", "kv_bytes_full", "kv_bytes_reserved", "adapter_bytes_read", "passes", "scheduler_seconds", "notes")
"""What a trace says about a whole batch."""


def print_generations(
    model: ChunkWiseModel,
    tokenizer: Any,
    prompts: list[str],
    adapters: list[str] | None = None,
    *,
    show_ranks: bool = True,
    picture: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Generate for all prompts in one batch, print the texts, and return them with their traces as plain data.

    One text that is printed without its ranks is printed while it is generated.

    Args:
        model: The model with its ladders.
        tokenizer: The tokenizer of the base model.
        prompts: The texts to continue.
        adapters: Name of the ladder for each prompt; None for the only ladder of the model.
        show_ranks: Print the prompt and its continuation coloured by rank; otherwise only the continuation, uncoloured.
        picture: Where to write the coloured texts as an SVG picture; None writes none.
        **options: Options of transformers' `generate`.
    """
    streams = len(prompts) == 1 and not show_ranks
    if streams:
        options["streamer"] = PrintedStream(tokenizer)
    new, mask = generate(model, tokenizer, prompts, adapter_names=adapters, **options)
    trace = model.trace
    assert trace is not None
    generations, frames = [], []
    for row, whole in enumerate(trace.sequences):
        prompt_tokens = int(mask[row].sum())
        sequence = _until_end(whole, prompt_tokens, tokenizer.eos_token_id)
        text = tokenizer.decode(new[row], skip_special_tokens=True)
        pieces = token_texts(tokenizer, sequence.tokens) if show_ranks or picture is not None else []
        if picture is not None:
            frames.append(framed(sequence, pieces, prompt_tokens, colours=True))
        if show_ranks:
            print_sequence(sequence, pieces, prompt_tokens)
        elif not streams:
            console.print(Text(f"{shown(str(sequence.adapter), 40)}: ", "bold").append(escaped_lines(text), "default"))
        generations.append({"prompt": prompts[row], "text": text, "mean_rank": sequence.mean_rank, **asdict(sequence)})
    print_costs(trace)
    if picture is not None:
        legend = rank_legend(max(sequence.full_rank for sequence in trace.sequences), colours=True)
        write_picture(picture, [legend, *frames], "chunkwise generate")
    return {"generations": generations, **{name: getattr(trace, name) for name in COSTS}}


class PrintedStream:
    """A streamer for transformers' `generate` that prints the text of one sequence, without its prompt."""

    def __init__(self, tokenizer: Any) -> None:
        self._texts = new_texts(tokenizer, skip_special_tokens=True)
        self._has_prompt = False

    def put(self, tokens: Tensor) -> None:
        """Take the prompt (1, tokens) first, then new tokens (1,), and print the text that they complete."""
        text = "".join([self._texts(token) for token in tokens.flatten().tolist()])
        if self._has_prompt:
            console.print(Text(escaped_lines(text)), end="", soft_wrap=True)
        self._has_prompt = True

    def end(self) -> None:
        """End the line."""
        console.print()


def generate(model: Any, tokenizer: Any, prompts: list[str], **options: Any) -> tuple[Tensor, Tensor]:
    """Continue all prompts in one batch.

    Returns:
        (batch, new tokens) token ids of the continuations, and the attention mask of the prompts (batch, tokens).
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    inputs = tokenizer(prompts, return_tensors="pt", padding=len(prompts) > 1, padding_side="left")
    device = getattr(model, "base", model).device  # a ChunkWiseModel, or a base model alone
    ids, mask = (tensor.to(device) for tensor in (inputs.input_ids, inputs.attention_mask))
    output = model.generate(ids, attention_mask=mask, pad_token_id=tokenizer.pad_token_id, **options)
    return output[:, ids.shape[1] :], mask


def print_sequence(sequence: SequenceTrace, pieces: Sequence[str], prompt_tokens: int) -> None:
    """Print a sequence; see `framed`."""
    console.print(framed(sequence, pieces, prompt_tokens))


def framed(sequence: SequenceTrace, pieces: Sequence[str], prompt_tokens: int, colours: bool | None = None) -> Panel:
    """A sequence in a frame, coloured by rank, without blank lines at its end. `pieces` are its tokens' texts."""
    ranks = f"mean rank {sequence.mean_rank:.1f} of {sequence.full_rank:.3g}"
    chunks = f"{len(sequence.chunks)} chunk{'' if len(sequence.chunks) == 1 else 's'}"
    title = Text(f"{shown(sequence.adapter, 40)}, {ranks}, {chunks}")
    length = max((place for place, piece in enumerate(pieces, 1) if piece.strip()), default=0)
    visible = replace(sequence, ranks=sequence.ranks[:length])
    text = coloured_tokens(visible, pieces[:length], sequence.full_rank, prompt_tokens, colours)
    return Panel(text, title=title)


def print_costs(trace: Trace) -> None:
    """Print the bytes that a generation took and read, and the time of planning."""
    print_plain(
        f"KV cache {trace.kv_bytes / 1024:,.0f} KB ({trace.kv_bytes_full / 1024:,.0f} KB in full precision, "
        f"{trace.kv_bytes_reserved / 1024:,.0f} KB reserved); "
        f"adapter {trace.adapter_bytes_read / trace.passes / 1024:,.0f} KB read per pass; "
        f"scheduler {trace.scheduler_seconds / trace.passes * 1e3:.2f} ms per pass",
        style="dim",
    )


def _until_end(sequence: SequenceTrace, prompt_tokens: int, end: int | None) -> SequenceTrace:
    """The sequence up to the end of its text, without what a batch ran for it afterwards."""
    new = sequence.tokens[prompt_tokens:]
    return sequence.first(prompt_tokens + (new.index(end) if end in new else len(new)))
