"""Log-probabilities of a model under plans. Calibration and evaluation run the model through this file.

Token ids may lie on the CPU, wherever the model lies. Log-probabilities lie where the model's output does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from chunkwise_lora.calibration.passes import passes_as_generated
from chunkwise_lora.calibration.text import TokenBlocks
from chunkwise_lora.engines.transformers.model import DEFAULT, ChunkWiseModel
from chunkwise_lora.engines.transformers.versions import CACHE
from chunkwise_lora.method.config import ChunkWiseConfig
from chunkwise_lora.method.fixed_scheduler import FixedScheduler

__all__ = [
    "DEFAULT",
    "ChunkWiseModel",
    "ScoredPass",
    "at_full_rank",
    "entropy",
    "forward_hooks",
    "kl_divergence",
    "log_probabilities",
    "log_probabilities_in_one_pass",
    "log_probabilities_as_generated",
    "next_token_losses",
    "sampled",
    "scored_losses",
]


@dataclass(frozen=True)
class ScoredPass:
    """The log-probabilities of a text, and what the plan spent on it."""

    log_p: Tensor
    """(batch, tokens, vocabulary) log-probabilities of the token after each token; (predictions, vocabulary) if only
    some predictions were asked for."""
    ranks: np.ndarray
    """(batch, tokens) the rank of every token."""
    kv_share: float = 1.0
    """Bytes of the KV cache at the end, divided by those of a full-precision cache."""


def at_full_rank(
    model: ChunkWiseModel, tokens: Tensor, adapter: str | None = None, scored: Tensor | None = None
) -> Tensor:
    """Run token ids (batch, tokens) at full rank in one pass, with gradients where they are enabled.

    Returns:
        (batch, tokens, vocabulary) float32 log-probabilities of the token after each token. With `scored` (batch,
        tokens) bool, only those after scored tokens are computed: (predictions, vocabulary).
    """
    lossless = ChunkWiseConfig.preset("lossless")
    with model.stream(batch=len(tokens), adapter_names=adapter, chunkwise_config=lossless):
        return _log_p(model, tokens, scored)


@torch.no_grad()
def log_probabilities(
    model: ChunkWiseModel,
    tokens: Tensor,
    rungs: np.ndarray | int | None = None,
    adapter: str | None = None,
    scale: float = 1.0,
    scored: Tensor | None = None,
) -> Tensor:
    """Run token ids on given rungs in one pass.

    Args:
        model: A model with ladders.
        tokens: (batch, tokens) token ids.
        rungs: (batch, tokens) the rung of every token, or one rung for all tokens; None is full rank.
        adapter: Name of the ladder; by default the first one of the model.
        scale: Factor on the adapter's output, the same for all tokens.
        scored: (batch, tokens) bool: the tokens whose predictions are computed; by default all.

    Returns:
        (batch, tokens, vocabulary) float32 log-probabilities of the token after each token; (predictions, vocabulary)
        with `scored`.
    """
    adapter = adapter or next(iter(model.ladders))
    count = model.ladders[adapter].rungs
    plan = np.broadcast_to(count - 1 if rungs is None else rungs, tuple(tokens.shape))
    lossless = ChunkWiseConfig.preset("lossless")
    with model.stream(batch=len(tokens), adapter_names=adapter, chunkwise_config=lossless) as call:
        call.follow([FixedScheduler(row, count, scale) for row in plan])
        return _log_p(model, tokens, scored)


@torch.no_grad()
def log_probabilities_in_one_pass(
    model: ChunkWiseModel,
    tokens: Tensor,
    config: ChunkWiseConfig,
    adapter: str | None = None,
    scored: Tensor | None = None,
) -> ScoredPass:
    """Run token ids (batch, tokens) under the policy `config` in one pass, as a prompt runs.

    The entropies of the predictions are unknown to the policy, and keys and values stay in full precision. With
    `scored` (batch, tokens) bool, only the predictions after scored tokens are computed.
    """
    options: dict[str, Any] = {"adapter_names": adapter, "chunkwise_config": config}
    with model.stream(batch=len(tokens), prompt_columns=tokens.shape[1], **options) as call:
        log_p = _log_p(model, tokens, scored)
    return ScoredPass(log_p, np.array([sequence.ranks for sequence in call.trace().sequences]))


@torch.no_grad()
def log_probabilities_as_generated(
    model: ChunkWiseModel,
    tokens: Tensor,
    config: ChunkWiseConfig,
    adapter: str | None = None,
    scored: Tensor | None = None,
) -> ScoredPass:
    """Run token ids (batch, tokens) under the policy `config` as generation runs: as if they came one by one.

    The plan, the cross-fades and the KV policy of `config` are all in force. With `scored` (batch, tokens) bool, only
    the predictions after scored tokens are kept.
    """
    wanted = torch.ones_like(tokens, dtype=torch.bool) if scored is None else scored
    places = torch.arange(tokens.numel(), device=tokens.device).view(tokens.shape)
    steps, order = [], []
    with model.stream(batch=len(tokens), adapter_names=adapter, chunkwise_config=config) as call:
        options = {CACHE: call.cache, "use_cache": True}
        lengths = passes_as_generated(config, tokens.shape[1])
        parts = [one.split(lengths, dim=1) for one in (tokens, wanted, places)]
        for ids, kept, place in zip(*parts, strict=True):
            if config.reads_entropy:  # of all sequences
                steps.append(_log_p(model, ids, None, **options)[kept])
            else:
                steps.append(_log_p(model, ids, kept, **options))
            order.append(place[kept])
    trace = call.trace()
    ranks = np.array([sequence.ranks for sequence in trace.sequences])
    log_p = torch.cat(steps)[torch.cat(order).argsort()]
    kv_share = trace.kv_bytes / max(trace.kv_bytes_full, 1)
    return ScoredPass(log_p.unflatten(0, tuple(tokens.shape)) if scored is None else log_p, ranks, kv_share)


def _log_p(model: ChunkWiseModel, tokens: Tensor, scored: Tensor | None, **options: Any) -> Tensor:
    """Run token ids (batch, tokens) in one pass of the open call.

    Returns:
        (batch, tokens, vocabulary) log-probabilities; (predictions, vocabulary) with `scored` (batch, tokens).
    """
    tokens = tokens.to(model.input_device)
    with _head_reads(model.base, scored):
        logits: Tensor = model.base(input_ids=tokens, **({"use_cache": False} | options)).logits
    if scored is not None:
        logits = logits[scored] if logits.shape[:2] == scored.shape else logits[0]
    return logits.float().log_softmax(-1)


@contextmanager
def _head_reads(base: PreTrainedModel, scored: Tensor | None) -> Iterator[None]:
    """Let the output head see scored tokens (batch, tokens) alone, as one sequence, because vocabularies are large.

    An adapted head sees all tokens, because each of them has its own plan. So does a model that does not call its head.
    """
    head = base.get_output_embeddings()
    if scored is None or head is None or isinstance(head, BaseTunerLayer):
        yield
        return

    def pick(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args[0][scored][None], *args[1:]

    handle = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def forward_hooks(model: nn.Module, hooks: Mapping[str, Callable[..., Tensor | None]]) -> Iterator[None]:
    """Register forward hooks by module name, and switch off gradients of the model's own parameters meanwhile."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = [model.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)


def kl_divergence(reference: Tensor, log_p: Tensor) -> Tensor:
    """The KL divergence of `log_p` from `reference`.

    Args:
        reference: (..., vocabulary) log-probabilities.
        log_p: (..., vocabulary) log-probabilities.

    Returns:
        (...,) nats.
    """
    return (reference.exp() * (reference - log_p)).sum(-1)


def entropy(log_p: Tensor) -> Tensor:
    """(...,) the entropy, in nats, of log-probabilities (..., vocabulary)."""
    return -(log_p.exp() * log_p).sum(-1)


def sampled(log_p: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a token from each of several distributions, the same on every device up to rounding.

    Args:
        log_p: (n, vocabulary) log-probabilities.
        generator: A generator on the CPU.

    Returns:
        (n,) token ids, on the device of `log_p`.
    """
    ends = log_p.exp().cumsum(-1)
    places = torch.rand(len(log_p), 1, generator=generator).to(ends.device) * ends[:, -1:]
    return torch.searchsorted(ends, places, right=True).squeeze(1).clamp_max(log_p.shape[1] - 1)


def next_token_losses(log_p: Tensor, tokens: Tensor) -> Tensor:
    """The loss of every next token.

    Args:
        log_p: (batch, tokens, vocabulary) log-probabilities of the token after each token.
        tokens: (batch, tokens) token ids.

    Returns:
        (batch, tokens - 1) nats.
    """
    return -log_p[:, :-1].gather(2, tokens[:, 1:, None].to(log_p.device)).squeeze(2)


def scored_losses(log_p: Tensor, blocks: TokenBlocks) -> Tensor:
    """The losses of the scored predictions whose next token is known.

    Args:
        log_p: (scored, vocabulary) log-probabilities of the token after each scored token of `blocks`.
        blocks: The text.

    Returns:
        (predictions,) nats.
    """
    following = blocks.tokens.roll(-1, dims=1)[blocks.scored].to(log_p.device)
    return -log_p.gather(1, following[:, None]).squeeze(1)[blocks.has_next]
