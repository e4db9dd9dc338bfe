"""Text that an adapter writes itself: as much as is wanted, like what it will write, and none it was trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from chunkwise_lora.engines.transformers.model import ChunkWiseModel
from chunkwise_lora.method.config import ChunkWiseConfig

BEGINNING = 16
"""Tokens of real text that each piece begins with, or half of it where it is short."""
BATCH = 64


def written(
    model: ChunkWiseModel,
    text: Tensor,
    pieces: int,
    *,
    adapter: str | None = None,
    seed: int = 0,
    track: Callable[[Iterable[int]], Iterable[int]] = lambda work: work,
) -> Tensor:
    """(pieces, length) token ids, drawn at full rank, that go on from places in `text` (sequences, length)."""
    rows, length = text.shape
    beginning = min(BEGINNING, length // 2)
    options: dict[str, Any] = {"adapter_names": adapter, "chunkwise_config": ChunkWiseConfig.preset("lossless")}
    options |= {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    options |= {"min_new_tokens": length - beginning, "max_new_tokens": length - beginning, "pad_token_id": 0}
    found = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in track(range(0, pieces, BATCH)):
            count = min(BATCH, pieces - start)
            first = torch.randint(length - beginning, (count, 1))
            places = first + torch.arange(beginning)
            beginnings = text[torch.randint(rows, (count, 1)), places]
            found.append(model.generate(beginnings, **options))
    return torch.cat(found)
