"""A KV cache that carries out KV decisions: it really stores INT8 and really drops positions.

Each layer holds two pools. *Hot* holds entries in the model's precision, the newest last; *cold* holds INT8. Attention
does not depend on the order of keys, whose positions are already in them, so attention sees cold, then hot, and a mask
that tells which slots each sequence really uses. All layers hold the same tokens in the same slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from chunkwise_lora.backends.native import Pools, Shape, give_memory_back, kernels
from chunkwise_lora.method.kv_policy import KVDecision

ROOM = 16
"""Storage grows by so many slots at least, or by a 32nd, so that a step rarely copies it."""

WASTE = 16
"""Slots that no sequence uses are swept out once they are so many, and an eighth of all."""

MANY_SLOTS = 256
"""Where so many slots move at once, as after a pass over a prompt, what a layer frees is given back to the system."""

NO_TOKEN = -1
"""Marks a slot that holds nothing for a sequence."""

_KEEP, _INT8, _DROP = 0, 1, 2


class Int8Pool:
    """Keys or values of one layer, INT8 in `int8_heads`, the model's precision in the others.

    The tensors have room for more than the `used` slots.
    """

    def __init__(self, template: Tensor, int8_heads: Tensor) -> None:
        batch, heads, _, width = template.shape
        every = torch.arange(heads, device=template.device)
        self.int8_heads = int8_heads
        self.other_heads = every[~torch.isin(every, int8_heads)]
        self.places = torch.empty_like(every, dtype=torch.int32)
        """(heads,) where a head stands: p >= 0 among the INT8 ones, or else at -1 - p among the others."""
        self.places[self.int8_heads] = torch.arange(len(self.int8_heads)).to(self.places)
        self.places[self.other_heads] = -1 - torch.arange(len(self.other_heads)).to(self.places)
        self.used = 0
        self.codes = template.new_empty((batch, len(int8_heads), 0, width), dtype=torch.int8)
        self.scales = template.new_empty((batch, len(int8_heads), 0, 1), dtype=torch.bfloat16)
        self.others = template.new_empty((batch, len(self.other_heads), 0, width))

    def append(self, states: Tensor) -> None:
        """Quantise (batch, heads, slots, width) and add it behind what is held."""
        codes, scales = quantise(states[:, self.int8_heads])
        self.codes = _appended(self.codes, self.used, codes)
        self.scales = _appended(self.scales, self.used, scales)
        self.others = _appended(self.others, self.used, states[:, self.other_heads])
        self.used += states.shape[2]

    def pick(self, slots: Tensor) -> None:
        """Keep only `slots` (batch, n), in that order, without room."""
        self.codes, self.scales, self.others = (take(t, slots) for t in (self.codes, self.scales, self.others))
        self.used = slots.shape[1]

    def select(self, sequences: Tensor) -> None:
        """Keep only `sequences` of the batch, in that order."""
        self.codes, self.scales, self.others = (t[sequences] for t in (self.codes, self.scales, self.others))

    def read(self, dtype: torch.dtype) -> Tensor:
        """(batch, heads, slots, width) what is held, in the model's precision."""
        codes, scales, others = (t[:, :, : self.used] for t in (self.codes, self.scales, self.others))
        states = (codes * scales.float()).to(dtype)
        if not len(self.other_heads):
            return states
        both = states.new_empty((len(states), len(self.int8_heads) + len(self.other_heads), *states.shape[2:]))
        both[:, self.int8_heads], both[:, self.other_heads] = states, others.to(dtype)
        return both

    @property
    def nbytes(self) -> int:
        """Bytes of storage."""
        return sum(tensor.untyped_storage().nbytes() for tensor in (self.codes, self.scales, self.others))


def quantise(states: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric INT8 per token and head: codes like `states` (..., width), scales (..., 1) in bfloat16."""
    states = states.float()
    scales = (states.abs().amax(-1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny).bfloat16()
    return (states / scales.float()).round().clamp(-127, 127).to(torch.int8), scales


def take(states: Tensor, slots: Tensor) -> Tensor:
    """Slots (batch, n) of states (batch, heads, slots, width); n slots for every sequence."""
    if len(slots) == 1:
        return states.index_select(2, slots[0])
    return states.gather(2, slots[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))


class ChunkWiseLayer(CacheLayerMixin):
    """The cache of one attention layer: a hot and a cold pool.

    `kernels` may attend to it in decode steps; see `attention`.
    """

    is_sliding = False
    read_by_attention = False
    """Whether the model hands what `update` gives straight to `attention`, which reads the cold pool itself."""

    def __init__(self, int8_head_share: float = 1.0, use_kernels: bool = True) -> None:
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
        self._use_kernels = use_kernels

    @property
    def slots(self) -> int:
        """Slots that attention sees."""
        return self.hot + (self.cold[0].used if self.cold else 0)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take shapes, dtype and device from the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty((*key_states.shape[:2], 0, key_states.shape[3]))
        self.values = value_states.new_empty((*value_states.shape[:2], 0, value_states.shape[3]))
        self.is_initialized = True
        if self.device.type != "cpu" or key_states.shape != value_states.shape:
            self._use_kernels = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store states (batch, heads, tokens, head_dim) and return all that attention sees.

        Where attention reads this layer itself, the hot pool stands for it.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = _appended(self.keys, self.hot, key_states)
        self.values = _appended(self.values, self.hot, value_states)
        self.seen += key_states.shape[2]
        self.hot += key_states.shape[2]
        keys, values = self._hot() if self.read_by_attention else self.read()
        keys.layer = values.layer = self  # type: ignore[attr-defined]
        return keys, values

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values (batch, heads, slots, head_dim) of all slots, cold ones first."""
        keys, values = self._hot()
        if self.cold is None:
            return keys, values
        cold_keys, cold_values = (pool.read(self.dtype) for pool in self.cold)
        return torch.cat([cold_keys, keys], dim=2), torch.cat([cold_values, values], dim=2)

    def _hot(self) -> tuple[Tensor, Tensor]:
        return self.keys[:, :, : self.hot], self.values[:, :, : self.hot]

    def attends(self, query: Tensor, mask: Tensor | None) -> bool:
        """Whether `attend` takes these: one token per sequence, and a mask of slots alone or none."""
        if not self._use_kernels or query.shape[2] != 1 or query.dtype != self.dtype:
            return False
        if query.requires_grad or self.keys.requires_grad or self.values.requires_grad:
            return False
        if kernels(self.dtype) is None:
            return False
        slots = (self.keys.shape[0], 1, 1, self.slots)
        return mask is None or (mask.dtype == torch.bool and mask.shape == slots and mask.stride(3) == 1)

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """(batch, 1, query heads, head_dim) attention of query (batch, query heads, 1, head_dim) over all slots."""
        kernel = kernels(self.dtype)
        assert kernel is not None
        batch, heads, room, width = self.keys.shape
        shape = Shape(batch, heads, query.shape[1] // heads, width, self.hot, room)
        keys, values = (Pools(hot.data_ptr()) for hot in (self.keys, self.values))
        if self.cold is not None:
            first = self.cold[0]
            shape.cold, shape.cold_room, shape.int8_heads = first.used, first.codes.shape[2], first.codes.shape[1]
            shape.places = first.places.data_ptr()
            for pool, cold in zip((keys, values), self.cold, strict=True):
                pool.codes, pool.scales = cold.codes.data_ptr(), cold.scales.data_ptr()
                pool.others = cold.others.data_ptr()
        return kernel.attend(query, keys, values, shape, mask, scaling)

    def quantise(self, slots: Tensor) -> None:
        """Add hot `slots` (batch, n) to the cold pool; they stay hot until `sweep`."""
        keys, values = take(self.keys, slots), take(self.values, slots)
        if self.cold is None:
            heads = self._int8_heads(keys, values)
            self.cold = Int8Pool(keys, heads), Int8Pool(values, heads)
        self.cold[0].append(keys)
        self.cold[1].append(values)

    def sweep(self, cold: Tensor | None, hot: Tensor | None) -> None:
        """Keep only the slots `cold` and `hot`, each (batch, n); None keeps all."""
        if cold is not None:
            for pool in self.cold or ():
                pool.pick(cold)
        if hot is not None:
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


def _appended(storage: Tensor, used: int, states: Tensor) -> Tensor:
    """`storage` (batch, heads, room, width) with `states` behind its `used` slots, larger if need be."""
    end = used + states.shape[2]
    if end > storage.shape[2]:
        # The first states, a whole prompt, get no room: much of them may go once it is known what becomes of them.
        room = end + max(ROOM, end // 32) if used else end
        larger = storage.new_empty((*storage.shape[:2], room, storage.shape[3]))
        larger[:, :, :used] = storage[:, :, :used]
        storage = larger
    storage[:, :, used:end] = states
    return storage


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
                hot = _within(self._hot[row], decision)
                if decision.action == "int8":
                    fate[row, hot] = _INT8
                elif decision.action == "drop":
                    fate[row, hot] = _DROP
                    self._cold[row, _within(self._cold[row], decision)] = NO_TOKEN
            self._drop_duplicates(row, of_sequence, fate[row])
        self._in_columns = False
        to_cold = _packed((fate == _INT8) & (self._hot != NO_TOKEN))
        if to_cold.shape[1]:
            self._each(ChunkWiseLayer.quantise, to_cold)
            self._cold = np.concatenate([self._cold, _picked(self._hot, to_cold)], axis=1)
        self._hot[fate != _KEEP] = NO_TOKEN
        kept_cold, kept_hot = _kept(self._cold), _kept(self._hot)
        if kept_cold is not None or kept_hot is not None:
            self._each(ChunkWiseLayer.sweep, kept_cold, kept_hot)
        if kept_cold is not None:
            self._cold = _picked(self._cold, kept_cold)
        if kept_hot is not None:
            self._hot = _picked(self._hot, kept_hot)

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
            chunk = _within(tokens, decision)[:-1]
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


def _kept(tokens: np.ndarray) -> np.ndarray | None:
    """(batch, n) the slots in use, packed to one side; None while those that are not are too few to sweep out."""
    used = tokens != NO_TOKEN
    waste = tokens.shape[1] - int(used.sum(1).max(initial=0))
    return _packed(used) if waste >= max(WASTE, tokens.shape[1] // 8) else None


def _within(tokens: np.ndarray, decision: KVDecision) -> np.ndarray:
    return np.flatnonzero((tokens >= decision.start) & (tokens < decision.end))


def _packed(chosen: np.ndarray) -> np.ndarray:
    """(batch, n) the chosen slots of each row, packed to the left; `NO_TOKEN` fills up."""
    packed = np.full((len(chosen), int(chosen.sum(1).max(initial=0))), NO_TOKEN)
    for row, flags in enumerate(chosen):
        slots = np.flatnonzero(flags)
        packed[row, : len(slots)] = slots
    return packed


def _picked(tokens: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """The tokens in packed slots."""
    if not tokens.shape[1]:
        return np.full(slots.shape, NO_TOKEN)
    return np.where(slots == NO_TOKEN, NO_TOKEN, np.take_along_axis(tokens, np.maximum(slots, 0), axis=1))
