"""One generation: a scheduler per sequence, the cache they share, and what happened."""

from __future__ import annotations

import copy
import math
import time
import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from chunkwise_lora.backends.segments import entropies_of, ranks_of, segments_of
from chunkwise_lora.engines.transformers.cache import NO_TOKEN, ChunkWiseCache
from chunkwise_lora.engines.transformers.layers import Step
from chunkwise_lora.errors import EngineError
from chunkwise_lora.method.complexity import LearnedComplexity
from chunkwise_lora.method.config import ChunkWiseConfig
from chunkwise_lora.method.kv_policy import KVDecision
from chunkwise_lora.method.scheduler import FixedScheduler, RuntimeScheduler
from chunkwise_lora.method.trace import SequenceTrace, Trace

BASE = "__base__"
"""The adapter name of sequences that run without one, as in PEFT."""


@dataclass(frozen=True)
class AdapterInfo:
    """What a session needs to know of a loaded ladder."""

    rung_ranks: np.ndarray
    """(rungs,) each rung's mean rank."""
    rung_bytes: np.ndarray
    """(rungs,) bytes of factors that a pass reads at each rung."""
    learned: LearnedComplexity | None = None
    """What calibration put into the ladder."""


NO_ADAPTER = AdapterInfo(np.zeros(1), np.zeros(1, np.int64), LearnedComplexity.neutral())


class SessionCache(ChunkWiseCache):
    """The cache of a session, through which a beam search reaches its schedulers too."""

    def __init__(self, session: Session, config: PreTrainedConfig, carries_out: bool, use_kernels: bool) -> None:
        policy = session.config.kv_cache
        super().__init__(config, policy.int8_head_share, carries_out, use_kernels, policy.needs_queries)
        self._session = weakref.ref(session)  # the session holds the cache, which may outlive it

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow a beam search's choice of sequences."""
        super().reorder_cache(beam_idx)
        if (session := self._session()) is not None:
            session.reorder(beam_idx.tolist())


class Session:
    """State of one generation over a batch.

    `adapters` names each prompt's adapter. `prompt_columns` is the width of the prompts, padding included: their
    tokens are planned without entropies, since a prefill in one pass does not know them and one in several must not
    differ. After one of `eos_token_ids` a sequence has ended, and what follows is padding. `carries_out` tells whether
    the cache can obey KV decisions, `kv_notes` which it leaves undone, `use_kernels` whether kernels may read it. A
    sequence that outgrows `positions` is refused.
    """

    def __init__(
        self,
        model_config: PreTrainedConfig,
        config: ChunkWiseConfig,
        adapters: Sequence[str],
        infos: Mapping[str, AdapterInfo],
        step: Step,
        *,
        prompt_columns: int,
        eos_token_ids: Collection[int] = (),
        carries_out: bool,
        use_kernels: bool = True,
        kv_notes: Sequence[str] = (),
        positions: float = math.inf,
    ) -> None:
        self.config = config
        self.cache = SessionCache(self, model_config, carries_out, use_kernels)
        self._kv_notes = tuple(kv_notes)
        self._positions = positions
        self._model_config = model_config
        self._adapters = list(adapters)
        self._infos = infos
        self._step = step
        self._prompt_columns = prompt_columns
        self._eos_token_ids = frozenset(eos_token_ids)
        self._ended: list[bool] = []
        self._schedulers: list[RuntimeScheduler | FixedScheduler] = []
        self._tokens: list[list[int]] = []
        self._weights: list[list[np.ndarray]] = []
        self._entropies: list[float | None] = []
        self._columns = 0
        self._pending: tuple[np.ndarray, list[list[KVDecision]]] | None = None
        self._bytes_read = 0
        self._passes = 0
        self._scheduler_seconds = 0.0

    def follow(self, plans: Sequence[FixedScheduler]) -> None:
        """Before the first pass: take `plans`, one per sequence, instead of planning."""
        self._open(len(plans))
        self._schedulers = list(plans)

    def before_pass(self, inputs: dict[str, Any]) -> None:
        """Plan the tokens of a forward pass and fill the step; `inputs` are the model's keyword arguments."""
        start = time.perf_counter()
        input_ids: Tensor = inputs["input_ids"]
        batch, width = input_ids.shape
        if not self._schedulers:
            self._open(batch)
        # Without a cache every pass brings all tokens again; their plan stands.
        known = self._columns if inputs.get("past_key_values") is None else 0
        if known >= width:
            if "past_key_values" in inputs:
                raise EngineError(
                    f"the model has dropped its cache after {known} tokens, as some do past their original length; "
                    "call generate with use_cache=False, or stay below that length"
                )
            known = 0  # a recurrent model, which has its own name for its state
        real = _real_columns(inputs.get("attention_mask"), batch, width)
        ids = input_ids[:, known:].tolist()
        tokens = np.full((batch, width - known), NO_TOKEN)
        decisions: list[list[KVDecision]] = []
        for row, scheduler in enumerate(self._schedulers):
            real[row, known:] &= not self._ended[row]
            columns = np.flatnonzero(real[row, known:])
            decisions.append(self._plan(row, scheduler, columns, ids[row], tokens))
        self._pending = (tokens, decisions)
        self._columns += width - known
        self._fill_step(batch, width)
        if self.cache.own and inputs.get("past_key_values") is self.cache:
            self._align_mask(inputs, real)
        self._scheduler_seconds += time.perf_counter() - start

    def after_pass(self, logits: Tensor) -> None:
        """Learn the entropies of what comes next, then carry out the KV decisions of the pass."""
        assert self._pending is not None
        if self.config.reads_entropy:
            self._entropies = entropies_of(logits[:, -1]).tolist()
        tokens, decisions = self._pending
        if self.cache.own and self.cache.get_seq_length():
            self.cache.note(tokens)
            self.cache.carry_out(decisions)

    def reorder(self, order: Sequence[int]) -> None:
        """Sequence i becomes a copy of sequence `order[i]`, as a beam search chose."""
        if list(order) == list(range(len(self._schedulers))):
            return
        self._schedulers = [copy.deepcopy(self._schedulers[i]) for i in order]
        self._tokens = [list(self._tokens[i]) for i in order]
        self._weights = [list(self._weights[i]) for i in order]
        self._adapters = [self._adapters[i] for i in order]
        self._ended = [self._ended[i] for i in order]
        self._entropies = [self._entropies[i] for i in order] if self._entropies else []

    def trace(self) -> Trace:
        """What happened so far."""
        sequences = []
        for row, scheduler in enumerate(self._schedulers):
            adapter = self._adapters[row]
            weights = np.concatenate(self._weights[row])
            sequences.append(
                SequenceTrace(
                    adapter=None if adapter == BASE else adapter,
                    tokens=tuple(self._tokens[row]),
                    ranks=ranks_of(weights, self._info(adapter).rung_ranks)[_real(weights)].tolist(),
                    chunks=tuple(scheduler.chunks),
                )
            )
        return Trace(
            sequences=tuple(sequences),
            passes=self._passes,
            adapter_bytes_read=self._bytes_read,
            kv_bytes=self.cache.nbytes,
            kv_bytes_full=self.cache.full_nbytes,
            kv_notes=(*self._kv_notes, *self.cache.notes),
            scheduler_seconds=self._scheduler_seconds,
        )

    def _info(self, adapter: str) -> AdapterInfo:
        return NO_ADAPTER if adapter == BASE else self._infos[adapter]

    def _open(self, batch: int) -> None:
        copies = batch // len(self._adapters)
        self._adapters = [name for name in self._adapters for _ in range(copies)]
        vocab_size = self._model_config.get_text_config().vocab_size
        for name in self._adapters:
            info = self._info(name)
            self._schedulers.append(RuntimeScheduler(self.config, info.rung_ranks.tolist(), vocab_size, info.learned))
            self._weights.append([])
            self._tokens.append([])
            self._ended.append(False)

    def _plan(
        self,
        row: int,
        scheduler: RuntimeScheduler | FixedScheduler,
        columns: np.ndarray,
        ids: Sequence[int],
        tokens: np.ndarray,
    ) -> list[KVDecision]:
        """Plan one sequence's new tokens, which stand in `columns` of the pass."""
        new = [ids[column] for column in columns]
        entropies: list[float | None] = [None] * len(new)
        if new and self._columns >= self._prompt_columns:
            if self._entropies:
                entropies[0] = self._entropies[row]
            self._ended[row] = not self._eos_token_ids.isdisjoint(new)
        plan = scheduler.step(new, entropies)
        if scheduler.position > self._positions:
            raise EngineError(
                f"a sequence has come to {scheduler.position} tokens, but the model has learned {self._positions} "
                "positions; lower max_new_tokens or shorten the prompt"
            )
        tokens[row, columns] = np.arange(scheduler.position - len(new), scheduler.position)
        weights = np.full((tokens.shape[1], plan.weights.shape[1]), np.nan, np.float32)
        weights[columns] = plan.weights
        self._weights[row].append(weights)
        self._tokens[row] += new
        return plan.decisions

    def _fill_step(self, batch: int, width: int) -> None:
        step, info = self._step, self._infos
        step.parts, step.sequences, step.batch, step.width = [], {}, batch, width
        step.constant = self.config.levels == 1
        for name in dict.fromkeys(self._adapters):
            if name == BASE:
                continue
            members = np.array([row for row, adapter in enumerate(self._adapters) if adapter == name])
            everyone = len(members) == batch
            weights = np.concatenate([_without_padding(self._of_pass(row, width)) for row in members])
            rows = None if everyone else (members[:, None] * width + np.arange(width)).ravel()
            parts = segments_of(name, weights, info[name].rung_ranks, rows)
            step.parts += parts
            step.sequences[name] = None if everyone else torch.from_numpy(members)
            self._bytes_read += sum(int(info[name].rung_bytes[part.rung]) for part in parts)
        self._passes += 1

    def _of_pass(self, row: int, width: int) -> np.ndarray:
        """(width, rungs) a sequence's weights in the pass, NaN for padding."""
        newest = self._weights[row][-1]
        return newest if len(newest) == width else np.concatenate(self._weights[row])[-width:]

    def _align_mask(self, inputs: dict[str, Any], real: np.ndarray) -> None:
        """Give the model a mask over the cache's slots once they are no longer columns of the input."""
        slots = self.cache.slot_mask(real)
        if slots is None:
            return
        input_ids: Tensor = inputs["input_ids"]
        batch, width = input_ids.shape
        if inputs.get("position_ids") is None:
            last = [[scheduler.position - width + i for i in range(width)] for scheduler in self._schedulers]
            inputs["position_ids"] = torch.tensor(last, device=input_ids.device).clamp_min(0)
        mask = torch.from_numpy(slots).to(input_ids.device)
        if not any(self.cache.is_sliding):
            inputs["attention_mask"] = mask
            return
        shared = {
            "config": self._model_config.get_text_config(),
            "inputs_embeds": torch.empty((batch, width, 0), dtype=self.cache.own[0].dtype, device=input_ids.device),
            "past_key_values": self.cache,
        }
        inputs["attention_mask"] = {
            "full_attention": create_causal_mask(attention_mask=mask, **shared),
            "sliding_attention": create_sliding_window_causal_mask(
                attention_mask=inputs.get("attention_mask"), **shared
            ),
        }


def _real_columns(mask: Tensor | None, batch: int, width: int) -> np.ndarray:
    """(batch, width) bool: which columns of the pass are no padding."""
    if mask is None:
        return np.ones((batch, width), bool)
    return mask[:, -width:].bool().cpu().numpy()


def _real(weights: np.ndarray) -> np.ndarray:
    return ~np.isnan(weights[:, 0])


def _without_padding(weights: np.ndarray) -> np.ndarray:
    """Give padding the weights of a real token, so that it does not keep a pass from being uniform."""
    real = _real(weights)
    if real.all():
        return weights
    filled = weights.copy()
    filled[~real] = weights[real][0] if real.any() else 0
    return filled
