"""A KV cache that carries out KV decisions: it stores INT8 and frees dropped entries.

Each layer holds a hot pool in the model's precision and a cold pool in INT8. Keys already contain their positions, so
attention does not depend on the order of slots: it reads the cold pool, then the hot pool, under a mask of the slots
that each sequence uses. All layers hold the same tokens in the same slots.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from chunkwise_lora.backends.native import give_memory_back
from chunkwise_lora.engines.transformers.cache.layer import ChunkWiseLayer
from chunkwise_lora.engines.transformers.cache.queries import OpenChunkQueries
from chunkwise_lora.engines.transformers.cache.reading import Reading
from chunkwise_lora.engines.transformers.cache.slots import NO_TOKEN, SlotTable, within
from chunkwise_lora.engines.transformers.cache.states import chunk_states
from chunkwise_lora.engines.transformers.cache.stepping import StepRefused, StepTables
from chunkwise_lora.errors import EngineError
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

    Every pass over the cache runs between `slot_mask` and `check_used`, `note` and `carry_out`, in that order.

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
        self.notes: tuple[str, ...] = ()
        """Which decisions were not carried out so far, and why."""
        self._record_queries = record_queries and bool(self.chunkwise_layers)
        self._start()

    def _start(self) -> None:
        self._slots = SlotTable()
        self._reading = Reading()
        for layer in self.chunkwise_layers:
            layer.reading = self._reading
        self._queries = OpenChunkQueries(self.chunkwise_layers) if self._record_queries else None

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return the column of the first query in a mask: after all slots."""
        layer = self.layers[layer_idx]
        return layer.slots if isinstance(layer, ChunkWiseLayer) else super().get_query_offset(layer_idx)

    def slot_mask(self, new: np.ndarray) -> np.ndarray | None:
        """Begin a pass, and return (batch, slots + tokens) bool: the slots that each sequence uses, then `new`.

        None if slots are still the columns of the input, so that the mask of the input is right.

        Args:
            new: (batch, tokens) bool, False for padding.
        """
        visible = self._slots.visible(new)
        self._reading.begin(visible)
        return None if self._slots.in_columns else visible

    # Decode steps by tables, between `slot_mask` and `check_used`

    @property
    def can_step(self) -> bool:
        """Whether the next pass, of one token per sequence, can run by tables."""
        return (
            len(self.layers) == len(self.chunkwise_layers)
            and self._reading.obstacle is None
            and self._queries is None
            and all(layer.can_step for layer in self.chunkwise_layers)
            and len({layer.device for layer in self.chunkwise_layers}) == 1
        )

    def begin_step(self, tables: StepTables) -> None:
        """Give the next token of each sequence its slot in all layers, and fill the tables."""
        for layer in self.chunkwise_layers:
            layer.count_token()
        assert self._reading.visible is not None
        pools = [layer.pool_numbers() for layer in self.chunkwise_layers]
        tables.fill(pools, self.chunkwise_layers[0].cold_and_hot, self._reading.visible)

    @contextmanager
    def by_tables(self, tables: StepTables) -> Iterator[None]:
        """Let the layers read and write what the tables say, whichever cache that is.

        Raises:
            StepRefused: The model has not read all layers through the engine's attention.
        """
        try:
            for row, layer in enumerate(self.chunkwise_layers):
                layer.use_tables(tables, row)
            yield
        finally:
            for layer in self.chunkwise_layers:
                layer.use_tables(None)
        if not all(layer.was_read for layer in self.chunkwise_layers):
            raise StepRefused("the model does not read its cache through the engine's attention")

    def end_step(self) -> None:
        """End a step, which may have run as a graph, without any Python code of the layers."""
        for layer in self.chunkwise_layers:
            layer.was_read = True

    def undo_step(self) -> None:
        """Take back what `begin_step` did."""
        for layer in self.chunkwise_layers:
            layer.count_token(-1)

    def check_used(self, columns: int) -> None:
        """Check that the layers have received the tokens of a pass. Call it after the pass, before `note`.

        Args:
            columns: Columns of the pass, padding included.

        Raises:
            EngineError: A layer has received another number of tokens.
        """
        kinds = (ChunkWiseLayer, DynamicLayer, DynamicSlidingWindowLayer)
        held = {layer.get_seq_length() for layer in self.layers if type(layer) in kinds}
        # A layer that has received nothing at all belongs to attention that reads another layer's cache, or none.
        if held and held - {0} != {self._slots.columns + columns}:
            raise EngineError(
                f"the cache should hold {self._slots.columns + columns} tokens per sequence after this pass, but its "
                f"layers hold {', '.join(map(str, sorted(held)))}; the model does not use the cache that it was given, "
                "or another call has used it"
            )

    def note(self, tokens: np.ndarray) -> None:
        """Record which tokens (batch, n) the last pass added, `NO_TOKEN` for padding.

        Raises:
            EngineError: Attention has not read the slots that KV decisions have moved.
        """
        if not self._slots.columns:
            self.chunkwise_layers[:] = [layer for layer in self.chunkwise_layers if layer.is_initialized]
        self._slots.add(tokens)
        self._reading.end(all(layer.was_read for layer in self.chunkwise_layers))
        if self._queries is not None:
            if self._reading.obstacle is None:
                self._queries.note(tokens)
            else:
                self._queries.stop()
                self._queries = None

    def carry_out(self, decisions: Sequence[Sequence[KVDecision]]) -> None:
        """Quantise and drop entries after a pass.

        Args:
            decisions: One list per sequence. Each sequence may follow its own config.
        """
        if self.chunkwise_layers and any(
            decision.acts for sequence_decisions in decisions for decision in sequence_decisions
        ):
            if self._reading.obstacle is None:
                self._act(decisions)
            elif not self.notes:
                self.notes = (f"not carried out: {self._reading.obstacle}",)
                logger.warning("KV policy: %s", *self.notes)
        if self._queries is not None:
            self._queries.close(decisions)
            for row, sequence_decisions in enumerate(decisions):
                for decision in sequence_decisions:
                    self._slots.settle(row, decision)

    def _act(self, decisions: Sequence[Sequence[KVDecision]]) -> None:
        slots = self._slots
        fate = np.full(slots.hot.shape, _KEEP)
        for row, sequence_decisions in enumerate(decisions):
            new = [decision for decision in sequence_decisions if not slots.is_settled(row, decision)]
            for decision in new:
                hot = within(slots.hot[row], decision)
                if decision.action == "int8":
                    fate[row, hot] = _INT8
                elif decision.action == "drop":
                    fate[row, hot] = _DROP
                    slots.cold[row, within(slots.cold[row], decision)] = NO_TOKEN
            self._evict(row, new, fate[row])
            for decision in new:
                if decision.action == "drop" or decision.scores_tokens:
                    slots.settle(row, decision)
        slots.in_columns, self._reading.moved = False, True
        slots.drop(fate == _DROP)
        new = (fate == _INT8) & (slots.hot != NO_TOKEN) & ~slots.waiting
        leaving = slots.leaving(slots.waiting | new)
        rounded = np.stack(np.nonzero(new & ~leaving)) if (new & ~leaving).any() else None
        slots.waiting |= new
        to_cold = slots.to_cold(leaving) if leaving.any() else None
        changes = (rounded, to_cold, *slots.sweep())
        if any(change is not None for change in changes):
            self._each(ChunkWiseLayer.rearrange, *changes)

    def _each(self, act: Callable[..., None], *indices: np.ndarray | None) -> None:
        """Call `act` for each layer that carries out KV decisions, with indices of slots."""
        tensors = [None if index is None else torch.from_numpy(np.maximum(index, 0)) for index in indices]
        for layer in self.chunkwise_layers:
            act(layer, *(None if tensor is None else tensor.to(layer.device) for tensor in tensors))
        if any(tensor is not None and tensor.shape[1] >= MANY_SLOTS for tensor in tensors):
            give_memory_back()

    @torch.no_grad()
    def _evict(self, row: int, decisions: Sequence[KVDecision], fate: np.ndarray) -> None:
        """Mark in `fate` (slots,) the hot tokens of one sequence that the scores of KV policies drop."""
        scored = [decision for decision in decisions if decision.scores_tokens]
        for read_queries in (False, True):
            alike = [decision for decision in scored if needs_queries(decision.evict) is read_queries]
            queries = self._queries if read_queries else None
            for batch in _batches(alike):
                slots = [within(self._slots.hot[row], decision) for decision in batch]
                columns = [queries.columns(row, decision) for decision in batch] if queries else ()
                values = any(decision.evict is not None for decision in batch)
                states = chunk_states(self.chunkwise_layers, row, slots, values, queries, columns)
                for decision, chunk_slots, chunk in zip(batch, slots, states, strict=True):
                    fate[chunk_slots[evicted_tokens(decision, chunk)]] = _DROP

    def select(self, sequences: Tensor) -> None:
        """Keep only `sequences` (n,) of the batch, in that order. A sequence may be named several times."""
        for layer in self.layers:
            if isinstance(layer, ChunkWiseLayer):
                layer.select(sequences)
            else:
                layer.reorder_cache(sequences)
        order = sequences.cpu().numpy()
        self._slots.select(order)
        if self._queries is not None:
            self._queries.select(order)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the sequences as a beam search chose."""
        self.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times; copies lie next to each other."""
        self.select(torch.arange(len(self._slots.real)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the sequences `indices`: (n,) their numbers, or (batch,) bool."""
        self.select(torch.arange(len(self._slots.real))[torch.as_tensor(indices).cpu()])

    def crop(self, max_length: int) -> None:
        """Forget the last tokens.

        Tokens that were dropped do not come back, and tokens in INT8 stay in INT8.

        Args:
            max_length: Columns to keep, padding included. As in transformers, a negative number says how many columns
                to remove, and 0 does nothing.

        Raises:
            EngineError: The cache does not hold all tokens that a cache of this length would hold, because a KV
                decision has dropped some of them since, or a sliding window has.
        """
        columns = max_length if max_length > 0 else self._slots.columns + max_length
        if columns >= self._slots.columns:
            return
        if columns < 0:
            raise EngineError(f"crop({max_length}): the cache holds {self._slots.columns} tokens per sequence")
        if (exact := self._slots.exact_columns(columns)) < columns:
            raise EngineError(
                f"crop({max_length}): later KV decisions have dropped some of the first {columns} tokens; keep "
                f"{exact} and run the others again, or use a config without KV policy"
            )
        self._crop_plain_layers(columns - self._slots.columns, f"crop({max_length})")
        cold, hot = self._slots.crop(columns)
        self._each(partial(ChunkWiseLayer.crop, seen=columns), cold, hot)
        if self._queries is not None:
            self._queries.crop(self._slots.lengths)

    def _crop_plain_layers(self, removed: int, call: str) -> None:
        """Crop transformers' own layers by `removed` tokens, a negative number as transformers has it."""
        try:
            for layer in self.layers:
                if not isinstance(layer, ChunkWiseLayer):
                    layer.crop(removed)
        except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
            raise EngineError(f"{call}: a {type(layer).__name__} cannot be cropped: {error}") from None

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self._start()

    @property
    def used_nbytes(self) -> int:
        """Bytes of the slots in use, over all layers."""
        return sum(
            layer.used_nbytes if isinstance(layer, ChunkWiseLayer) else _plain_nbytes(layer) for layer in self.layers
        )

    @property
    def nbytes(self) -> int:
        """Bytes of storage, with room for later tokens, over all layers."""
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
