"""A KV cache that carries out KV decisions: it really stores INT8 and really drops positions.

Each layer holds two pools. *Hot* holds entries in the model's precision, the newest last; *cold* holds INT8. Attention
does not depend on the order of keys, whose positions are already in them, so attention sees cold, then hot, and a mask
that tells which slots each sequence really uses. All layers hold the same tokens in the same slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from chunkwise_lora.backends.native import give_memory_back
from chunkwise_lora.engines.transformers.cache.layer import ChunkWiseLayer
from chunkwise_lora.engines.transformers.cache.slots import NO_TOKEN, kept, packed, picked, within
from chunkwise_lora.method.kv_policy import KVDecision

MANY_SLOTS = 256
"""Where so many slots move at once, as after a pass over a prompt, what a layer frees is given back to the system."""

_KEEP, _INT8, _DROP = 0, 1, 2


class ChunkWiseCache(Cache):
    """Layers that obey KV decisions where they can, and transformers' own elsewhere (sliding windows).

    `carries_out` is False where the model rules decisions out; then every layer is transformers' own.
    """

    def __init__(
        self, config: PreTrainedConfig, int8_head_share: float, carries_out: bool, use_kernels: bool = True
    ) -> None:
        layers = DynamicCache(config=config).layers
        super().__init__(
            layers=[
                ChunkWiseLayer(int8_head_share, use_kernels) if carries_out and type(layer) is DynamicLayer else layer
                for layer in layers
            ]
        )
        self.own = [layer for layer in self.layers if isinstance(layer, ChunkWiseLayer)]
        self._cold = np.empty((0, 0), np.int64)
        """(batch, cold slots) the token in each slot."""
        self._hot = np.empty((0, 0), np.int64)
        self._in_columns = True

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Where a mask puts the first query: behind all slots."""
        layer = self.layers[layer_idx]
        return layer.slots if isinstance(layer, ChunkWiseLayer) else super().get_query_offset(layer_idx)

    def slot_mask(self, new: np.ndarray) -> np.ndarray | None:
        """(batch, slots + tokens) bool: the slots each sequence uses, then `new` (batch, tokens).

        None while slots are columns of the input: then the input's own mask is right.
        """
        if self._in_columns:
            return None
        return np.concatenate([self._cold != NO_TOKEN, self._hot != NO_TOKEN, new], axis=1)

    def note(self, tokens: np.ndarray) -> None:
        """Tell which tokens (batch, n) the last pass added, `NO_TOKEN` for padding."""
        if not len(self._hot):
            self._hot = self._cold = np.empty((len(tokens), 0), np.int64)
        self._hot = np.concatenate([self._hot, tokens], axis=1)

    def carry_out(self, decisions: Sequence[Sequence[KVDecision]]) -> None:
        """Quantise and drop what `decisions`, one list per sequence, say."""
        if not self.own or not any(map(_acts, (decision for row in decisions for decision in row))):
            return
        fate = np.full(self._hot.shape, _KEEP)
        for row, of_sequence in enumerate(decisions):
            for decision in of_sequence:
                hot = within(self._hot[row], decision)
                if decision.action == "int8":
                    fate[row, hot] = _INT8
                elif decision.action == "drop":
                    fate[row, hot] = _DROP
                    self._cold[row, within(self._cold[row], decision)] = NO_TOKEN
            self._drop_duplicates(row, of_sequence, fate[row])
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
        """Do the same in all own layers; `slots` are (batch, n)."""
        tensors = [None if index is None else torch.from_numpy(np.maximum(index, 0)) for index in slots]
        many = sum(tensor.shape[1] for tensor in tensors if tensor is not None) >= MANY_SLOTS
        for layer in self.own:
            act(layer, *(None if tensor is None else tensor.to(layer.device) for tensor in tensors))
            if many and layer.device.type == "cpu":
                give_memory_back()

    def _drop_duplicates(self, row: int, decisions: Sequence[KVDecision], fate: np.ndarray) -> None:
        """Mark hot tokens whose key is all but equal to the next one's in the chunk, over all heads and layers."""
        wanted = [decision for decision in decisions if decision.duplicate_similarity is not None]
        if not wanted:
            return
        slots = np.flatnonzero(self._hot[row] != NO_TOKEN)
        products, squares = torch.zeros(max(len(slots) - 1, 0)), torch.zeros(len(slots))
        index = torch.from_numpy(slots)
        for layer in self.own:
            keys = layer.keys[row].index_select(1, index.to(layer.device)).float().transpose(0, 1).flatten(1)
            products += (keys[:-1] * keys[1:]).sum(1).cpu()
            squares += keys.square().sum(1).cpu()
        cosine = (products / (squares[:-1] * squares[1:]).sqrt().clamp_min(1e-12)).numpy()
        tokens = self._hot[row, slots]
        for decision in wanted:
            chunk = within(tokens, decision)[:-1]
            fate[slots[chunk[cosine[chunk] > decision.duplicate_similarity]]] = _DROP

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow a beam search's choice of sequences."""
        super().reorder_cache(beam_idx)
        if len(self._hot):
            order = beam_idx.cpu().numpy()
            self._hot, self._cold = self._hot[order], self._cold[order]

    @property
    def nbytes(self) -> int:
        """Bytes of storage, over all layers."""
        return sum(layer.nbytes if isinstance(layer, ChunkWiseLayer) else _plain_nbytes(layer) for layer in self.layers)

    @property
    def full_nbytes(self) -> int:
        """Bytes that transformers' own cache would hold for the same tokens."""
        return sum(
            layer.full_nbytes if isinstance(layer, ChunkWiseLayer) else _plain_nbytes(layer) for layer in self.layers
        )


def _plain_nbytes(layer: object) -> int:
    tensors = (getattr(layer, "keys", None), getattr(layer, "values", None))
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)


def _acts(decision: KVDecision) -> bool:
    return decision.action != "keep" or decision.duplicate_similarity is not None
