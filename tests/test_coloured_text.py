"""A trace shows the ranks of its tokens in a notebook. What models and files say cannot change the page."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from html.parser import HTMLParser
from typing import Any

import pytest
from transformers import AutoTokenizer

import small
from chunkwise_lora import ChunkWiseConfig, ChunkWiseModel
from chunkwise_lora.engines.transformers import load_base
from chunkwise_lora.method.chunking import Chunk
from chunkwise_lora.method.plan import ScheduledChunk
from chunkwise_lora.method.selection import Selection
from chunkwise_lora.method.trace import SequenceTrace, Trace
from chunkwise_lora.rank_colour import rank_colour
from chunkwise_lora.token_text import token_texts


class Words:
    """A tokenizer without a backend in Rust, whose tokens are the numbers of words."""

    eos_token_id, pad_token_id = 0, None

    def __init__(self, *words: str) -> None:
        self.words = words

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return "".join(self.words[token - 1] for token in tokens)


class Shown(HTMLParser):
    """Reads HTML: the texts of the tokens with their styles, and all tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.runs: list[list[str]] = []
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, Any]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag == "span" and "title" in dict(attributes):
            self.runs.append([str(dict(attributes)["title"]), str(dict(attributes)["style"]), ""])
        elif tag == "br":
            self.runs[-1][2] += "\n"

    def handle_endtag(self, tag: str) -> None:
        self.tags.append((f"/{tag}", {}))

    def handle_data(self, data: str) -> None:
        if self.runs and self.tags[-1][0] in ("span", "br"):
            self.runs[-1][2] += data


def trace_of(*sequences: SequenceTrace, **changes: Any) -> Trace:
    others: dict[str, Any] = {field.name: 0 for field in fields(Trace)} | {"notes": (), "kv_notes": ()}
    return Trace(**others | {"sequences": sequences} | changes)


def html_of(trace: Trace, *arguments: Any) -> str:
    return trace.coloured(*arguments)._repr_html_()


def chunk_at(start: int) -> ScheduledChunk:
    return ScheduledChunk(Chunk(start, None, 0), Selection(1, 1.0))


def test_a_generation_shows_its_text_and_its_ranks_in_colour() -> None:
    base, tokenizer = load_base(small.BASE), AutoTokenizer.from_pretrained(small.BASE)
    inputs = tokenizer(" = Karsund = \n \n Karsund is a town", return_tensors="pt")
    with ChunkWiseModel(base, {"wiki": small.WIKI}, ChunkWiseConfig.preset("balanced")) as model:
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        trace = model.trace
    assert trace is not None
    [sequence] = trace.sequences
    prompt_tokens = inputs.input_ids.shape[1]
    coloured = trace.coloured(tokenizer, prompt_tokens)
    shown = Shown(coloured._repr_html_())
    text = tokenizer.decode(output[0, : len(sequence.tokens)])
    assert "".join(run[2] for run in shown.runs) == text and text in repr(coloured)
    colours = {f"rgb({','.join(map(str, rank_colour(rank / 16)))})" for rank in sequence.ranks}
    assert len(colours) > 1 and colours == {re.findall(r"rgb\(.*?\)", style)[0] for _, style, _ in shown.runs}
    assert sum("border-left" in style for _, style, _ in shown.runs) == len(sequence.chunks) - 1
    italic = "".join(text for _, style, text in shown.runs if "italic" in style)
    assert italic == tokenizer.decode(sequence.tokens[:prompt_tokens])
    assert f"wiki: mean rank {sequence.mean_rank:.1f} of 16" in coloured._repr_html_()


def test_texts_names_and_notes_are_escaped() -> None:
    evil = "<script>alert('\"&amp;')</script>\x1b[2J\u202e"
    sequence = SequenceTrace(evil, (1, 2), (8.0, 4.0), 8.0, ())
    trace = trace_of(sequence, notes=(evil,), kv_notes=(evil,))
    page = html_of(trace, Words(evil, evil))
    assert {tag.strip("/") for tag, _ in Shown(page).tags} <= {"div", "p", "b", "i", "span", "br"}
    assert [run[2] for run in Shown(page).runs] == [evil.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")] * 2
    assert "\x1b" not in page and "\u202e" not in page and "\x1b" not in repr(trace.coloured(Words(evil, evil)))
    assert page.count("alert") == 5, "the name, two tokens and two notes"


def test_formulas_in_a_text_stay_text() -> None:
    [(tag, attributes), *_] = Shown(html_of(trace_of(SequenceTrace("a", (1,), (8.0,), 8.0, ())), Words("$x$"))).tags
    assert tag == "div" and {"mathjax_ignore", "tex2jax_ignore"} <= set(attributes["class"].split())


def test_white_space_keeps_its_lines_and_its_width() -> None:
    sequence = SequenceTrace("a", (1, 2, 3), (8.0, 8.0, 4.0), 8.0, (chunk_at(0), chunk_at(1)))
    page = html_of(trace_of(sequence), Words("a\n\n", "  b", "   "))
    assert [run[2] for run in Shown(page).runs] == ["a\n\n", "  b", "   "] and "white-space:pre-wrap" in page


def test_every_coloured_text_has_its_own_text_colour() -> None:
    page = html_of(trace_of(SequenceTrace("a", (1,), (8.0,), 8.0, ())))
    styles = [attributes.get("style", "") for _, attributes in Shown(page).tags]
    coloured = [style for style in styles if "background" in style]
    assert len(coloured) == 6 and all("color:#000" in style for style in coloured), "the legend and a token"


def test_without_a_tokenizer_the_trace_shows_token_ids() -> None:
    trace = trace_of(SequenceTrace(None, (17, 4), (0.0, 0.0), 0.0, ()))
    assert [run[2] for run in Shown(trace._repr_html_()).runs] == ["17 4 "]
    assert "without an adapter: mean rank 0 of 0" in trace._repr_html_()


def test_what_a_batch_ran_after_the_end_of_a_text_is_not_shown() -> None:
    sequence = SequenceTrace("a", (1, 1, 0, 0), (8.0,) * 4, 8.0, (chunk_at(0), chunk_at(3)))
    coloured = trace_of(sequence, replace(sequence, tokens=(0,) * 4)).coloured(Words("a"))
    assert [run[2] for run in Shown(coloured._repr_html_()).runs] == ["aa"]
    assert repr(coloured).splitlines() == ["a: mean rank 8 of 8, 1 chunk", "aa", "a: mean rank 0 of 8, 0 chunks"]


class Bytes:
    """A model of llama-cpp-python, as far as it tells the bytes of tokens."""

    def detokenize(self, tokens: list[int], special: bool) -> bytes:
        return bytes(tokens)


@pytest.mark.parametrize("tokenizer", [Bytes(), AutoTokenizer.from_pretrained(small.BASE)])
def test_a_character_of_several_tokens_belongs_to_the_last_of_them(tokenizer: Any) -> None:
    text = "a ø € b"
    tokens = list(text.encode()) if isinstance(tokenizer, Bytes) else tokenizer(text).input_ids
    texts = token_texts(tokenizer, tokens)
    assert len(texts) == len(tokens) and "".join(texts) == text and "" in texts
