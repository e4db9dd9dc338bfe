"""Converts prompts to inputs of a model, and generated tokens to answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from chunkwise_lora.errors import ChunkWiseError
from chunkwise_lora.evaluation.data import Example

T = TypeVar("T")


def batches_of(examples: Sequence[T], size: int) -> list[Sequence[T]]:
    """Batches of `size` examples; the last batch may be smaller."""
    return [examples[start : start + size] for start in range(0, len(examples), size)]


def set_padding(tokenizer: Any) -> None:
    """Make the end-of-sequence token the padding token, if the tokenizer has no padding token.

    Raises:
        ChunkWiseError: The tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token is None:
        raise ChunkWiseError(
            "the tokenizer has no end-of-sequence token, so no answer could end; set tokenizer.eos_token"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def prompt_inputs(examples: Sequence[Example], tokenizer: Any, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Token ids and attention mask of the prompts, each (batch, tokens), padded on the left, on a device."""
    prompts = [example.prompt for example in examples]
    return dict(tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(device))


def first_lines(new: Tensor | Sequence[Sequence[int]], tokenizer: Any) -> list[str]:
    """The first line of the text of each row of generated tokens (batch, tokens)."""
    return [text.split("\n")[0].strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
