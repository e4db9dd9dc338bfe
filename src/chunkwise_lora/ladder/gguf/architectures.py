"""How llama.cpp stores the linear modules of each architecture of the transformers library.

Most modules only get another name. In some architectures llama.cpp also expects the rows (outputs) of a module in
another order. Then the rows of `up` need this order too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

RowOrder = Callable[[int, int, int], Tensor]
"""(rows, query heads, key-value heads) -> (rows,) int64: for each row of llama.cpp's tensor, its row in transformers.
It fails if the rows cannot be divided by the heads."""


def _neighbours(rows: int, heads: int) -> Tensor:
    """Put row i of each head next to row i + half: transformers rotates these pairs, llama.cpp rotates neighbours."""
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def _query_rows(rows: int, heads: int, kv_heads: int) -> Tensor:
    return _neighbours(rows, heads)


def _key_rows(rows: int, heads: int, kv_heads: int) -> Tensor:
    return _neighbours(rows, kv_heads)


def _fused_rows(rows: int, heads: int, kv_heads: int) -> Tensor:
    """Collect queries, keys and values, which transformers keeps together for each key-value head."""
    per_kv_head = heads // kv_heads
    groups = torch.arange(rows).view(kv_heads, per_kv_head + 2, -1)
    return torch.cat([part.flatten() for part in groups.split([per_kv_head, 1, 1], dim=1)])


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp."""

    name: str
    """Its name in GGUF files (`general.architecture`)."""
    row_orders: Mapping[str, RowOrder] = field(default_factory=dict)
    """By the last part of a tensor's name, such as `attn_q`: the order of its rows, where it differs."""


def _rotated(name: str) -> Architecture:
    return Architecture(name, {"attn_q": _query_rows, "attn_k": _key_rows})


def _fused(name: str) -> Architecture:
    return Architecture(name, {"attn_qkv": _fused_rows})


ARCHITECTURES = {
    "apertus": Architecture("apertus"),
    "arcee": _rotated("arcee"),
    "bloom": _fused("bloom"),
    "cohere": Architecture("command-r"),
    "cohere2": Architecture("cohere2"),
    "ernie4_5": Architecture("ernie4_5"),
    "exaone4": Architecture("exaone4"),
    "falcon": _fused("falcon"),
    "gemma": Architecture("gemma"),
    "gemma2": Architecture("gemma2"),
    "gemma3_text": Architecture("gemma3"),
    "glm4": Architecture("glm4"),
    "glm4_moe": Architecture("glm4moe"),
    "gpt2": Architecture("gpt2"),
    "gpt_bigcode": Architecture("starcoder"),
    "gpt_neox": _fused("gptneox"),
    "gpt_oss": Architecture("gpt-oss"),
    "granite": _rotated("granite"),
    "granitemoe": _rotated("granitemoe"),
    "hunyuan_v1_dense": Architecture("hunyuan-dense"),
    "llama": _rotated("llama"),
    "ministral3": _rotated("mistral3"),
    "mistral": _rotated("llama"),
    "mistral3": _rotated("mistral3"),
    "mixtral": _rotated("llama"),
    "nemotron": Architecture("nemotron"),
    "olmo": _rotated("olmo"),
    "olmo2": Architecture("olmo2"),
    "olmo3": Architecture("olmo2"),
    "olmoe": Architecture("olmoe"),
    "phi": Architecture("phi2"),
    "phi3": Architecture("phi3"),
    "qwen2": Architecture("qwen2"),
    "qwen2_5_vl": Architecture("qwen2vl"),
    "qwen2_moe": Architecture("qwen2moe"),
    "qwen2_vl": Architecture("qwen2vl"),
    "qwen3": Architecture("qwen3"),
    "qwen3_moe": Architecture("qwen3moe"),
    "qwen3_vl": Architecture("qwen3vl"),
    "seed_oss": Architecture("seed_oss"),
    "smollm3": _rotated("smollm3"),
    "stablelm": Architecture("stablelm"),
    "starcoder2": Architecture("starcoder2"),
}
"""By the `model_type` in transformers: of the whole model, or else of the text model in it."""
