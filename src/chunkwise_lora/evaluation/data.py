"""The data sets of the tasks: text, or prompts with their reference answers."""

from __future__ import annotations

import csv
import io
import random
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
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
    """Examples with the same topic are related, and stay together when data is split. If empty, the prompt is
    the topic."""


def encode(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt, and of an answer with the end-of-sequence token, as adapters are trained on them.

    A beginning-of-sequence token, if the tokenizer adds one, comes before the prompt alone.
    """
    said = tokenizer(f" {answer}", add_special_tokens=False).input_ids
    return tokenizer(prompt).input_ids, [*said, tokenizer.eos_token_id]


def fitting(
    examples: Sequence[Example], tokenizer: Any, longest: int, tokens: int | None, say: Callable[[str], object]
) -> list[Example]:
    """The examples that `packed` needs: those that fit into a block, and not more of them than `tokens` ask for.

    Args:
        examples: Examples, in the order of their file.
        tokenizer: The base model's tokenizer.
        longest: Largest length of a block, in tokens. A prompt needs room for its answer.
        tokens: Largest number of tokens of all examples that are kept, which are evenly spread; None keeps all.
        say: Is told which examples are left out because of their length.

    Raises:
        ChunkWiseError: No example fits.
    """
    lengths = [len(ids) for ids in tokenizer([one.prompt for one in examples], verbose=False).input_ids]
    rooms = [longest - (1 if one.references else NEW_TOKENS) for one in examples]
    fits = [length <= room for length, room in zip(lengths, rooms, strict=True)]
    long = [i for i, one in enumerate(fits) if not one]
    if long:
        shown = [f"number {i + 1} ({lengths[i]:,} tokens, {_beginning(examples[i].prompt)})" for i in long[:3]]
        more = [f"{len(long) - 3} more"] if len(long) > 3 else []
        note = (
            f"{len(long)} of {len(examples)} prompts do not fit into a block of {longest} tokens with their answers: "
            f"{', '.join(shown + more)}"
        )
        if len(long) == len(examples):
            raise ChunkWiseError(f"{note}; give longer blocks")
        say(f"{note}. They are left out.")
    kept = [i for i, one in enumerate(fits) if one]
    total = sum(lengths[i] * max(1, len(examples[i].references)) for i in kept)
    if tokens is not None and total > tokens:
        count = max(1, len(kept) * tokens // total)
        kept = [kept[i * len(kept) // count] for i in range(count)]
    return [examples[i] for i in kept]


def _beginning(prompt: str) -> str:
    return repr(textwrap.shorten(prompt, 40, placeholder="..."))


def packed(examples: Sequence[Example], tokenizer: Any, longest: int) -> tuple[list[int], list[bool], int]:
    """Pack all prompts and answers into blocks of equal length, for calibration.

    Each block begins with one prompt and its answer, so that every answer follows its own prompt alone, as in
    generation. The examples that come next fill the rest of the block; at the end of the data, the preceding examples
    fill it. Four of five examples fit into a block, unless `longest` is too low for this. Topics are shuffled, and the
    examples of a topic stay together, so that the last blocks have other topics than the first ones.

    Args:
        examples: Examples; at least one of them must have an answer.
        tokenizer: The base model's tokenizer.
        longest: Largest length of a block, in tokens.

    Returns:
        Token ids of all blocks; for each token whether the next token belongs to an answer; the length of a block.
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
    return [token for token, _ in blocks], [scored for _, scored in blocks], length


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
