"""Reading the data sets of the evaluations: what a model is given and what it should say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Example:
    """A prompt and the answers that count as right."""

    prompt: str
    references: tuple[str, ...]


def squad_rows(content: Mapping[str, Any]) -> list[Example]:
    """Every question of SQuAD v1.1 JSON, as `paragraph, Question: ..., Answer:`."""
    return [
        Example(
            f"{paragraph['context']}\nQuestion: {question['question']}\nAnswer:",
            tuple(dict.fromkeys(answer["text"] for answer in question["answers"])),
        )
        for article in content["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]
