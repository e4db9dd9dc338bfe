"""Perplexity of a text under a measured method, to show beside its latency. `evaluation` measures quality in full."""

from __future__ import annotations

import torch
from torch import Tensor

from chunkwise_lora.benchmark.methods import Method
from chunkwise_lora.engines.transformers.versions import CACHE


@torch.no_grad()
def perplexity(method: Method, tokens: Tensor) -> float:
    """Perplexity per token of `tokens` (1, n), without the first token.

    ChunkWise runs token by token with its plan, cross-fades and KV policy in force, as in generation. A baseline gives
    the same result in one pass.
    """
    if method.chunkwise is None:
        logits = method.model(input_ids=tokens).logits[0, :-1]
    else:
        steps = []
        with method.chunkwise.stream(chunkwise_config=method.config) as call:
            for column in range(tokens.shape[1] - 1):
                ids = tokens[:, column : column + 1]
                steps.append(method.model(input_ids=ids, **{CACHE: call.cache}, use_cache=True).logits[0, -1])
        logits = torch.stack(steps)
    loss = torch.nn.functional.cross_entropy(logits.float(), tokens[0, 1:])
    return float(loss.exp())
