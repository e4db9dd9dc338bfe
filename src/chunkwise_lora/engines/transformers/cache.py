"""A KV cache that carries out KV decisions: it really stores INT8 and really drops positions.

Each layer holds two pools. *Hot* holds entries in the model's precision, the newest last; *cold* holds INT8. Attention
does not depend on the order of keys, whose positions are already in them, so attention sees cold, then hot, and a mask
that tells which slots each sequence really uses. All layers hold the same tokens in the same slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from chunkwise_lora.kv_policy import KVDecision

HOT_BLOCK = 16
"""Hot storage grows by at least so many slots, and by an eighth, so that a step rarely copies it."""

NO_TOKEN = -1
"""Marks a slot that holds nothing for a sequence."""

_KEEP, _INT8, _DROP = 0, 1, 2


class Int8Pool:
    """Keys or values of one layer, INT8 in `int8_heads`, the model's precision in the others."""

    def __init__(self, template: Tensor, int8_heads: Tensor) -> None:
        batch, heads, _, width = template.shape
        every = torch.arange(heads, device=template.device)
        self.int8_heads = int8_heads
        self.other_heads = every[~torch.isin(every, int8_heads)]
        self.codes = template.new_empty((batch, len(int8_heads), 0, width), dtype=torch.int8)
        self.scales = template.new_empty((batch, len(int8_heads), 0, 1), dtype=torch.float16)
        self.others = template.new_empty((batch, len(self.other_heads), 0, width))

    def append(self, states: Tensor) -> None:
        """Quantise (batch, heads, slots, width) and add it behind what is held."""
        codes, scales = quantise(states[:, self.int8_heads])
        self.codes = torch.cat([self.codes, codes], dim=2)
        self.scales = torch.cat([self.scales, scales], dim=2)
        self.others = torch.cat([self.others, states[:, self.other_heads]], dim=2)

    def pick(self, slots: Tensor) -> None:
        """Keep only `slots` (batch, n), in that order."""
        self.codes, self.scales, self.others = (take(t, slots) for t in (self.codes, self.scales, self.others))

    def select(self, sequences: Tensor) -> None:
        """Keep only `sequences` of the batch, in that order."""
        self.codes, self.scales, self.others = (t[sequences] for t in (self.codes, self.scales, self.others))

    def read(self, dtype: torch.dtype) -> Tensor:
        """(batch, heads, slots, width) what is held, in the model's precision."""
        states = self.codes.to(dtype) * self.scales.to(dtype)
        if not len(self.other_heads):
            return states
        both = self.others.new_empty((len(states), len(self.int8_heads) + len(self.other_heads), *states.shape[2:]))
        both[:, self.int8_heads], both[:, self.other_heads] = states, self.others
        return both

    @property
    def nbytes(self) -> int:
        """Bytes of storage."""
        return sum(tensor.untyped_storage().nbytes() for tensor in (self.codes, self.scales, self.others))


def quantise(states: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric INT8 per token and head: codes like `states` (..., width), scales (..., 1) in float16."""
    smallest = torch.finfo(torch.float16).tiny
    scales = (states.float().abs().amax(-1, keepdim=True) / 127).clamp_min(smallest).half()
    return (states.float() / scales.float()).round().clamp(-127, 127).to(torch.int8), scales


def take(states: Tensor, slots: Tensor) -> Tensor:
    """Slots (batch, n) of states (batch, heads, slots, width); n slots for every sequence."""
    if len(slots) == 1:
        return states.index_select(2, slots[0])
    return states.gather(2, slots[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))


class ChunkWiseLayer(CacheLayerMixin):
    """The cache of one attention layer: a hot and a cold pool."""

    is_sliding = False

    def __init__(self, int8_head_share: float = 1.0) -> None:
        super().__init__()
        self.int8_head_share = int8_head_share
        self.keys: Tensor
        self.values: Tensor
        self.seen = 0
        """Tokens seen, whether still held or not."""
        self.hot = 0
        """Hot slots in use."""
        self.cold: tuple[Int8Pool, Int8Pool] | None = None
        """Keys and values in INT8, None before the first."""

    @property
    def slots(self) -> int:
        """Slots that attention sees."""
        return self.hot + (self.cold[0].codes.shape[2] if self.cold else 0)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take shapes, dtype and device from the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty((*key_states.shape[:2], 0, key_states.shape[3]))
        self.values = value_states.new_empty((*value_states.shape[:2], 0, value_states.shape[3]))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store states (batch, heads, tokens, head_dim) and return all that attention sees."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.hot + key_states.shape[2]
        if end > self.keys.shape[2]:
            capacity = end + max(HOT_BLOCK, end // 8) if self.hot else end
            self.keys, self.values = (_grown(t, self.hot, capacity) for t in (self.keys, self.values))
        self.keys[:, :, self.hot : end] = key_states
        self.values[:, :, self.hot : end] = value_states
        self.seen += key_states.shape[2]
        self.hot = end
        keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        if self.cold is None:
            return keys, values
        cold_keys, cold_values = (pool.read(self.dtype) for pool in self.cold)
        return torch.cat([cold_keys, keys], dim=2), torch.cat([cold_values, values], dim=2)

    def rearrange(self, to_cold: Tensor, cold: Tensor | None, hot: Tensor) -> None:
        """Quantise hot slots `to_cold`, then keep the slots `cold` (None: all) and `hot`; each is (batch, n)."""
        if to_cold.shape[1]:
            keys, values = take(self.keys, to_cold), take(self.values, to_cold)
            if self.cold is None:
                heads = self._int8_heads(keys, values)
                self.cold = Int8Pool(keys, heads), Int8Pool(values, heads)
            self.cold[0].append(keys)
            self.cold[1].append(values)
        if cold is not None and self.cold is not None:
            for pool in self.cold:
                pool.pick(cold)
        self.keys, self.values = take(self.keys, hot), take(self.values, hot)
        self.hot = hot.shape[1]

    def _int8_heads(self, keys: Tensor, values: Tensor) -> Tensor:
        """The share of heads that INT8 hurts least, measured on the first states to be quantised."""
        errors = torch.zeros(keys.shape[1], device=keys.device)
        for states in (keys, values):
            codes, scales = quantise(states)
            difference = codes.float() * scales.float() - states.float()
            errors += difference.square().sum((0, 2, 3)) / states.float().square().sum((0, 2, 3)).clamp_min(1e-12)
        count = round(self.int8_head_share * len(errors))
        return errors.argsort()[:count].sort().values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what attention sees."""
        return self.slots + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.seen

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def select(self, sequences: Tensor) -> None:
        """Keep only `sequences` of the batch, in that order."""
        self.keys, self.values = self.keys[sequences], self.values[sequences]
        for pool in self.cold or ():
            pool.select(sequences)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow a beam search's choice of sequences."""
        if self.is_initialized:
            self.select(beam_idx.to(self.device))

    @property
    def nbytes(self) -> int:
        """Bytes of storage."""
        if not self.is_initialized:
            return 0
        hot = sum(tensor.untyped_storage().nbytes() for tensor in (self.keys, self.values))
        return hot + sum(pool.nbytes for pool in self.cold or ())

    @property
    def full_nbytes(self) -> int:
        """Bytes that every token seen would take in the model's precision."""
        if not self.is_initialized:
            return 0
        tensors = (self.keys, self.values)
        return sum(t.shape[0] * t.shape[1] * self.seen * t.shape[3] * t.itemsize for t in tensors)


def _grown(states: Tensor, used: int, capacity: int) -> Tensor:
    grown = states.new_empty((*states.shape[:2], capacity, states.shape[3]))
    grown[:, :, :used] = states[:, :, :used]
    return grown


class ChunkWiseCache(Cache):
    """Layers that obey KV decisions where they can, and transformers' own elsewhere (sliding windows).

    `carries_out` is False where the model rules decisions out; then every layer is transformers' own.
    """

    def __init__(self, config: PreTrainedConfig, int8_head_share: float, carries_out: bool) -> None:
        layers = DynamicCache(config=config).layers
        super().__init__(
            layers=[
                ChunkWiseLayer(int8_head_share) if carries_out and type(layer) is DynamicLayer else layer
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
        fate = np.full(self._hot.shape, _KEEP)
        kept_cold = self._cold != NO_TOKEN
        for row, of_sequence in enumerate(decisions):
            for decision in of_sequence:
                hot = _within(self._hot[row], decision)
                if decision.action == "int8":
                    fate[row, hot] = _INT8
                elif decision.action == "drop":
                    fate[row, hot] = _DROP
                    kept_cold[row, _within(self._cold[row], decision)] = False
                if decision.duplicate_similarity is not None:
                    fate[row, self._duplicates(row, hot, decision.duplicate_similarity)] = _DROP
        if not self.own or (not fate.any() and (kept_cold == (self._cold != NO_TOKEN)).all()):
            return
        fate[self._hot == NO_TOKEN] = _DROP
        to_cold, hot = _packed(fate == _INT8), _packed(fate == _KEEP, right=True)
        cold_tokens = np.concatenate([np.where(kept_cold, self._cold, NO_TOKEN), _picked(self._hot, to_cold)], axis=1)
        cold = _packed(cold_tokens != NO_TOKEN)
        # Slots in use already packed as they should be: nothing to move.
        settled = cold.shape == cold_tokens.shape and (cold == np.arange(cold.shape[1])).all()
        picks = [torch.from_numpy(np.maximum(index, 0)) for index in (to_cold, cold, hot)]
        for layer in self.own:
            moved, kept, newest = (pick.to(layer.device) for pick in picks)
            layer.rearrange(moved, None if settled else kept, newest)
        self._cold, self._hot, self._in_columns = _picked(cold_tokens, cold), _picked(self._hot, hot), False

    def _duplicates(self, row: int, slots: np.ndarray, similarity: float) -> np.ndarray:
        """Those of `slots` whose key is all but equal to the next one's, over all heads and layers."""
        products, squares = torch.zeros(max(len(slots) - 1, 0)), torch.zeros(len(slots))
        index = torch.from_numpy(slots)
        for layer in self.own:
            keys = layer.keys[row].index_select(1, index.to(layer.device)).float().transpose(0, 1).flatten(1)
            products += (keys[:-1] * keys[1:]).sum(1).cpu()
            squares += keys.square().sum(1).cpu()
        cosine = products / (squares[:-1] * squares[1:]).sqrt().clamp_min(1e-12)
        return slots[:-1][(cosine > similarity).numpy()]

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


def _within(tokens: np.ndarray, decision: KVDecision) -> np.ndarray:
    return np.flatnonzero((tokens >= decision.start) & (tokens < decision.end))


def _packed(chosen: np.ndarray, right: bool = False) -> np.ndarray:
    """(batch, n) the chosen slots of each row, packed to one side; `NO_TOKEN` fills up."""
    width = int(chosen.sum(1).max(initial=0))
    packed = np.full((len(chosen), width), NO_TOKEN)
    for row, flags in enumerate(chosen):
        slots = np.flatnonzero(flags)
        packed[row, width - len(slots) if right else 0 :][: len(slots)] = slots
    return packed


def _picked(tokens: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """The tokens in packed slots."""
    if not tokens.shape[1]:
        return np.full(slots.shape, NO_TOKEN)
    return np.where(slots == NO_TOKEN, NO_TOKEN, np.take_along_axis(tokens, np.maximum(slots, 0), axis=1))
