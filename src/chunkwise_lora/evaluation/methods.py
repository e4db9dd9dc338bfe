"""Methods: the ways to run one adapter that an evaluation compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from chunkwise_lora.calibration.log_probabilities import ChunkWiseModel
from chunkwise_lora.engines.transformers.versions import CACHE

FULL = "PEFT, full rank"
"""Name of the method that all others are compared with: unmerged PEFT at full rank."""
WARM_UP_TOKENS = 2
"""Tokens of a generation that is not timed. The first one may compile kernels and allocate memory."""


@dataclass(frozen=True)
class ScoredWindows:
    """The result of running windows of text with one method."""

    log_p: Tensor
    """(windows, tokens, vocabulary) log-probabilities of the token after each token."""
    mean_rank: float
    """Mean rank of all tokens."""
    kv_share: float = 1.0
    """Bytes of the KV cache, divided by those of a full-precision cache."""
    ranks: np.ndarray | None = None
    """(windows, tokens) rank of every token, where the method chooses token by token."""


@dataclass(frozen=True)
class Generation:
    """The result of generating with one method."""

    ids: Tensor
    """(batch, tokens) token ids of prompts and answers."""
    ranks: list[float]
    """(batch,) mean rank of each sequence; empty if the method has no trace."""
    kv_share: float = 1.0
    """Bytes of the KV cache at the end, divided by those of a full-precision cache."""


@dataclass(frozen=True)
class Method:
    """One way to run the adapter."""

    name: str
    model: PreTrainedModel | ChunkWiseModel
    """Has the method `generate` of transformers."""
    options: dict[str, Any] | None
    """Options of this method for `generate`; None if it cannot generate, because its plan needs the whole text."""
    score: Callable[[Tensor], ScoredWindows]
    """Runs token ids (windows, tokens)."""
    mean_rank: float | None = None
    """The mean rank, if it is the same for all text."""

    @torch.no_grad()
    def generate(self, inputs: Mapping[str, Any], **options: Any) -> Generation:
        """Continue prompts greedily.

        Args:
            inputs: A tokenizer's output for a batch of prompts.
            **options: Options of transformers' `generate`.
        """
        assert self.options is not None
        options = {"do_sample": False, **options, **self.options}
        if isinstance(self.model, ChunkWiseModel):
            ids = self.model.generate(**inputs, **options)
            trace = self.model.trace
            assert trace is not None
            ranks = [sequence.mean_rank for sequence in trace.sequences]
            return Generation(ids, ranks, trace.kv_bytes / max(trace.kv_bytes_full, 1))
        cache = DynamicCache(config=self.model.config.get_text_config())
        return Generation(self.model.generate(**inputs, **{CACHE: cache}, **options), [])


def full_rank_of(methods: Sequence[Method]) -> Method:
    """The method named `FULL`."""
    return next(method for method in methods if method.name == FULL)


def warm_up(methods: Sequence[Method], inputs: Mapping[str, Any], pad_token_id: int) -> None:
    """Generate a few tokens with every method, so that work that happens only once is not timed.

    Args:
        methods: Methods that can generate.
        inputs: A tokenizer's output for a batch of prompts, as large as those that are timed.
        pad_token_id: Token id that fills finished sequences.
    """
    for method in methods:
        method.generate(inputs, min_new_tokens=WARM_UP_TOKENS, max_new_tokens=WARM_UP_TOKENS, pad_token_id=pad_token_id)
