"""Texts coloured by rank, as notebooks show them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, Any

from chunkwise_lora.errors import escaped_lines, shown
from chunkwise_lora.rank_colour import LEGEND, rank_colour, rank_shown
from chunkwise_lora.token_text import token_texts

if TYPE_CHECKING:
    from chunkwise_lora.method.trace import SequenceTrace, Trace

BAR = "border-left:2px solid #d62728"
"""The style of the first token of a chunk."""


class ColouredText:
    """The texts of a trace, coloured by rank. Notebooks show it in colour; `print` writes the plain texts.

    Each colour has its own text colour, so that dark notebooks show it as well.

    Args:
        trace: What a generation did.
        tokenizer: Knows the texts of the tokens; see `token_texts`. None shows token ids. End and padding tokens at the
            end of a text are left out.
        prompt_tokens: How many tokens of each sequence, or of all, are the prompt, which is shown in italics.
    """

    def __init__(self, trace: Trace, tokenizer: Any = None, prompt_tokens: int | Sequence[int] = 0) -> None:
        ends = {getattr(tokenizer, name, None) for name in ("eos_token_id", "pad_token_id")}
        self._trace = trace
        self._sequences = [_without_end(sequence, ends) for sequence in trace.sequences]
        count = len(self._sequences)
        self._prompts = [prompt_tokens] * count if isinstance(prompt_tokens, int) else list(prompt_tokens)
        self._texts = [
            [f"{token} " for token in sequence.tokens] if tokenizer is None else token_texts(tokenizer, sequence.tokens)
            for sequence in self._sequences
        ]

    def __repr__(self) -> str:
        both = zip(self._sequences, self._texts, strict=True)
        return "\n".join(f"{_title(sequence)}\n{escaped_lines(''.join(texts))}" for sequence, texts in both)

    def _repr_html_(self) -> str:
        """The texts as HTML, with a legend. Nothing in tokens, names and notes is taken for HTML or for formulas."""
        trace, full_rank = self._trace, max((sequence.full_rank for sequence in self._sequences), default=0.0)
        parts = [f"<p>{self._legend(full_rank)}</p>"]
        for sequence, texts, prompt_tokens in zip(self._sequences, self._texts, self._prompts, strict=True):
            runs = "".join(_runs(sequence, texts, full_rank, prompt_tokens))
            parts.append(f"<p><b>{escape(_title(sequence))}</b></p>")
            parts.append(f'<p style="white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.6">{runs}</p>')
        kilobytes = f"{trace.kv_bytes / 1024:,.0f} KB"
        parts.append(f"<p>KV cache: {kilobytes} ({trace.kv_bytes_full / 1024:,.0f} KB in full precision)</p>")
        parts += [f"<p>{escape(shown(note, 400))}</p>" for note in (*trace.notes, *trace.kv_notes)]
        return f'<div class="mathjax_ignore tex2jax_ignore" style="max-width:60em">{"".join(parts)}</div>'

    def _legend(self, full_rank: float) -> str:
        ranks = "".join(
            f'<span style="{_style(share)};padding:0 .5em">{rank_shown(share * full_rank)}</span>' for share in LEGEND
        )
        prompt = "; <i>the prompt is in italics</i>" if any(self._prompts) else ""
        return f'rank {ranks} &emsp;<span style="{BAR}">&nbsp;</span>a chunk begins{prompt}'


def _runs(sequence: SequenceTrace, texts: Sequence[str], full_rank: float, prompt_tokens: int) -> Iterator[str]:
    """HTML of the tokens of a sequence: one element per run of tokens of the same rank and chunk."""
    starts = {chunk.chunk.start for chunk in sequence.chunks} - {0}
    chunk, looks = 0, []
    for position, rank in enumerate(sequence.ranks):
        chunk += position in starts
        looks.append((chunk, rank, position < prompt_tokens))
    chunk_before = 0
    for (chunk, rank, is_prompt), places in groupby(range(len(looks)), key=looks.__getitem__):
        text = escape(escaped_lines("".join(texts[place] for place in places))).replace("\n", "<br>")
        style = _style(rank / full_rank if full_rank else 0.0)
        style += f";{BAR}" if chunk != chunk_before else ""
        style += ";font-style:italic" if is_prompt else ""
        chunk_before = chunk
        yield f'<span title="rank {rank_shown(rank)}" style="{style}">{text}</span>'


def _style(share: float) -> str:
    """The style of text at a rank, given as a share of the full rank."""
    return f"color:#000;background:rgb({','.join(map(str, rank_colour(share)))})"


def _title(sequence: SequenceTrace) -> str:
    chunks = f"{len(sequence.chunks)} chunk{'' if len(sequence.chunks) == 1 else 's'}"
    name = "without an adapter" if sequence.adapter is None else shown(sequence.adapter, 40)
    return f"{name}: mean rank {rank_shown(sequence.mean_rank)} of {rank_shown(sequence.full_rank)}, {chunks}"


def _without_end(sequence: SequenceTrace, ends: set[Any]) -> SequenceTrace:
    length = len(sequence.tokens)
    while length and sequence.tokens[length - 1] in ends:
        length -= 1
    return sequence.first(length)
