"""The plan of a batch of sequences over all their passes, and the cache that carries it from call to call."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import Tensor

from chunkwise_lora.engines.base import entropies_of
from chunkwise_lora.engines.transformers.cache import NO_TOKEN, ChunkWiseCache
from chunkwise_lora.engines.transformers.layers import BASE
from chunkwise_lora.engines.transformers.masks import mask_over_slots
from chunkwise_lora.engines.transformers.traits import ModelTraits
from chunkwise_lora.errors import EngineError
from chunkwise_lora.method.batch import BatchPlanner, Span
from chunkwise_lora.method.config import ChunkWiseConfig
from chunkwise_lora.method.fixed_scheduler import FixedScheduler
from chunkwise_lora.method.kv_policy import KVDecision
from chunkwise_lora.method.segments import PassPlan
from chunkwise_lora.method.sequence import NO_ADAPTER, AdapterInfo, SequencePlanner
from chunkwise_lora.method.trace import Trace

MOST_UNREAD = 512
"""Largest number of decode steps whose tokens are read together."""

UNKNOWN_TOKEN = -1
"""Stands for a token that the model got as an embedding."""


@dataclass(frozen=True)
class Prompts:
    """The prompts of a call: how they run, and what ends them."""

    adapters: Sequence[AdapterInfo]
    """The adapter of each prompt."""
    configs: Sequence[ChunkWiseConfig]
    """The config of each prompt."""
    columns: int
    """Width of the prompts, padding included. Their tokens are planned without entropies: a prefill in one pass does
    not have them, and a prefill in several passes must give the same plan."""
    eos_token_ids: Collection[int] = ()
    """Ids of tokens that end a sequence. Tokens after them are padding."""
    notes: tuple[str, ...] = ()
    """What does not run by plan, and why."""


class Session:
    """The plan of a batch.

    A pass adds columns of tokens, some of which are padding. The session tells the planner which tokens are real, and
    the model which slots of the cache are in use.
    """

    def __init__(self, owner: object, traits: ModelTraits, prompts: Prompts) -> None:
        self._owner = ref(owner)  # a copy of a cache shares it
        self._planner = BatchPlanner(traits.vocab_size, feeds_all=True)
        self._traits = traits
        self._prompts = prompts
        self._infos = {info.key: info for info in prompts.adapters}
        self._eos = frozenset(prompts.eos_token_ids)
        self._prompt_end = prompts.columns
        """The columns before this one are those of prompts."""
        self._adapters: list[AdapterInfo] = []
        """The adapter of each sequence."""
        self._members: dict[str, Tensor | None] = {}
        """By adapter name, the sequences (n,) that use it; None for all of them."""
        self._real: list[list[int]] = []
        """For each sequence, the columns of its tokens, without padding."""
        self._has_ended = np.zeros(0, bool)
        self._columns = 0
        """Number of columns of all passes so far."""
        self._pending: tuple[np.ndarray, list[list[KVDecision]]] | None = None
        """The tokens (batch, columns) of the running pass and the KV decisions that follow it."""
        self._slots: np.ndarray | None = None
        """(batch, slots + tokens) bool, the slots that each sequence of the running pass sees; None while they are the
        columns of the input."""
        self._follows = False
        """Whether plans are given, instead of made."""
        self._repeated: PassPlan | None = None
        """The plan of the last decode step, if all later ones are planned alike, whatever their tokens are."""
        self._unread: list[Tensor] = []
        """The tokens (batch, 1) of decode steps that were repeated, which the planner does not know yet."""
        self._entropies: tuple[Tensor, list[int]] | None = None
        """Entropies (batch,) that the planner does not know yet, and the positions of the tokens that they predict."""
        self._is_broken = False
        """Whether a pass has begun and not ended."""
        self._bytes_read = 0
        self._passes = 0

    @property
    def planner(self) -> BatchPlanner:
        """The planner of the sequences, which knows all tokens so far. This may wait for the device."""
        self._tell_planner()
        return self._planner

    def _tell_planner(self) -> None:
        """Tell the planner the tokens and entropies that it does not know yet."""
        if self._entropies is not None:
            (entropies, positions), self._entropies = self._entropies, None
            for row, (position, entropy) in enumerate(zip(positions, entropies.tolist(), strict=True)):
                self._planner[row].learn(position, entropy)
        if self._unread:
            ids, self._unread = torch.cat(self._unread, dim=1).tolist(), []
            for row, tokens in enumerate(ids):
                sequence = self._planner[row]
                sequence.plan(len(sequence.tokens), tokens)
                sequence.take_decisions()  # that keep everything

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self._planner)

    def belongs_to(self, owner: object) -> bool:
        """Return whether `owner` made this session."""
        return self._owner() is owner

    @property
    def adapters(self) -> Sequence[AdapterInfo]:
        """The adapter of each prompt."""
        return self._prompts.adapters

    @property
    def configs(self) -> Sequence[ChunkWiseConfig]:
        """The config of each prompt."""
        return self._prompts.configs

    @property
    def columns(self) -> int:
        """Number of columns of all passes so far, padding included."""
        return self._columns

    @property
    def is_constant(self) -> bool:
        """Whether every token gets the same gates of one adapter."""
        return len(set(self._adapters)) == 1 and self.knows_no_tokens

    @property
    def knows_no_tokens(self) -> bool:
        """Whether the plan does not depend on the tokens."""
        return all(config.levels == 1 for config in self._prompts.configs)

    @property
    def acts(self) -> bool:
        """Whether a KV policy does more than keep everything."""
        return any(config.kv_cache.acts for config in self._prompts.configs)

    @property
    def reads_entropy(self) -> bool:
        """Whether the plan of a sequence depends on entropies."""
        return any(config.reads_entropy for config in self._prompts.configs)

    @property
    def members(self) -> dict[str, Tensor | None]:
        """By adapter name, the sequences (n,) of the batch that use it; None for all of them."""
        return self._members

    @property
    def full_rungs(self) -> dict[str, int]:
        """By key of the adapters in use, the highest rung."""
        return {info.key: len(info.rung_ranks) - 1 for info in set(self._adapters) if info is not NO_ADAPTER}

    def anew(self) -> Session:
        """Return a new session for the same adapters, whose prompts are all tokens so far and the next one."""
        return Session(self._owner(), self._traits, replace(self._prompts, columns=self._columns + 1))

    def new_cache(self, use_kernels: bool) -> SessionCache:
        """Return an empty cache that carries this session."""
        policies = [config.kv_cache for config in self._prompts.configs]
        return SessionCache(
            self._traits.config,
            min(policy.int8_head_share for policy in policies),
            self._traits.carries_out_kv,
            use_kernels,
            any(policy.needs_queries for policy in policies),
            session=self,
        )

    def follow(self, schedulers: Sequence[FixedScheduler]) -> None:
        """Take these plans, one per sequence, instead of planning. Call this before the first pass."""
        self._open(len(schedulers))
        self._follows = True
        for row, scheduler in enumerate(schedulers):
            self.planner[row].follow(scheduler)

    def begins(self, input_ids: Tensor | None) -> bool:
        """Return whether token ids (batch, tokens) begin with all tokens so far."""
        if input_ids is None or len(input_ids) != len(self.planner) or input_ids.shape[1] < self._columns:
            return False
        return all(
            UNKNOWN_TOKEN in self.planner[row].tokens or input_ids[row, columns].tolist() == self.planner[row].tokens
            for row, columns in enumerate(self._real)
        )

    def continue_with(self, input_ids: Tensor, eos_token_ids: Collection[int]) -> None:
        """Go on with another turn.

        Args:
            input_ids: (batch, columns) all tokens of the conversation, those of the cache first.
            eos_token_ids: Ids of tokens that end a sequence.

        Raises:
            EngineError: The tokens are not those of the cache.
        """
        if len(input_ids) != len(self.planner) or input_ids.shape[1] <= self._columns:
            raise EngineError(
                f"input_ids are {tuple(input_ids.shape)}, but the cache holds {len(self.planner)} sequences of "
                f"{self._columns} tokens; pass the whole conversation, with new tokens at its end"
            )
        if not self.begins(input_ids):
            raise EngineError(
                "input_ids do not begin with the tokens of the cache; pass the tokens that the cache was made from, or "
                "no cache"
            )
        self._prompt_end = input_ids.shape[1]
        self._repeated = None
        self._eos = frozenset(eos_token_ids)
        self._has_ended[:] = False

    def before_pass(
        self, inputs: dict[str, Any], cache: SessionCache | None, has_cache: bool, sets_mask: bool = True
    ) -> PassPlan:
        """Plan the tokens of a forward pass, and set its mask in `inputs`, the model's keyword arguments.

        Args:
            inputs: The model's keyword arguments.
            cache: The cache of the pass, if it is one that carries this session.
            has_cache: Whether the pass has a cache of any kind, and so holds only new tokens.
            sets_mask: Whether to set the mask now. If not, call `set_mask` if the pass needs one.

        Raises:
            EngineError: A sequence is longer than the model's positions, or the model has dropped its cache.
        """
        if self._is_broken:
            raise EngineError("a pass of these sequences was broken off; begin again with a new cache")
        self._is_broken = True  # until after_pass
        plan = self._repeated_plan(inputs, has_cache) or self._new_plan(inputs, has_cache)
        self._passes += 1
        self._bytes_read += sum(int(self._infos[segment.adapter].rung_bytes[segment.rung]) for segment in plan.segments)
        if cache is not None and cache.chunkwise_layers:
            assert self._pending is not None
            self._slots = cache.slot_mask(self._pending[0] != NO_TOKEN)
            if sets_mask:
                self.set_mask(inputs, cache)
        return plan

    def _repeated_plan(self, inputs: dict[str, Any], has_cache: bool) -> PassPlan | None:
        """Plan a decode step like the last one, without waiting for the device to read its tokens; None if the plan may
        depend on them."""
        plan, ids = self._repeated, inputs.get("input_ids")
        last = self._traits.positions - 1
        if plan is None or not has_cache or ids is None or ids.shape != (plan.batch, 1):
            return None
        if inputs.get("attention_mask") is not None or any(len(columns) > last for columns in self._real):
            return None
        for columns in self._real:
            columns.append(self._columns)
        self._pending = np.array([[len(columns) - 1] for columns in self._real]), [[] for _ in self._real]
        self._columns += 1
        self._unread.append(ids.clone())
        if len(self._unread) == MOST_UNREAD:
            self._tell_planner()
        return plan

    def _new_plan(self, inputs: dict[str, Any], has_cache: bool) -> PassPlan:
        """Read the tokens of a pass, and plan them."""
        ids, batch, width = self._tokens_of(inputs)
        if not len(self.planner):
            self._open(batch)
        if batch != len(self.planner):
            raise EngineError(f"the pass has {batch} sequences, but its cache {len(self.planner)}")
        known = 0 if has_cache else self._known_columns(width)
        real = _real_columns(inputs.get("attention_mask"), batch, width)
        real[:, known:] &= ~self._has_ended[:, None]
        in_prompt = self._columns < self._prompt_end
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
        repeats = self.knows_no_tokens and not (self._follows or self.acts or self._eos or self._has_ended.any())
        self._repeated = plan if repeats and width == 1 and has_cache and not in_prompt else None
        return plan

    def after_pass(self, logits: Tensor | None, cache: SessionCache | None, entropies: Tensor | None = None) -> None:
        """Store the next tokens' entropies, and carry out KV decisions.

        Args:
            logits: (batch, tokens, vocabulary), or None if the pass computes none.
            cache: The cache of the pass, if it is one that carries this session.
            entropies: (batch,) the entropies of the last token's logits, if they are known already.

        Raises:
            EngineError: The model did not use the cache.
        """
        assert self._pending is not None
        in_prompt = self._columns < self._prompt_end
        # A head that sees only chosen tokens gives logits of another shape, which say nothing about the next tokens.
        if self.reads_entropy and logits is not None and len(logits) == self.batch and not in_prompt:
            found = entropies_of(logits[:, -1]) if entropies is None else entropies
            self._entropies = found, [len(columns) for columns in self._real]
        tokens, decisions = self._pending
        if cache is not None:
            cache.check_used(tokens.shape[1])
            cache.note(tokens)
            cache.carry_out(decisions)
        self._pending, self._is_broken = None, False

    def take(self, order: Sequence[int]) -> None:
        """Make sequence i a copy of sequence `order[i]`. There may be more or fewer sequences than before."""
        if list(order) == list(range(len(self.planner))):
            return
        self.planner.reorder(dict(enumerate(order)))
        self._real = [list(self._real[i]) for i in order]
        self._has_ended = self._has_ended[list(order)]
        self._set_adapters([self._adapters[i] for i in order])

    def crop(self, columns: int) -> None:
        """Forget all columns from `columns` on."""
        planner = self.planner  # which knows all tokens, before some are forgotten
        self._columns = min(self._columns, columns)
        self._repeated = None
        for row, real in enumerate(self._real):
            del real[np.searchsorted(real, columns) :]
            planner[row].rewind(len(real))
            planner[row].take_decisions()  # they were carried out when these tokens ran
        self._has_ended[:] = False

    def trace(self, cache: SessionCache | None) -> Trace:
        """Return what happened so far."""
        acts = self.acts
        without_cache = acts and cache is None and self._traits.carries_out_kv
        return Trace(
            sequences=tuple(self.planner[row].trace() for row in range(len(self.planner))),
            passes=self._passes,
            adapter_bytes_read=self._bytes_read,
            kv_bytes=0 if cache is None else cache.used_nbytes,
            kv_bytes_reserved=0 if cache is None else cache.nbytes,
            kv_bytes_full=0 if cache is None else cache.full_nbytes,
            kv_notes=(
                *(self._traits.kv_notes if acts else ()),
                *(("not carried out: the call has no cache of this engine",) if without_cache else ()),
                *(cache.notes if cache is not None else ()),
            ),
            notes=self._prompts.notes,
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
        self._repeated = None
        self._members = {}
        for info in dict.fromkeys(adapters):
            rows = [row for row, other in enumerate(adapters) if other is info]
            name = BASE if info is NO_ADAPTER else info.name
            self._members[name] = None if len(rows) == len(adapters) else torch.tensor(rows)

    def _tokens_of(self, inputs: dict[str, Any]) -> tuple[list[list[int]], int, int]:
        """Return the token ids of a pass, and its numbers of sequences and of tokens per sequence."""
        input_ids: Tensor | None = inputs.get("input_ids")
        if input_ids is not None:
            return input_ids.tolist(), *input_ids.shape
        embeddings: Tensor | None = inputs.get("inputs_embeds")
        if embeddings is None or not self.knows_no_tokens:
            raise EngineError("plans are made from token ids; pass input_ids, or use the lossless preset")
        batch, width = embeddings.shape[:2]
        return [[UNKNOWN_TOKEN] * width] * batch, batch, width

    def _known_columns(self, width: int) -> int:
        """Return how many columns of a pass without a cache are already planned: such a pass holds all tokens."""
        if self._columns < width:
            return self._columns
        if self._traits.cache_name is not None:
            raise EngineError(
                f"the model has dropped its cache after {self._columns} tokens, as some do beyond their original "
                "length; call generate with use_cache=False, or stay below that length"
            )
        return 0  # a recurrent model, whose state has another name

    def set_mask(self, inputs: dict[str, Any], cache: SessionCache) -> None:
        """Give the model a mask over the cache's slots if they are no longer the columns of the input."""
        slots = self._slots
        if slots is None:
            return
        tokens = inputs.get("input_ids")
        tokens = inputs["inputs_embeds"] if tokens is None else tokens
        if inputs.get("position_ids") is None:
            width = tokens.shape[1]
            if any(len(columns) != self._columns for columns in self._real):
                raise EngineError("pass position_ids: with padding, models disagree about the positions of tokens")
            positions = torch.arange(self._columns - width, self._columns, device=tokens.device)
            inputs["position_ids"] = positions.expand(len(tokens), -1)
        inputs["attention_mask"] = mask_over_slots(
            self._traits.config, cache, torch.from_numpy(slots).to(tokens.device), inputs
        )


class SessionCache(ChunkWiseCache):
    """A cache that carries the plan of its tokens, so that it can be given to the next call."""

    def __init__(self, *args: Any, session: Session) -> None:
        super().__init__(*args)
        self.session = session

    def select(self, sequences: Tensor) -> None:
        """Keep only `sequences` (n,), in that order, and their plans. A sequence may be named several times."""
        super().select(sequences)
        self.session.take(sequences.tolist())

    def crop(self, max_length: int) -> None:
        """Keep the first `max_length` columns, or remove the last `-max_length`, and forget the plans of the others."""
        super().crop(max_length)
        self.session.crop(self.get_seq_length())


def _real_columns(mask: Tensor | None, batch: int, width: int) -> np.ndarray:
    """Return (batch, width) bool: which columns of the pass are not padding."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return np.ones((batch, width), bool)
    return mask[:, -width:].bool().cpu().numpy()
