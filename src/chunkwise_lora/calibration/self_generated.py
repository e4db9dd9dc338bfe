"""Self-generated text: text that an adapter generates itself, to calibrate or to train on.

It resembles what the adapter will generate in use, any amount of it can be generated, and the adapter was not trained
on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from chunkwise_lora.calibration.log_probabilities import ChunkWiseModel, sampled
from chunkwise_lora.method.config import ChunkWiseConfig

PREFIX_TOKENS = 16
"""Tokens of real text at the beginning of each sequence, or half of the sequence if it is shorter than twice this.
A prefix keeps the generated text on the subject of the real text."""
BATCH = 64
"""Sequences that are generated together."""


def prefix_tokens(length: int) -> int:
    """Tokens of real text at the beginning of a generated sequence of `length` tokens."""
    return min(PREFIX_TOKENS, length // 2)


def generate_text(
    model: ChunkWiseModel,
    text: Tensor,
    sequences: int,
    *,
    adapter: str | None = None,
    seed: int = 0,
    track: Callable[[Iterable[int]], Iterable[int]] = lambda work: work,
) -> Tensor:
    """Sample sequences at full rank and temperature 1 that continue short pieces of a text.

    Args:
        model: A model with ladders.
        text: (rows, length) token ids on the CPU; a random piece of a random row is the beginning of each sequence.
        sequences: Number of sequences to generate.
        adapter: Name of the ladder; by default the first one of the model.
        seed: Seed of the pieces and of sampling.
        track: Wraps the sequence of batches, to show progress.

    Returns:
        (sequences, length) token ids on the CPU, beginnings included.
    """
    rows, length = text.shape
    prefix = prefix_tokens(length)
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"adapter_names": adapter, "chunkwise_config": ChunkWiseConfig.preset("lossless")}
    options |= {"do_sample": False, "logits_processor": LogitsProcessorList([_Sampling(generator)])}
    options |= {"min_new_tokens": length - prefix, "max_new_tokens": length - prefix, "pad_token_id": 0}
    generated = []
    for start in track(range(0, sequences, BATCH)):
        count = min(BATCH, sequences - start)
        first = torch.randint(length - prefix, (count, 1), generator=generator)
        places = first + torch.arange(prefix)
        prefixes = text[torch.randint(rows, (count, 1), generator=generator), places]
        generated.append(model.generate(prefixes.to(model.input_device), **options).cpu())
    return torch.cat(generated)


class _Sampling(LogitsProcessor):
    """Leaves one token possible, which `sampled` draws. The draws of transformers differ from device to device."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn = sampled(scores.float().log_softmax(-1), self._generator)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn[:, None], 0)
