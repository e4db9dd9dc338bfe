"""The data sets of the evaluations: what a model is given, and what it should say."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from chunkwise_lora.errors import ChunkWiseError, first_line
from chunkwise_lora.files import read_text


@dataclass(frozen=True)
class Example:
    """A prompt, and the answers that count as right."""

    prompt: str
    references: tuple[str, ...]
    """None where no answer is known."""
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


def squad(source: str) -> list[Example]:
    """The questions of SQuAD v1.1 JSON, or of a data set on the hub laid out like `rajpurkar/squad`."""
    if not Path(source).is_file():
        return [
            Example(
                squad_prompt(row["context"], row["question"]),
                tuple(dict.fromkeys(row["answers"]["text"])),
                row["context"],
            )
            for row in _from_hub(source, "validation")
        ]
    try:
        return squad_rows(json.loads(read_text(Path(source), ChunkWiseError)))
    except (ValueError, KeyError, TypeError) as error:
        raise ChunkWiseError(f"{source}: is not SQuAD v1.1 JSON ({type(error).__name__}: {error})") from None


def squad_rows(content: Mapping[str, Any]) -> list[Example]:
    """Every question of parsed SQuAD v1.1 JSON."""
    return [
        Example(
            squad_prompt(paragraph["context"], question["question"]),
            tuple(dict.fromkeys(answer["text"] for answer in question.get("answers", ()))),
            paragraph["context"],
        )
        for article in content["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]


def squad_prompt(context: str, question: str) -> str:
    """What the `squad` adapter is trained on."""
    return f"{context}\nQuestion: {question}\nAnswer:"


def e2e(source: str) -> list[Example]:
    """The meanings of E2E NLG, as comma-separated values with columns mr and ref, each with all its references.

    Without known answers there is no ref, or mr is the only column.
    """
    if Path(source).is_file():
        rows = list(csv.DictReader(read_text(Path(source), ChunkWiseError).splitlines(keepends=True)))
        if not rows or not ({"mr", "ref"} <= rows[0].keys() or rows[0].keys() == {"mr"}):
            raise ChunkWiseError(f"{source}: needs the columns mr and ref, or mr alone where no answers are known")
        pairs = [(row["mr"], row.get("ref")) for row in rows]
    else:
        pairs = [(row["meaning_representation"], row["human_reference"]) for row in _from_hub(source, "test")]
    references: dict[str, list[str]] = {}
    for meaning, reference in pairs:
        references.setdefault(meaning, []).extend([reference] if reference else [])
    return [Example(e2e_prompt(meaning), tuple(found)) for meaning, found in references.items()]


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
