"""Reads the states of closed chunks out of a cache, for KV policies to score."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from chunkwise_lora.engines.transformers.cache.layer import ChunkWiseLayer
from chunkwise_lora.engines.transformers.cache.queries import OpenChunkQueries
from chunkwise_lora.method.eviction import ChunkStates


def chunk_states(
    layers: Sequence[ChunkWiseLayer],
    row: int,
    slots: Sequence[np.ndarray],
    values: bool = True,
    queries: OpenChunkQueries | None = None,
    columns: Sequence[np.ndarray] = (),
) -> Iterator[list[ChunkStates]]:
    """Yield the states of some closed chunks of one sequence.

    Args:
        layers: All layers that hold the chunks.
        row: The sequence's row in the batch.
        slots: For each chunk, (tokens,) its hot slots.
        values: Whether values are read. If not, they have a head_dim of 0.
        queries: The queries of the chunks, or None where no policy reads them.
        columns: For each chunk, (tokens,) its columns among the queries.

    Yields:
        For each chunk, one `ChunkStates` per group of layers that have the same shape.
    """
    ends = np.cumsum([len(chunk_slots) for chunk_slots in slots]).tolist()
    index = torch.from_numpy(np.concatenate(slots))
    query_index = torch.from_numpy(np.concatenate(columns)) if queries else index
    groups = []
    for group in _alike(layers):
        keys = _gathered([layer.keys[row] for layer in group], index)
        nothing = keys.new_empty((len(group), keys.shape[1], len(index), 0))
        read_values = _gathered([layer.values[row] for layer in group], index) if values else nothing
        read_queries = keys[:, :0]
        if queries is not None:
            read_queries = _gathered([queries.read(layer)[row] for layer in group], query_index)
            read_queries *= keys.new_tensor([layer.scaling for layer in group])[:, None, None, None]
        groups.append((keys, read_values, read_queries))
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        yield [ChunkStates(*(states[:, :, start:end] for states in group)) for group in groups]


def _alike(layers: Sequence[ChunkWiseLayer]) -> list[list[ChunkWiseLayer]]:
    """Group layers by heads and head size."""
    groups: dict[tuple[int, ...], list[ChunkWiseLayer]] = {}
    for layer in layers:
        heads = layer.queries[0].shape[1] if layer.queries else 0
        groups.setdefault((layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3], heads), []).append(layer)
    return list(groups.values())


def _gathered(states: Sequence[Tensor], index: Tensor) -> Tensor:
    """Return (layers, heads, tokens, head_dim) float32 from the states (heads, slots, head_dim) of each layer."""
    heads, _, width = states[0].shape
    gathered = states[0].new_empty((len(states), heads, len(index), width), dtype=torch.float32)
    first, last = (int(index[0]), int(index[-1])) if len(index) else (0, -1)
    adjacent = last - first + 1 == len(index)  # slots rise, so they are one range, as in a prompt
    for layer, source in enumerate(states):
        gathered[layer] = source[:, first : last + 1] if adjacent else source[:, index.to(source.device)]
    return gathered
