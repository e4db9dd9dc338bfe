"""What the rungs of a ladder cost in real text: log-probabilities under a plan, and their distance to full rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from chunkwise_lora.engines.transformers.model import ChunkWiseModel
from chunkwise_lora.errors import ChunkWiseError
from chunkwise_lora.method.config import ChunkWiseConfig
from chunkwise_lora.method.fixed_scheduler import FixedScheduler


@dataclass(frozen=True)
class Text:
    """Sequences of token ids, and what of them matters."""

    tokens: Tensor
    """(sequences, tokens)"""
    counted: Tensor
    """(sequences, tokens) bool: whether it matters what is said to follow a token."""

    @classmethod
    def of(cls, tokens: Tensor) -> Text:
        """Text that matters as a whole."""
        return cls(tokens, torch.ones_like(tokens, dtype=torch.bool))

    @classmethod
    def blocks(cls, tokens: Sequence[int] | Tensor, length: int, counted: Sequence[bool] | None = None) -> Text:
        """Sequences of `length` tokens; what does not fill one at the end is left out.

        Raises:
            ChunkWiseError: `counted` has another length.
        """
        if counted is not None and len(counted) != len(tokens):
            raise ChunkWiseError(f"{len(tokens)} tokens, but {len(counted)} that say whether they count; give one each")
        ids, rows = torch.as_tensor(tokens), len(tokens) // length
        mask = torch.ones_like(ids) if counted is None else torch.as_tensor(counted)
        return cls(*(one[: rows * length].view(rows, length) for one in (ids, mask.bool())))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Any) -> Text:
        return Text(self.tokens[rows], self.counted[rows])

    def __add__(self, other: Text) -> Text:
        return Text(torch.cat([self.tokens, other.tokens]), torch.cat([self.counted, other.counted]))

    def split(self, size: int) -> list[Text]:
        """Batches of `size` sequences."""
        return [self[start : start + size] for start in range(0, len(self), size)]


def at_full_rank(model: ChunkWiseModel, tokens: Tensor, adapter: str | None = None) -> Tensor:
    """(batch, tokens, vocabulary) log-probabilities of what follows each of `tokens` (batch, tokens), in one pass."""
    lossless = ChunkWiseConfig.preset("lossless")
    with model.stream(batch=len(tokens), adapter_names=adapter, chunkwise_config=lossless):
        logits: Tensor = model.model(input_ids=tokens, use_cache=False).logits
    return logits.float().log_softmax(-1)


@contextmanager
def hooked(model: nn.Module, hooks: Mapping[str, Callable[..., Tensor | None]]) -> Iterator[None]:
    """Forward hooks by module name, and meanwhile no gradients for the model's own parameters."""
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


@torch.no_grad()
def log_probabilities(
    model: ChunkWiseModel,
    tokens: Tensor,
    rungs: np.ndarray | int | None = None,
    adapter: str | None = None,
    scale: float = 1.0,
) -> Tensor:
    """(batch, tokens, vocabulary) of what follows each of `tokens` (batch, tokens), in one pass.

    `rungs` is every token's rung (batch, tokens), or one for all; None runs all at full rank. `adapter` is by default
    the ladder loaded first, and `scale` that of every token.
    """
    adapter = adapter or next(iter(model.ladders))
    count = model.ladders[adapter].rungs
    plan = np.broadcast_to(count - 1 if rungs is None else rungs, tuple(tokens.shape))
    lossless = ChunkWiseConfig.preset("lossless")
    with model.stream(batch=len(tokens), adapter_names=adapter, chunkwise_config=lossless) as session:
        session.follow([FixedScheduler(row, count, scale) for row in plan])
        logits: Tensor = model.model(input_ids=tokens, use_cache=False).logits
    return logits.float().log_softmax(-1)


@torch.no_grad()
def log_probabilities_planned(
    model: ChunkWiseModel, tokens: Tensor, config: ChunkWiseConfig, adapter: str | None = None
) -> tuple[Tensor, np.ndarray]:
    """The same under the plan of `config`, as a prompt would run: entropies unknown, keys and values as they are.

    Also gives every token's rank (batch, tokens).
    """
    options: dict[str, Any] = {"adapter_names": adapter, "chunkwise_config": config}
    with model.stream(batch=len(tokens), prompt_columns=tokens.shape[1], **options) as session:
        logits: Tensor = model.model(input_ids=tokens, use_cache=False).logits
    ranks = np.array([sequence.ranks for sequence in session.trace().sequences])
    return logits.float().log_softmax(-1), ranks


@torch.no_grad()
def log_probabilities_stream(
    model: ChunkWiseModel, tokens: Tensor, config: ChunkWiseConfig, adapter: str | None = None
) -> tuple[Tensor, np.ndarray, float]:
    """The same token by token, as generation would run: with the plan, cross-fades and KV policy of `config`.

    Also gives every token's rank (batch, tokens), and the bytes of the KV cache as a share of full precision.
    """
    steps = []
    with model.stream(batch=len(tokens), adapter_names=adapter, chunkwise_config=config) as session:
        for column in tokens.split(1, dim=1):
            logits = model.model(input_ids=column, past_key_values=session.cache, use_cache=True).logits
            steps.append(logits[:, -1].float().log_softmax(-1))
    trace = session.trace()
    ranks = np.array([sequence.ranks for sequence in trace.sequences])
    return torch.stack(steps, dim=1), ranks, trace.kv_bytes / max(trace.kv_bytes_full, 1)


def divergence(reference: Tensor, log_p: Tensor) -> Tensor:
    """(...,) the KL divergence, in nats, of log-probabilities (..., vocabulary) from those of `reference`."""
    return (reference.exp() * (reference - log_p)).sum(-1)


def entropy(log_p: Tensor) -> Tensor:
    """(...,) nats."""
    return -(log_p.exp() * log_p).sum(-1)


def losses(log_p: Tensor, tokens: Tensor) -> Tensor:
    """(batch, tokens - 1) nats lost on each next token."""
    return -log_p[:, :-1].gather(2, tokens[:, 1:, None]).squeeze(2)
