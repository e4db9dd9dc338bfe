"""Perplexity of a text under a measured method, to show beside its latency. `evaluation` measures quality in full."""

from __future__ import annotations

import torch
from torch import Tensor

from chunkwise_lora.benchmark.methods import Method
from chunkwise_lora.calibration.log_probabilities import log_probabilities_as_generated, next_token_losses


@torch.no_grad()
def perplexity(method: Method, tokens: Tensor) -> float:
    """Perplexity per token of windows of text, without the first token of each.

    ChunkWise runs as in generation, with its plan, cross-fades and KV policy in force. A baseline gives the same result
    in one pass.

    Args:
        method: The method that runs the text.
        tokens: (windows, tokens) token ids, which run in one batch.
    """
    if method.chunkwise is None:
        log_p = method.model(input_ids=tokens).logits.float().log_softmax(-1)
    else:
        assert method.config is not None
        log_p = log_probabilities_as_generated(method.chunkwise, tokens, method.config).log_p
    return float(next_token_losses(log_p, tokens).mean().exp())
