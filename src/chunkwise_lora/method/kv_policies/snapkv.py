"""The KV policy `snapkv`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from chunkwise_lora.method.kv_policies.base import KVPolicy, register_kv_policy

if TYPE_CHECKING:
    from torch import Tensor


@register_kv_policy("snapkv")
@dataclass(frozen=True)
class SnapKV(KVPolicy):
    """Keeps the tokens that receive the most attention from the chunk's last queries, the observation window.

    The tokens of the window itself have the highest score. Source: Li et al., SnapKV: LLM Knows What You are Looking
    for Before Generation (arXiv 2404.14469). The paper scores a whole prompt by a window of 16 or more tokens. Here
    the window belongs to a chunk, and attention is normalised over the chunk's keys alone.
    """

    needs_queries: ClassVar[bool] = True

    window: int = 4
    """Queries of the observation window, in tokens; at most half of the chunk is used."""
    kernel: int = 5
    """Tokens over which scores are averaged, so that neighbours stay together; an odd number."""

    def score(self, keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
        """Return (layers, heads, tokens) the attention that each token receives; infinite within the window."""
        layers, heads, tokens, head_dim = keys.shape
        window = max(1, min(self.window, tokens // 2))
        past = tokens - window
        observers = queries[:, :, past:].reshape(layers, heads, -1, window, head_dim)
        logits = observers @ keys[:, :, None].transpose(-1, -2)
        future = logits.new_ones(window, tokens).triu(past + 1).bool()
        attention = logits.masked_fill(future, -float("inf")).softmax(-1)[..., :past].mean((2, 3))
        scores = keys.new_full((layers, heads, tokens), float("inf"))
        if past:
            margin = self.kernel // 2
            padded = attention.new_zeros(layers, heads, past + 2 * margin)
            padded[..., margin : margin + past] = attention
            scores[..., :past] = padded.unfold(-1, 2 * margin + 1, 1).mean(-1)
        return scores
