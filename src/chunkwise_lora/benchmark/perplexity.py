"""Perplexity of a text under a measured method, to show beside its latency. `evaluation` measures quality in full."""

from __future__ import annotations

import torch
from torch import Tensor

from chunkwise_lora.benchmark.methods import Method
from chunkwise_lora.engines.transformers.versions import CACHE


@torch.no_grad()
def perplexity(method: Method, tokens: Tensor) -> float:
    """Perplexity per token of windows of text, without the first token of each.

    ChunkWise runs token by token with its plan, cross-fades and KV policy in force, as in generation. A baseline gives
    the same result in one pass.

    Args:
        method: The method that runs the text.
        tokens: (windows, tokens) token ids, which run in one batch.
    """
    if method.chunkwise is None:
        logits = method.model(input_ids=tokens).logits[:, :-1]
    else:
        steps = []
        with method.chunkwise.stream(batch=len(tokens), chunkwise_config=method.config) as call:
            for column in range(tokens.shape[1] - 1):
                ids = tokens[:, column : column + 1]
                steps.append(method.model(input_ids=ids, **{CACHE: call.cache}, use_cache=True).logits[:, -1])
        logits = torch.stack(steps, dim=1)
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
    return float(loss.exp())
