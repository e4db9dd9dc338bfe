"""A KV cache that carries out KV decisions: it stores INT8 and frees dropped entries.

Each layer holds a hot pool in the model's precision and a cold pool in INT8. Keys already contain their positions, so
attention does not depend on the order of slots: it reads the cold pool, then the hot pool, under a mask of the slots
that each sequence uses. All layers hold the same tokens in the same slots.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from chunkwise_lora.backends.native import give_memory_back
from chunkwise_lora.engines.transformers.cache.layer import ChunkWiseLayer
from chunkwise_lora.engines.transformers.cache.queries import OpenChunkQueries
from chunkwise_lora.engines.transformers.cache.slots import NO_TOKEN, kept, packed, picked, within
from chunkwise_lora.engines.transformers.cache.states import chunk_states
from chunkwise_lora.method.eviction import evicted_tokens
from chunkwise_lora.method.kv_policies import needs_queries
from chunkwise_lora.method.kv_policy import KVDecision

logger = logging.getLogger(__name__)

MANY_SLOTS = 256
"""If at least this number of slots moves at once, as after a prompt, freed memory goes back to the system."""

SCORED_TOKENS = 512
"""About this number of tokens is copied at once for KV policies to score. It bounds the memory of the copy."""

_KEEP, _INT8, _DROP = 0, 1, 2


class ChunkWiseCache(Cache):
    """A `ChunkWiseLayer` for every layer with full attention, and transformers' own layers for sliding windows.

    Args:
        config: The model's configuration.
        int8_head_share: Share of a layer's heads that INT8 may use; the smallest of the batch's configs.
        carries_out: Whether the model lets KV decisions be carried out. If not, all layers are transformers' own.
        use_kernels: Whether the native kernels may read the layers.
        record_queries: Whether to keep the queries of open chunks, for KV policies that read them.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        int8_head_share: float,
        carries_out: bool,
        use_kernels: bool = True,
        record_queries: bool = False,
    ) -> None:
        layers = DynamicCache(config=config).layers
        super().__init__(
            layers=[
                ChunkWiseLayer(int8_head_share, use_kernels) if carries_out and type(layer) is DynamicLayer else layer
                for layer in layers
            ]
        )
        self.chunkwise_layers = [layer for layer in self.layers if isinstance(layer, ChunkWiseLayer)]
        """The layers that carry out KV decisions."""
        self._cold = np.empty((0, 0), np.int64)
        """(batch, cold slots) the token in each cold slot, `NO_TOKEN` where it is unused."""
        self._hot = np.empty((0, 0), np.int64)
        """(batch, hot slots) the token in each hot slot."""
        self._in_columns = True
        """Whether slots still are the columns of the input, padding included."""
        self._queries = OpenChunkQueries(self.chunkwise_layers) if record_queries and self.chunkwise_layers else None
        self.notes: tuple[str, ...] = ()
        """Which decisions were not carried out so far, and why."""

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return the column of the first query in a mask: after all slots."""
        layer = self.layers[layer_idx]
        return layer.slots if isinstance(layer, ChunkWiseLayer) else super().get_query_offset(layer_idx)

    def slot_mask(self, new: np.ndarray) -> np.ndarray | None:
        """Return (batch, slots + tokens) bool: the slots that each sequence uses, then `new` (batch, tokens).

        None if slots are still the columns of the input, so that the mask of the input is right.
        """
        if self._in_columns:
            return None
        return np.concatenate([self._cold != NO_TOKEN, self._hot != NO_TOKEN, new], axis=1)

    def note(self, tokens: np.ndarray) -> None:
        """Record which tokens (batch, n) the last pass added, `NO_TOKEN` for padding."""
        if not len(self._hot):
            self._hot = self._cold = np.empty((len(tokens), 0), np.int64)
        self._hot = np.concatenate([self._hot, tokens], axis=1)
        if self._queries is not None:
            self._queries.note(tokens)

    def carry_out(self, decisions: Sequence[Sequence[KVDecision]]) -> None:
        """Quantise and drop entries after a pass.

        Args:
            decisions: One list per sequence. Each sequence may follow its own config.
        """
        if self.chunkwise_layers and any(
            decision.acts for sequence_decisions in decisions for decision in sequence_decisions
        ):
            self._act(decisions)
        if self._queries is not None:
            self._queries.close(decisions)

    def _act(self, decisions: Sequence[Sequence[KVDecision]]) -> None:
        fate = np.full(self._hot.shape, _KEEP)
        for row, sequence_decisions in enumerate(decisions):
            for decision in sequence_decisions:
                hot = within(self._hot[row], decision)
                if decision.action == "int8":
                    fate[row, hot] = _INT8
                elif decision.action == "drop":
                    fate[row, hot] = _DROP
                    self._cold[row, within(self._cold[row], decision)] = NO_TOKEN
            self._evict(row, sequence_decisions, fate[row])
        self._in_columns = False
        to_cold = packed((fate == _INT8) & (self._hot != NO_TOKEN))
        if to_cold.shape[1]:
            self._each(ChunkWiseLayer.quantise, to_cold)
            self._cold = np.concatenate([self._cold, picked(self._hot, to_cold)], axis=1)
        self._hot[fate != _KEEP] = NO_TOKEN
        kept_cold, kept_hot = kept(self._cold), kept(self._hot)
        if kept_cold is not None or kept_hot is not None:
            self._each(ChunkWiseLayer.sweep, kept_cold, kept_hot)
        if kept_cold is not None:
            self._cold = picked(self._cold, kept_cold)
        if kept_hot is not None:
            self._hot = picked(self._hot, kept_hot)

    def _each(self, act: Callable[..., None], *slots: np.ndarray | None) -> None:
        """Call `act` for each layer that carries out KV decisions, with `slots`, each (batch, n)."""
        tensors = [None if index is None else torch.from_numpy(np.maximum(index, 0)) for index in slots]
        many = sum(tensor.shape[1] for tensor in tensors if tensor is not None) >= MANY_SLOTS
        for layer in self.chunkwise_layers:
            act(layer, *(None if tensor is None else tensor.to(layer.device) for tensor in tensors))
            if many and layer.device.type == "cpu":
                give_memory_back()

    @torch.no_grad()
    def _evict(self, row: int, decisions: Sequence[KVDecision], fate: np.ndarray) -> None:
        """Mark in `fate` (slots,) the hot tokens of one sequence that the scores of KV policies drop."""
        scored = [possible for decision in decisions if (possible := self._possible(decision)).scores_tokens]
        for read_queries in (False, True):
            alike = [decision for decision in scored if needs_queries(decision.evict) is read_queries]
            queries = self._queries if read_queries else None
            for batch in _batches(alike):
                slots = [within(self._hot[row], decision) for decision in batch]
                columns = [queries.columns(row, decision) for decision in batch] if queries else ()
                values = any(decision.evict is not None for decision in batch)
                states = chunk_states(self.chunkwise_layers, row, slots, values, queries, columns)
                for decision, chunk_slots, chunk in zip(batch, slots, states, strict=True):
                    fate[chunk_slots[evicted_tokens(decision, chunk)]] = _DROP

    def _possible(self, decision: KVDecision) -> KVDecision:
        """Return the part of a decision that can be carried out, and note the other part."""
        if not needs_queries(decision.evict) or (self._queries is not None and self._queries.complete):
            return decision
        note = (
            f"KV policy {decision.evict!r} not carried out: it reads queries, which the model's attention does not "
            "provide; load the model with attn_implementation='sdpa' and leave FastPaths.attention on"
        )
        if note not in self.notes:
            logger.warning("%s", note)
            self.notes = (*self.notes, note)
        return replace(decision, evict=None, keep_share=None)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the sequences as a beam search chose."""
        super().reorder_cache(beam_idx)
        if len(self._hot):
            order = beam_idx.cpu().numpy()
            self._hot, self._cold = self._hot[order], self._cold[order]
            if self._queries is not None:
                self._queries.select(order)

    @property
    def nbytes(self) -> int:
        """Bytes of storage, over all layers."""
        return sum(layer.nbytes if isinstance(layer, ChunkWiseLayer) else _plain_nbytes(layer) for layer in self.layers)

    @property
    def full_nbytes(self) -> int:
        """Bytes that the same tokens would take in the model's precision."""
        return sum(
            layer.full_nbytes if isinstance(layer, ChunkWiseLayer) else _plain_nbytes(layer) for layer in self.layers
        )


def _plain_nbytes(layer: object) -> int:
    tensors = (getattr(layer, "keys", None), getattr(layer, "values", None))
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)


def _batches(decisions: Sequence[KVDecision]) -> Iterator[list[KVDecision]]:
    """Cut decisions into batches of about `SCORED_TOKENS` tokens."""
    batch: list[KVDecision] = []
    tokens = 0
    for decision in decisions:
        batch.append(decision)
        tokens += decision.end - decision.start
        if tokens >= SCORED_TOKENS:
            yield batch
            batch, tokens = [], 0
    if batch:
        yield batch
