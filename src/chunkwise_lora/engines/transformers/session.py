"""One generation over a batch: the positions of its tokens in passes, the cache, and the trace."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chunkwise_lora.engines.base import entropies_of
from chunkwise_lora.engines.transformers.cache import NO_TOKEN, ChunkWiseCache
from chunkwise_lora.engines.transformers.masks import mask_over_slots
from chunkwise_lora.engines.transformers.traits import ModelTraits
from chunkwise_lora.errors import EngineError
from chunkwise_lora.method.batch import BatchPlanner, Span
from chunkwise_lora.method.config import ChunkWiseConfig, KVCacheConfig
from chunkwise_lora.method.fixed_scheduler import FixedScheduler
from chunkwise_lora.method.kv_policy import KVDecision
from chunkwise_lora.method.segments import PassPlan, ranks_of
from chunkwise_lora.method.sequence import NO_ADAPTER, AdapterInfo, SequencePlanner
from chunkwise_lora.method.trace import SequenceTrace, Trace


class SessionCache(ChunkWiseCache):
    """The cache of a session. If a beam search reorders it, it reorders the plans of the session, too."""

    def __init__(
        self, session: Session, traits: ModelTraits, policies: Sequence[KVCacheConfig], use_kernels: bool
    ) -> None:
        super().__init__(
            traits.config,
            min(policy.int8_head_share for policy in policies),
            traits.carries_out_kv,
            use_kernels,
            any(policy.needs_queries for policy in policies),
        )
        self._session = weakref.ref(session)  # the session holds the cache, which may outlive it

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the sequences as a beam search chose, and their plans."""
        super().reorder_cache(beam_idx)
        if (session := self._session()) is not None:
            session.reorder(beam_idx.tolist())


@dataclass(frozen=True)
class Prompts:
    """The prompts of a generation: how they run, and what ends them."""

    adapters: Sequence[AdapterInfo]
    """The adapter of each prompt."""
    configs: Sequence[ChunkWiseConfig]
    """The config of each prompt."""
    columns: int
    """Width of the prompts, padding included. Their tokens are planned without entropies: a prefill in one pass does
    not have them, and a prefill in several passes must give the same plan."""
    eos_token_ids: Collection[int] = ()
    """Ids of tokens that end a sequence. Tokens after them are padding."""


class Session:
    """The state of one generation over a batch.

    A pass adds columns of tokens, some of which are padding. The session tells the planner which tokens are real, and
    the model which slots of the cache are in use.
    """

    def __init__(self, traits: ModelTraits, prompts: Prompts, use_kernels: bool = True) -> None:
        self.planner = BatchPlanner(traits.vocab_size, feeds_all=True)
        self.cache = SessionCache(self, traits, [config.kv_cache for config in prompts.configs], use_kernels)
        self._traits = traits
        self._prompts = prompts
        self._infos = {info.key: info for info in prompts.adapters}
        self._eos = frozenset(prompts.eos_token_ids)
        self._adapters: list[AdapterInfo] = []
        """The adapter of each sequence."""
        self._members: dict[str, Tensor | None] = {}
        """By adapter key, the sequences (n,) that use it; None for all of them."""
        self._real: list[list[int]] = []
        """For each sequence, the columns of its tokens, without padding."""
        self._has_ended = np.zeros(0, bool)
        self._columns = 0
        """Number of columns of all passes so far."""
        self._pending: tuple[np.ndarray, list[list[KVDecision]]] | None = None
        """The tokens (batch, columns) of the running pass and the KV decisions that follow it."""
        self._bytes_read = 0
        self._passes = 0

    @property
    def is_constant(self) -> bool:
        """Whether every token of the generation gets the same gates of one adapter."""
        return len(set(self._adapters)) == 1 and all(config.levels == 1 for config in self._prompts.configs)

    @property
    def members(self) -> dict[str, Tensor | None]:
        """By adapter key, the sequences (n,) of the batch that use it; None for all of them."""
        return self._members

    def follow(self, schedulers: Sequence[FixedScheduler]) -> None:
        """Take these plans, one per sequence, instead of planning. Call this before the first pass."""
        self._open(len(schedulers))
        for row, scheduler in enumerate(schedulers):
            self.planner[row].follow(scheduler)

    def before_pass(self, inputs: dict[str, Any]) -> PassPlan:
        """Plan the tokens of a forward pass, and set its mask in `inputs`, the model's keyword arguments.

        Raises:
            EngineError: A sequence is longer than the model's positions, or the model has dropped its cache.
        """
        input_ids: Tensor = inputs["input_ids"]
        batch, width = input_ids.shape
        if not len(self.planner):
            self._open(batch)
        known = self._known_columns(inputs, width)
        real = _real_columns(inputs.get("attention_mask"), batch, width)
        real[:, known:] &= ~self._has_ended[:, None]
        ids = input_ids.tolist()
        in_prompt = self._columns < self._prompts.columns
        tokens = np.full((batch, width - known), NO_TOKEN)
        spans, span_ids = [], []
        for row in range(batch):
            position, new = len(self._real[row]), np.flatnonzero(real[row, known:])
            columns = np.array([*self._real[row], *(known + new)]) if known else new
            spans.append(Span(row, 0 if known else position, len(columns), None if len(columns) == width else columns))
            span_ids.append([ids[row][column] for column in columns])
            tokens[row, new] = np.arange(position, position + len(new))
            self._real[row] += (self._columns + new).tolist()
            if position + len(new) > self._traits.positions:
                raise EngineError(
                    f"a sequence has come to {position + len(new)} tokens, but the model has learned "
                    f"{self._traits.positions} positions; lower max_new_tokens or shorten the prompt"
                )
            if not in_prompt and not self._has_ended[row]:
                self._has_ended[row] = not self._eos.isdisjoint(span_ids[row][len(columns) - len(new) :])
        plan = self.planner.plan(spans, lambda: span_ids, width)
        self._pending = (tokens, [self.planner[row].take_decisions() for row in range(batch)])
        self._columns += width - known
        self._passes += 1
        self._bytes_read += sum(int(self._infos[segment.adapter].rung_bytes[segment.rung]) for segment in plan.segments)
        if self.cache.chunkwise_layers and inputs.get("past_key_values") is self.cache:
            self._align_mask(inputs, real)
        return plan

    def after_pass(self, logits: Tensor) -> None:
        """Store the next tokens' entropies from logits (batch, tokens, vocabulary), and carry out KV decisions."""
        assert self._pending is not None
        readers = [row for row in range(len(self.planner)) if self.planner[row].config.reads_entropy]
        if readers and self._columns >= self._prompts.columns:
            for row, entropy in enumerate(entropies_of(logits[:, -1]).tolist()):
                self.planner[row].learn(len(self._real[row]), entropy)
        tokens, decisions = self._pending
        if self.cache.chunkwise_layers and self.cache.get_seq_length():
            self.cache.note(tokens)
            self.cache.carry_out(decisions)

    def reorder(self, order: Sequence[int]) -> None:
        """Make sequence i a copy of sequence `order[i]`, as a beam search chose."""
        if list(order) == list(range(len(self.planner))):
            return
        self.planner.reorder(dict(enumerate(order)))
        self._real = [list(self._real[i]) for i in order]
        self._has_ended = self._has_ended[order]
        self._set_adapters([self._adapters[i] for i in order])

    def trace(self) -> Trace:
        """Return what happened so far."""
        sequences = []
        for row, adapter in enumerate(self._adapters):
            planner = self.planner[row]
            sequences.append(
                SequenceTrace(
                    adapter=None if adapter is NO_ADAPTER else adapter.name,
                    tokens=tuple(planner.tokens),
                    ranks=tuple(ranks_of(planner.weights, adapter.rung_ranks).tolist()),
                    chunks=tuple(planner.chunks),
                )
            )
        acts = any(config.kv_cache.acts for config in self._prompts.configs)
        return Trace(
            sequences=tuple(sequences),
            passes=self._passes,
            adapter_bytes_read=self._bytes_read,
            kv_bytes=self.cache.nbytes,
            kv_bytes_full=self.cache.full_nbytes,
            kv_notes=(*(self._traits.kv_notes if acts else ()), *self.cache.notes),
            scheduler_seconds=self.planner.seconds,
        )

    def _open(self, batch: int) -> None:
        """Start to plan. With beams or several sequences per prompt, the batch is larger than the number of prompts."""
        prompts, copies = self._prompts, batch // len(self._prompts.adapters)
        adapters = [info for info in prompts.adapters for _ in range(copies)]
        configs = [config for config in prompts.configs for _ in range(copies)]
        for row, (info, config) in enumerate(zip(adapters, configs, strict=True)):
            self.planner.open(row, SequencePlanner(info, config, self._traits.vocab_size))
        self._real = [[] for _ in range(batch)]
        self._has_ended = np.zeros(batch, bool)
        self._set_adapters(adapters)

    def _set_adapters(self, adapters: list[AdapterInfo]) -> None:
        self._adapters = adapters
        self._members = {}
        for info in dict.fromkeys(adapters):
            if info is not NO_ADAPTER:
                rows = [row for row, other in enumerate(adapters) if other is info]
                self._members[info.key] = None if len(rows) == len(adapters) else torch.tensor(rows)

    def _known_columns(self, inputs: dict[str, Any], width: int) -> int:
        """Return how many columns of the pass are already planned: without a cache, a pass holds all tokens."""
        known = self._columns if inputs.get("past_key_values") is None else 0
        if known < width:
            return known
        if "past_key_values" in inputs:
            raise EngineError(
                f"the model has dropped its cache after {known} tokens, as some do beyond their original length; call "
                "generate with use_cache=False, or stay below that length"
            )
        return 0  # a recurrent model, whose state has another name

    def _align_mask(self, inputs: dict[str, Any], real: np.ndarray) -> None:
        """Give the model a mask over the cache's slots if they are no longer the columns of the input."""
        slots = self.cache.slot_mask(real)
        if slots is None:
            return
        input_ids: Tensor = inputs["input_ids"]
        if inputs.get("position_ids") is None:
            width = input_ids.shape[1]
            last = [[len(columns) - width + i for i in range(width)] for columns in self._real]
            inputs["position_ids"] = torch.tensor(last, device=input_ids.device).clamp_min(0)
        inputs["attention_mask"] = mask_over_slots(
            self._traits.config, self.cache, torch.from_numpy(slots).to(input_ids.device), inputs
        )


def _real_columns(mask: Tensor | None, batch: int, width: int) -> np.ndarray:
    """Return (batch, width) bool: which columns of the pass are not padding."""
    if mask is None:
        return np.ones((batch, width), bool)
    return mask[:, -width:].bool().cpu().numpy()
