"""The queries of open chunks, kept for KV policies that read them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from chunkwise_lora.engines.transformers.cache.layer import ChunkWiseLayer
from chunkwise_lora.engines.transformers.cache.pool import take
from chunkwise_lora.engines.transformers.cache.slots import NO_TOKEN, kept, packed, picked, within
from chunkwise_lora.method.kv_policy import KVDecision


class OpenChunkQueries:
    """Keeps the queries of every sequence's open chunk, in all layers of a cache.

    The attention function gives each layer its queries, pass by pass. When a chunk closes, its queries are freed (up to
    `WASTE` tokens later). All layers hold the same tokens in the same columns.
    """

    def __init__(self, layers: Sequence[ChunkWiseLayer]) -> None:
        self._layers = layers
        self._tokens = np.empty((0, 0), np.int64)
        """(batch, columns) the token in each column."""
        self._opened = np.empty(0, np.int64)
        """(batch,) the first token of each open chunk."""
        self._passes = 0
        for layer in layers:
            layer.queries = []

    def note(self, tokens: np.ndarray) -> None:
        """Record which tokens (batch, n) the last pass added, `NO_TOKEN` for padding."""
        self._passes += 1
        if not len(self._tokens):
            self._tokens = np.empty((len(tokens), 0), np.int64)
            self._opened = np.zeros(len(tokens), np.int64)
        self._tokens = np.concatenate([self._tokens, tokens], axis=1)

    def columns(self, row: int, decision: KVDecision) -> np.ndarray:
        """Return (n,) the columns of a sequence that hold the tokens of a decision."""
        return within(self._tokens[row], decision)

    def read(self, layer: ChunkWiseLayer) -> Tensor:
        """Return (batch, query heads, columns, head_dim) the queries that a layer keeps."""
        self._join()
        assert layer.queries
        return layer.queries[0]

    def close(self, decisions: Sequence[Sequence[KVDecision]]) -> None:
        """Free the queries of chunks that `decisions`, one list per sequence, have closed."""
        if not any(decisions):
            return
        for row, sequence_decisions in enumerate(decisions):
            self._opened[row] = max([self._opened[row], *(decision.end for decision in sequence_decisions)])
        self._tokens[self._tokens < self._opened[:, None]] = NO_TOKEN
        columns = kept(self._tokens)
        if columns is not None:
            self._keep(columns)

    def select(self, order: np.ndarray) -> None:
        """Keep only the sequences `order`, as the layers do."""
        if len(self._tokens):
            self._tokens, self._opened = self._tokens[order], self._opened[order]

    def crop(self, lengths: np.ndarray) -> None:
        """Keep only the first tokens of each sequence, `lengths` (batch,)."""
        self._opened = np.minimum(self._opened, lengths)
        self._keep(packed((self._tokens != NO_TOKEN) & (self._tokens < lengths[:, None])))

    def stop(self) -> None:
        """Free all queries and receive no more."""
        for layer in self._layers:
            layer.queries = None

    def _keep(self, columns: np.ndarray) -> None:
        self._join()
        index = torch.from_numpy(np.maximum(columns, 0))
        for layer in self._layers:
            layer.queries = [take(self.read(layer), index.to(layer.device))]
        self._tokens = picked(self._tokens, columns)

    def _join(self) -> None:
        """Put the queries of all passes into one tensor per layer."""
        if self._passes > 1:
            for layer in self._layers:
                layer.queries = [torch.cat(layer.queries or [], dim=2)]
            self._passes = 1
