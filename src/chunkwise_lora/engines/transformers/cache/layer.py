"""Keys and values of one attention layer, partly in the model's precision and partly in INT8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from chunkwise_lora.backends import triton
from chunkwise_lora.backends.native import AttentionPools, PoolTensors, kernels
from chunkwise_lora.engines.transformers.cache.pool import (
    ROOM,
    Int8Pool,
    appended,
    dequantise,
    enlarged,
    quantise,
    take,
)
from chunkwise_lora.engines.transformers.cache.reading import Reading
from chunkwise_lora.engines.transformers.cache.stepping import StepRefused, StepTables
from chunkwise_lora.errors import EngineError


class ChunkWiseLayer(CacheLayerMixin):
    """The cache of one attention layer.

    The *hot* pool holds tokens in the model's precision, the newest last. The *cold* pool holds tokens in INT8. A
    decode step may attend to both pools by a kernel in C or Triton; see `attention`.

    Args:
        int8_head_share: Share of the heads that INT8 applies to, in [0, 1].
        use_kernels: Whether kernels in C or Triton may read this layer.
    """

    is_sliding = False
    read_by_attention = False
    """Whether `attention` receives exactly the tensors that `update` returns. It then reads the cold pool itself."""

    def __init__(self, int8_head_share: float = 1.0, use_kernels: bool = True) -> None:
        super().__init__()
        self.int8_head_share = int8_head_share
        self.keys: Tensor
        self.values: Tensor
        self.seen = 0
        """Number of tokens stored so far, dropped tokens included."""
        self.hot = 0
        """Number of hot slots in use."""
        self.cold: tuple[Int8Pool, Int8Pool] | None = None
        """Keys and values in INT8; None until the first token is quantised."""
        self.queries: list[Tensor] | None = None
        """Queries (batch, query heads, tokens, head_dim) of recent passes; None if no KV policy reads them."""
        self.reading: Reading | None = None
        """Checks the masks of attention; None if the layer has no cache around it."""
        self.was_read = False
        """Whether `attention` has read what the last `update` returned."""
        self.scaling = 1.0
        """Factor that the model's attention puts on products of queries and keys; known once queries are."""
        self._heads: Tensor | None = None
        """The heads that INT8 applies to; None until the first token is quantised."""
        self._use_kernels = use_kernels
        self._pools: tuple[tuple[object, ...], AttentionPools | None] | None = None
        self._step: tuple[StepTables, int] | None = None
        """The tables that the running pass uses, and the row of this layer; None if it runs as usual."""

    @property
    def slots(self) -> int:
        """Number of slots that attention reads, hot and cold."""
        return sum(self.cold_and_hot)

    @property
    def cold_and_hot(self) -> tuple[int, int]:
        """Numbers of cold and hot slots in use."""
        return self.cold[0].used if self.cold else 0, self.hot

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take shapes, dtype and device from the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty((*key_states.shape[:2], 0, key_states.shape[3]))
        self.values = value_states.new_empty((*value_states.shape[:2], 0, value_states.shape[3]))
        self.is_initialized = True
        if key_states.shape != value_states.shape or value_states.dtype != self.dtype:
            self._use_kernels = False  # autocast may give keys and values of two element types

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new states (batch, heads, tokens, head_dim) and return the keys and values that attention reads.

        If `attention` reads the cold pool itself, only the hot pool is returned.
        """
        if self._step is not None:
            return self._write(key_states, value_states, *self._step)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.was_read = False
        self.seen += key_states.shape[2]
        room = self._room(self.hot + key_states.shape[2])
        self.keys = appended(self.keys, self.hot, key_states, room)
        self.values = appended(self.values, self.hot, value_states, room)
        self.hot += key_states.shape[2]
        keys, values = self._hot() if self.read_by_attention else self.read()
        keys.layer = values.layer = self  # type: ignore[attr-defined]
        return keys, values

    @property
    def can_step(self) -> bool:
        """Whether `attend` can run by tables."""
        return self.is_initialized and self._use_kernels and triton.attention_on(self.device, self.dtype) is not None

    def count_token(self, count: int = 1) -> None:
        """Give one more token per sequence its slot, without storing anything yet. With -1, take that back."""
        if self.hot + count > self.keys.shape[2]:
            room = max(1, self._room(self.hot + count))
            self.keys, self.values = (enlarged(pool, self.hot, room) for pool in (self.keys, self.values))
        self.seen += count
        self.hot += count

    def use_tables(self, tables: StepTables | None, row: int = 0) -> None:
        """Let `update` and `attend` read and write what a row of the tables says. None: as usual again."""
        self._step = None if tables is None else (tables, row)
        if tables is not None:
            self.was_read = False

    @property
    def uses_tables(self) -> bool:
        """Whether the running pass uses tables."""
        return self._step is not None

    def _write(self, key_states: Tensor, value_states: Tensor, tables: StepTables, row: int) -> tuple[Tensor, Tensor]:
        """Write the states of one token per sequence into the slot that it has already."""
        keys, values = key_states, value_states
        if keys.dtype != self.dtype or values.dtype != self.dtype or keys.shape[2] != 1 or keys.stride(3) != 1:
            raise StepRefused(f"a layer adds keys {tuple(keys.shape)} in {keys.dtype}")
        if values.stride(3) != 1:
            values = values.contiguous()
        tables.kernels.append(keys, values, tables.pools[row], tables.step)
        keys, values = self._hot()
        keys.layer = values.layer = self  # type: ignore[attr-defined]
        return keys, values

    def pool_numbers(self) -> list[int]:
        """Return where the storage lies, as the kernels of `backends.triton.attention` take it."""
        numbers = [self.keys.data_ptr(), self.values.data_ptr(), self.keys.shape[2]]
        if self.cold is None:
            return numbers + [0] * 9
        for pool in self.cold:
            numbers += [pool.codes.data_ptr(), pool.scales.data_ptr(), pool.others.data_ptr()]
        keys = self.cold[0]
        return [*numbers, keys.codes.shape[2], len(keys.int8_heads), keys.places.data_ptr()]

    def read(self) -> tuple[Tensor, Tensor]:
        """Return keys and values (batch, heads, slots, head_dim) of all slots, cold slots first."""
        keys, values = self._hot()
        if self.cold is None:
            return keys, values
        return self.cold[0].read(keys), self.cold[1].read(values)

    def _hot(self) -> tuple[Tensor, Tensor]:
        return self.keys[:, :, : self.hot], self.values[:, :, : self.hot]

    def note_reading(self, query: Tensor, mask: Tensor | None, scaling: float) -> None:
        """Note that `attention` reads this layer. It does so several times per pass if layers share their cache.

        Args:
            query: (batch, query heads, tokens, head_dim). It is kept if a KV policy reads it.
            mask: (batch, 1, tokens, slots) or None.
            scaling: Factor of the scores.

        Raises:
            EngineError: The mask is not over the slots of the cache, although KV decisions have moved them.
        """
        if self._step is not None:
            if mask is not self._step[0].mask:
                raise StepRefused("its attention gets a mask of its own")
            self.was_read = True
            return
        if self.reading is not None:
            self.reading.compare(mask, query.shape[2])
        if self.queries is not None and not self.was_read:
            self.queries.append(query.detach())
            self.scaling = scaling
        self.read_by_attention = self.was_read = True

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float) -> Tensor | None:
        """Attend over all slots by a kernel in C or Triton.

        Args:
            query: (batch, query heads, 1, head_dim).
            mask: (batch, 1, 1, slots) bool or None.
            scaling: Factor of the scores.

        Returns:
            (batch, 1, query heads, head_dim), or None if no kernel supports this query, mask or layer.

        Raises:
            StepRefused: The pass runs by tables, and no kernel supports this query.
        """
        if self._step is not None:
            return self._attend_by_tables(query, scaling, *self._step)
        if not self._use_kernels or not self._suits(query, mask):
            return None
        if self.device.type != "cpu":
            return self._attend_on_gpu(query, mask, scaling)
        kernel = kernels(self.dtype)
        if kernel is None or (pools := self._attention_pools()) is None:
            return None
        return kernel.attend(query, pools, self.cold_and_hot, mask, scaling)

    def _suits(self, query: Tensor, mask: Tensor | None) -> bool:
        """Return whether kernels can read a query and a mask."""
        if query.shape[2] != 1 or query.dtype != self.dtype or query.shape[1] % self.keys.shape[1]:
            return False
        if query.requires_grad or self.keys.requires_grad or self.values.requires_grad:
            return False
        shape = (len(self.keys), 1, 1, self.slots)
        return mask is None or (mask.dtype == torch.bool and mask.shape == shape and mask.stride(3) == 1)

    def _attend_by_tables(self, query: Tensor, scaling: float, tables: StepTables, row: int) -> Tensor:
        heads = self.keys.shape[1]
        if query.dtype != self.dtype or query.shape[1] % heads or query.shape[2] != 1:
            raise StepRefused(f"a layer asks for attention of {tuple(query.shape)} in {query.dtype}")
        output: Tensor = tables.kernels.attend(_rows(query), tables.pools[row], tables.step, heads, scaling)
        return output

    def _attend_on_gpu(self, query: Tensor, mask: Tensor | None, scaling: float) -> Tensor | None:
        kernels = triton.attention_on(self.device, self.dtype)
        if kernels is None:
            return None
        numbers = self.pool_numbers()
        seen = (0, 0) if mask is None else (mask.data_ptr(), mask.stride(0))
        tables = torch.empty(kernels.POOLS + kernels.STEP, dtype=torch.int64, device=self.device)
        kernels.on_device([*numbers, *self.cold_and_hot, *seen], tables)
        pools, step = tables.split((kernels.POOLS, kernels.STEP))
        output: Tensor = kernels.attend(_rows(query), pools, step, self.keys.shape[1], scaling)
        return output

    def _attention_pools(self) -> AttentionPools | None:
        """Return this layer for the C kernel, or None if the kernel refuses it. It is prepared again after a change."""
        keys, values, cold = self.keys, self.values, self.cold
        # Addresses instead of tensors, which would keep memory alive that the layer frees.
        storage: tuple[object, ...] = keys.data_ptr(), values.data_ptr(), keys.shape, values.dtype
        if cold is not None:
            for pool in cold:
                storage += pool.codes.data_ptr(), pool.scales.data_ptr(), pool.others.data_ptr(), pool.codes.shape
        if self._pools is None or self._pools[0] != storage:
            self._pools = storage, self._prepared_pools()
        return self._pools[1]

    def _prepared_pools(self) -> AttentionPools | None:
        try:
            if self.cold is None:
                return AttentionPools(PoolTensors(self.keys), PoolTensors(self.values))
            keys, values = (
                PoolTensors(hot, pool.codes, pool.scales, pool.others)
                for hot, pool in zip((self.keys, self.values), self.cold, strict=True)
            )
            return AttentionPools(keys, values, self.cold[0].places)
        except EngineError:
            return None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, without addresses: a copy has other storage, and prepares its own."""
        return self.__dict__ | {"_pools": None, "_step": None}

    @torch.no_grad()
    def rearrange(
        self,
        rounded: Tensor | None = None,
        to_cold: Tensor | None = None,
        cold: Tensor | None = None,
        hot: Tensor | None = None,
    ) -> None:
        """Carry out KV decisions, in this order.

        Args:
            rounded: (2, n) sequences and hot slots of tokens that are rounded to INT8 and stay in the hot pool.
            to_cold: (batch, n) hot slots of tokens that are copied to the cold pool, in INT8.
            cold: (batch, n) cold slots that stay; None for all.
            hot: (batch, n) hot slots that stay; None for all.
        """
        if rounded is not None:
            self._round(*rounded)
        if to_cold is not None:
            keys, values = take(self.keys, to_cold), take(self.values, to_cold)
            if self.cold is None:
                heads = self._int8_heads(keys, values)
                self.cold = Int8Pool(keys, heads), Int8Pool(values, heads)
            for pool, states in zip(self.cold, (keys, values), strict=True):
                pool.append(states, self._room(pool.used + to_cold.shape[1]))
        self._sweep(cold, hot)

    def _round(self, sequences: Tensor, slots: Tensor) -> None:
        """Round hot states to what INT8 makes of them, each at sequences[i] and slots[i]."""
        keys, values = (states[sequences, :, slots].transpose(0, 1)[None] for states in (self.keys, self.values))
        heads = self._int8_heads(keys, values)
        for storage, states in ((self.keys, keys), (self.values, values)):
            rounded = dequantise(*quantise(states[0, heads]), storage.dtype)
            storage[sequences[:, None], heads, slots[:, None]] = rounded.transpose(0, 1)

    def _sweep(self, cold: Tensor | None, hot: Tensor | None) -> None:
        if cold is not None:
            for pool in self.cold or ():
                pool.pick(cold)
        if hot is not None:
            self.keys, self.values = take(self.keys, hot), take(self.values, hot)
            self.hot = hot.shape[1]

    def _int8_heads(self, keys: Tensor, values: Tensor) -> Tensor:
        """Return the heads that INT8 applies to: those with the smallest rounding error in the first states, each
        (batch, heads, tokens, head_dim)."""
        if self._heads is None:
            count = round(self.int8_head_share * keys.shape[1])
            errors = torch.zeros(keys.shape[1], device=keys.device)
            for states in (keys, values) if 0 < count < keys.shape[1] else ():
                difference = dequantise(*quantise(states), torch.float32) - states.float()
                errors += difference.square().sum((0, 2, 3)) / states.float().square().sum((0, 2, 3)).clamp_min(1e-12)
            self._heads = errors.argsort(stable=True)[:count].sort().values
        return self._heads

    def _room(self, slots: int) -> int:
        """Return the room that storage of this number of slots gets when it grows, in slots.

        More room makes copies rarer. All pools together get at most a 20th of what the tokens would take in full.
        """
        return min(self.seen // (20 if self.cold is None else 40), max(ROOM, slots // 20))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of slots after `query_length` more tokens, and the offset 0."""
        return self.slots + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of tokens stored so far."""
        return self.seen

    def get_max_length(self) -> int:
        """Return -1: there is no maximum."""
        return -1

    def select(self, sequences: Tensor) -> None:
        """Keep only `sequences` of the batch, in that order."""
        if not self.is_initialized:
            return
        sequences = sequences.to(self.device)
        self.keys, self.values = self.keys[sequences], self.values[sequences]
        for pool in self.cold or ():
            pool.select(sequences)
        if self.queries is not None:
            self.queries = [queries[sequences] for queries in self.queries]

    def crop(self, cold: Tensor, hot: Tensor, seen: int) -> None:
        """Keep only the slots `cold` and `hot`, each (batch, n), of the first `seen` tokens."""
        self._sweep(cold, hot)
        self.seen = seen

    def reset(self) -> None:
        """Forget all tokens."""
        if not self.is_initialized:
            return
        self.seen = self.hot = 0
        self.cold = self._pools = self._heads = None
        self.keys = self.values = self.keys.new_empty(0)
        self.is_initialized = False

    @property
    def nbytes(self) -> int:
        """Bytes of storage, with room for later tokens."""
        if not self.is_initialized:
            return 0
        tensors = (self.keys, self.values, *(self.queries or ()))
        hot = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        return hot + sum(pool.nbytes for pool in self.cold or ())

    @property
    def used_nbytes(self) -> int:
        """Bytes of the slots in use."""
        if not self.is_initialized:
            return 0
        states = (*self._hot(), *(self.queries or ()))
        return sum(tensor.nbytes for tensor in states) + sum(pool.used_nbytes for pool in self.cold or ())

    @property
    def full_nbytes(self) -> int:
        """Bytes that all tokens stored so far would take in the model's precision."""
        if not self.is_initialized:
            return 0
        tensors = (self.keys, self.values)
        return sum(t.shape[0] * t.shape[1] * self.seen * t.shape[3] * t.itemsize for t in tensors)


def _rows(query: Tensor) -> Tensor:
    return query if query.stride(3) == 1 else query.contiguous()
