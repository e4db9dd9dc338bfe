"""The data sets of the evaluations: what a model is given, and what it should say."""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from chunkwise_lora.errors import ChunkWiseError, first_line
from chunkwise_lora.files import read_text

NEW_TOKENS = 64
"""Most tokens of an answer, where nothing else is said."""


@dataclass(frozen=True)
class Example:
    """A prompt, and its answers."""

    prompt: str
    references: tuple[str, ...]
    """Empty where none is known."""
    topic: str = ""
    """Examples of one topic tell about each other; by default, the prompt's own."""


def encode(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt, and of an answer with the end of the sequence, as adapters learn them."""
    return tokenizer(prompt).input_ids, [*tokenizer(f" {answer}").input_ids, tokenizer.eos_token_id]


def packed(examples: Sequence[Example], tokenizer: Any, longest: int) -> tuple[list[int], list[bool], int]:
    """Token ids of all prompts with all of their answers, whether an answer's token follows, and a length of blocks.

    Every block begins with another example and goes on with the ones after it, or at the end with those before, so that
    examples stand where generation meets them, at the beginning. Four of five fit whole, if no block is to be over
    `longest` tokens. Topics are shuffled and kept together, so that the last blocks are of others than the first.
    """
    topics: dict[str, list[list[tuple[int, bool]]]] = {}
    for one in examples:
        for reference in one.references:
            prompt, answer = encode(tokenizer, one.prompt, reference)
            follows = [i >= len(prompt) for i in range(1, len(prompt) + len(answer))]
            sequence = list(zip(prompt + answer, [*follows, False], strict=True))
            topics.setdefault(one.topic or one.prompt, []).append(sequence)
    shuffled = list(topics.values())
    random.Random(0).shuffle(shuffled)
    sequences = list(chain(*shuffled))
    length = min(longest, sorted(map(len, sequences))[len(sequences) * 4 // 5])
    blocks: list[tuple[int, bool]] = []
    for i in range(len(sequences)):
        around = chain(sequences[i:], reversed(sequences[:i]))
        blocks += islice(chain.from_iterable(around), length)
    return [token for token, _ in blocks], [counts for _, counts in blocks], length


def wikitext(source: str) -> str:
    """The text of a file, or the test split of a data set on the hub, `name` or `name:configuration`."""
    if Path(source).is_file():
        return read_text(Path(source), ChunkWiseError)
    return "".join(row["text"] for row in _from_hub(source, "test"))


class _Answer(BaseModel):
    text: str


class _Question(BaseModel):
    question: str
    answers: list[_Answer]


class _Paragraph(BaseModel):
    context: str
    qas: list[_Question]


class _Article(BaseModel):
    paragraphs: list[_Paragraph]


class _Squad(BaseModel):
    data: list[_Article]


def squad(source: str) -> list[Example]:
    """The questions of SQuAD v1.1 JSON, or of a data set on the hub laid out like `rajpurkar/squad`.

    `answers` may be empty where none is known.
    """
    if not Path(source).is_file():
        return [
            Example(
                squad_prompt(row["context"], row["question"]),
                _told(dict.fromkeys(row["answers"]["text"])),
                row["context"],
            )
            for row in _from_hub(source, "validation")
        ]
    try:
        content = _Squad.model_validate_json(read_text(Path(source), ChunkWiseError))
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        what = f"{place}: {problem['msg']}" if place else problem["msg"]
        raise ChunkWiseError(f"{source}: is not SQuAD v1.1 JSON ({what})") from None
    return _questions(content)


def squad_rows(content: Mapping[str, Any]) -> list[Example]:
    """Every question of parsed SQuAD v1.1 JSON."""
    return _questions(_Squad.model_validate(content))


def _questions(content: _Squad) -> list[Example]:
    return [
        Example(
            squad_prompt(paragraph.context, one.question),
            _told(dict.fromkeys(answer.text for answer in one.answers)),
            paragraph.context,
        )
        for article in content.data
        for paragraph in article.paragraphs
        for one in paragraph.qas
    ]


def squad_prompt(context: str, question: str) -> str:
    """What the `squad` adapter is trained on."""
    return f"{context}\nQuestion: {question}\nAnswer:"


def e2e(source: str) -> list[Example]:
    """The meanings of E2E NLG, each with all its references: columns mr and ref of comma-separated values.

    ref may be empty, or not be there, where none is known.
    """
    if Path(source).is_file():
        pairs = e2e_rows(source)
    else:
        pairs = [(row["meaning_representation"], row["human_reference"]) for row in _from_hub(source, "test")]
    references: dict[str, list[str]] = {}
    for meaning, reference in pairs:
        references.setdefault(meaning, []).append(reference)
    return [Example(e2e_prompt(meaning), _told(found)) for meaning, found in references.items()]


def e2e_rows(source: str) -> list[tuple[str, str]]:
    """The columns mr and ref of a file of comma-separated values; ref may be empty, or not be there.

    Raises:
        ChunkWiseError: The file is none of these, or a meaning is empty.
    """
    reader = csv.DictReader(io.StringIO(read_text(Path(source), ChunkWiseError)), strict=True)
    pairs = []
    try:
        names = list(reader.fieldnames or ())
        if names != ["mr"] and not (names.count("mr") == names.count("ref") == 1):
            raise ChunkWiseError(f"{source}: needs the columns mr and ref, or mr alone")
        for row in reader:
            where = f"{source}, line {reader.line_num}"
            if None in row:
                raise ChunkWiseError(f"{where}: has more values than columns; put those with commas in quotes")
            if not (row["mr"] or "").strip():
                raise ChunkWiseError(f"{where}: mr is empty")
            pairs.append((row["mr"], row.get("ref") or ""))
    except csv.Error as error:
        raise ChunkWiseError(
            f"{source}: is not comma-separated values after line {reader.line_num} ({error})"
        ) from None
    return pairs


def _told(answers: Iterable[str]) -> tuple[str, ...]:
    """Those that are not blank."""
    return tuple(answer for answer in answers if answer.strip())


def e2e_prompt(meaning: str) -> str:
    """What the `e2e` adapter is trained on."""
    return f"{meaning} ->"


def _from_hub(source: str, split: str) -> Any:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ChunkWiseError(
            f"{source}: is no file; to look for it on the hub, pip install 'chunkwise-lora[hub]'"
        ) from None

    name, _, configuration = source.partition(":")
    try:
        return load_dataset(name, configuration or None, split=split)
    except Exception as error:  # the hub's client raises errors of many libraries
        raise ChunkWiseError(
            f"{source}: is no file, and no data set that can be loaded ({first_line(error)})"
        ) from None
