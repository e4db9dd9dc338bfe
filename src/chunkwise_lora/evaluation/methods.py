"""Methods: the ways to run one adapter that an evaluation compares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from chunkwise_lora.calibration.log_probabilities import ChunkWiseModel, log_probabilities
from chunkwise_lora.calibration.passes import passes_as_generated
from chunkwise_lora.engines.transformers.versions import CACHE
from chunkwise_lora.method.config import ChunkWiseConfig
from chunkwise_lora.method.trace import Trace

FULL = "PEFT, full rank"
"""Name of the method that all others are compared with: unmerged PEFT at full rank."""

Role = Literal["base", "full", "baseline", "ours"]
"""The model without adapter, full rank, something to compare with, or ChunkWise."""
Visit = Callable[[slice, slice, Tensor], None]
"""Takes some windows, some of their tokens, and the log-probabilities (windows, tokens, vocabulary) of the token after
each of them."""


@dataclass(frozen=True)
class Label:
    """What a method is called, and with which methods it belongs together."""

    name: str
    series: str
    """Methods of a series differ only in their mean rank."""
    role: Role
    asked: float | None = None
    """The mean rank that was asked for; None if none was."""


@dataclass(frozen=True)
class Spent:
    """What a method spent on windows of text."""

    ranks: np.ndarray
    """(windows, tokens) rank of every token."""
    kv_share: float = 1.0
    """Bytes of the KV cache at the end, divided by those of a full-precision cache."""


@dataclass(frozen=True)
class Opened:
    """A model that is ready to read a batch of sequences in several passes."""

    model: Any
    """What is called with token ids."""
    cache: Any
    """The cache that the passes fill."""
    trace: Callable[[], Trace] | None = None
    """Tells what was spent so far; None for a method of one constant rank."""


@dataclass(frozen=True)
class Method(ABC):
    """One way to run the adapter."""

    label: Label

    @property
    def name(self) -> str:
        """What the method is called."""
        return self.label.name

    @abstractmethod
    def score(self, windows: Tensor, visit: Visit) -> Spent:
        """Run token ids (windows, tokens) on the CPU, and give `visit` all log-probabilities, part by part."""


@dataclass(frozen=True)
class Generator(Method):
    """A method that can also read prompts and generate: its plan does not need the whole text."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device that takes token ids."""

    @property
    @abstractmethod
    def rank(self) -> float | None:
        """The rank of all tokens; None if it differs between tokens."""

    def passes(self, columns: int, read: Sequence[int] = (0,)) -> list[int]:
        """The passes in which known tokens run with the same predictions as one by one; see `passes_as_generated`."""
        return [columns] if columns else []

    @property
    def cache_changes(self) -> bool:
        """Whether the cache stores a token in another way after later tokens, so that it cannot go back."""
        return False

    @abstractmethod
    def open(self, batch: int, prompt_columns: int) -> Any:
        """A context manager that gives an `Opened` for a batch of prompts of so many columns."""

    def read(self, opened: Opened, tokens: Tensor, **options: Any) -> Tensor:
        """Run token ids (batch, tokens) after those before; returns logits (batch, tokens, vocabulary)."""
        return opened.model(input_ids=tokens, **{CACHE: opened.cache}, use_cache=True, **options).logits


@dataclass(frozen=True)
class PlainMethod(Generator):
    """A model that runs as transformers or PEFT runs it."""

    model: Any
    mean_rank: float
    """The rank of all tokens."""

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @property
    def rank(self) -> float:
        return self.mean_rank

    @contextmanager
    def open(self, batch: int, prompt_columns: int) -> Iterator[Opened]:
        yield Opened(self.model, DynamicCache())

    @torch.no_grad()
    def score(self, windows: Tensor, visit: Visit) -> Spent:
        for row in _rows(windows):
            tokens = windows[row].to(self.device)
            visit(row, slice(None), _log_p(self.model(input_ids=tokens, use_cache=False).logits))
        return Spent(np.full(windows.shape, self.mean_rank))


@dataclass(frozen=True)
class PlannedMethod(Generator):
    """ChunkWise with one ladder and one config."""

    chunkwise: ChunkWiseModel
    ladder: str
    config: ChunkWiseConfig

    @property
    def device(self) -> torch.device:
        return self.chunkwise.input_device

    @property
    def rank(self) -> float | None:
        if self.config.levels > 1:
            return None
        ranks, share = self.chunkwise.ladders[self.ladder].rung_ranks, self.config.selection.rank_shares[0]
        return min(ranks, key=lambda rank: abs(rank - share * ranks[-1]))

    @property
    def cache_changes(self) -> bool:
        return self.config.kv_cache.acts

    def passes(self, columns: int, read: Sequence[int] = (0,)) -> list[int]:
        return passes_as_generated(self.config, columns, read)

    @contextmanager
    def open(self, batch: int, prompt_columns: int) -> Iterator[Opened]:
        options: dict[str, Any] = {"adapter_names": self.ladder, "chunkwise_config": self.config}
        with self.chunkwise.stream(batch=batch, prompt_columns=prompt_columns, **options) as call:
            yield Opened(self.chunkwise.base, call.cache, call.trace)

    @torch.no_grad()
    def score(self, windows: Tensor, visit: Visit) -> Spent:
        """Run the windows in one pass each, or together where the plan or the cache needs several passes."""
        passes = self.passes(windows.shape[1])
        if len(passes) > 1:
            with self.open(len(windows), 1) as opened:
                end = 0
                for tokens in windows.to(self.device).split(passes, dim=1):
                    start, end = end, end + tokens.shape[1]
                    visit(slice(None), slice(start, end), _log_p(self.read(opened, tokens)))
                assert opened.trace is not None
                trace = opened.trace()
            kv_share = trace.kv_bytes / max(trace.kv_bytes_full, 1)
            return Spent(np.array([sequence.ranks for sequence in trace.sequences]), kv_share)
        ranks = []
        for row in _rows(windows):
            with self.open(1, windows.shape[1]) as opened:
                tokens = windows[row].to(self.device)
                visit(row, slice(None), _log_p(opened.model(input_ids=tokens, use_cache=False).logits))
                assert opened.trace is not None
                ranks.append(opened.trace().sequences[0].ranks)
        return Spent(np.array(ranks))


@dataclass(frozen=True)
class ReplannedMethod(Method):
    """Rungs that are chosen for a known text. It cannot generate."""

    chunkwise: ChunkWiseModel
    ladder: str
    rungs_for: Callable[[Tensor], np.ndarray]
    """Chooses the rungs (windows, tokens) for token ids (windows, tokens)."""
    scale: float = 1.0
    """Factor on the adapter's output."""

    def score(self, windows: Tensor, visit: Visit) -> Spent:
        rungs = self.rungs_for(windows)
        for row in _rows(windows):
            log_p = log_probabilities(self.chunkwise, windows[row], rungs[row], self.ladder, self.scale)
            visit(row, slice(None), log_p)
        return Spent(np.array(self.chunkwise.ladders[self.ladder].rung_ranks)[rungs])


def full_rank_of(methods: Sequence[Method]) -> PlainMethod:
    """The method named `FULL`."""
    return next(method for method in methods if method.name == FULL and isinstance(method, PlainMethod))


def _rows(windows: Tensor) -> Iterator[slice]:
    """The windows one by one: the log-probabilities of several would need much memory."""
    return (slice(row, row + 1) for row in range(len(windows)))


def _log_p(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1)
