"""The data sets of the tasks: text, or prompts with their reference answers."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from chunkwise_lora.errors import ChunkWiseError, first_line
from chunkwise_lora.files import read_text

NEW_TOKENS = 64
"""Default of the largest number of tokens of an answer."""


@dataclass(frozen=True)
class Example:
    """A prompt and its reference answers."""

    prompt: str
    references: tuple[str, ...]
    """The reference answers; empty if none is known."""
    topic: str = ""
    """What the prompt is about, such as a paragraph. Examples of one topic stay together when data is split. By
    default it is the prompt itself."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "topic", self.topic or self.prompt)


def encode(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt, and of an answer with the end-of-sequence token, as adapters are trained on them.

    A beginning-of-sequence token, if the tokenizer adds one, comes before the prompt alone.
    """
    said = tokenizer(f" {answer}", add_special_tokens=False).input_ids
    return tokenizer(prompt).input_ids, [*said, tokenizer.eos_token_id]


def wikitext(source: str) -> str:
    """Read a text file, or the test split of a data set on the hub: `name`, or `name:configuration`."""
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
    """Read the questions of SQuAD v1.1 JSON, or of a data set on the hub with the layout of `rajpurkar/squad`.

    The list of answers to a question may be empty.

    Raises:
        ChunkWiseError: The file or data set cannot be read.
    """
    if not Path(source).is_file():
        return [
            Example(
                squad_prompt(row["context"], row["question"]),
                _non_blank(dict.fromkeys(row["answers"]["text"])),
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
    """The questions of parsed SQuAD v1.1 JSON."""
    return _questions(_Squad.model_validate(content))


def _questions(content: _Squad) -> list[Example]:
    return [
        Example(
            squad_prompt(paragraph.context, one.question),
            _non_blank(dict.fromkeys(answer.text for answer in one.answers)),
            paragraph.context,
        )
        for article in content.data
        for paragraph in article.paragraphs
        for one in paragraph.qas
    ]


def squad_prompt(context: str, question: str) -> str:
    """The prompt format of adapters for SQuAD."""
    return f"{context}\nQuestion: {question}\nAnswer:"


def e2e(source: str) -> list[Example]:
    """Read the meanings of E2E NLG with all their references, from a CSV file or a data set on the hub.

    The file has the columns mr (the meaning) and ref (a reference). ref may be empty, and the column may be missing.

    Raises:
        ChunkWiseError: The file or data set cannot be read.
    """
    if Path(source).is_file():
        pairs = e2e_rows(source)
    else:
        pairs = [(row["meaning_representation"], row["human_reference"]) for row in _from_hub(source, "test")]
    references: dict[str, list[str]] = {}
    for meaning, reference in pairs:
        references.setdefault(meaning, []).append(reference)
    return [Example(e2e_prompt(meaning), _non_blank(found)) for meaning, found in references.items()]


def e2e_rows(source: str) -> list[tuple[str, str]]:
    """Read the columns mr and ref of a CSV file. ref may be empty; without the column, all references are empty.

    Raises:
        ChunkWiseError: The file is not comma-separated values with these columns, or a meaning is empty.
    """
    reader = csv.DictReader(io.StringIO(read_text(Path(source), ChunkWiseError)), strict=True)
    pairs = []
    try:
        names = list(reader.fieldnames or ())
        if names != ["mr"] and not (names.count("mr") == names.count("ref") == 1):
            raise ChunkWiseError(f"{source}: the columns must be mr and ref, or only mr")
        for row in reader:
            where = f"{source}, line {reader.line_num}"
            if None in row:
                raise ChunkWiseError(f"{where}: has more values than columns; put values with commas in quotes")
            if not (row["mr"] or "").strip():
                raise ChunkWiseError(f"{where}: mr is empty")
            pairs.append((row["mr"], row.get("ref") or ""))
    except csv.Error as error:
        raise ChunkWiseError(
            f"{source}: is not comma-separated values after line {reader.line_num} ({error})"
        ) from None
    return pairs


def _non_blank(answers: Iterable[str]) -> tuple[str, ...]:
    """The answers that are not blank."""
    return tuple(answer for answer in answers if answer.strip())


def e2e_prompt(meaning: str) -> str:
    """The prompt format of the example ladder `e2e`."""
    return f"{meaning} ->"


def _from_hub(source: str, split: str) -> Any:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ChunkWiseError(
            f"{source}: there is no such file; to load data sets from the hub, pip install 'chunkwise-lora[hub]'"
        ) from None

    name, _, configuration = source.partition(":")
    try:
        return load_dataset(name, configuration or None, split=split)
    except Exception as error:  # the hub's client raises errors of many libraries
        raise ChunkWiseError(
            f"{source}: is not a file, and cannot be loaded as a data set from the hub ({first_line(error)})"
        ) from None
