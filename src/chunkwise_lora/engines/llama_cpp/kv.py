"""The KV policy in llama.cpp's cache: its type, and which positions leave it.

llama.cpp keeps all keys and values of a context in one type. So INT8 (`q8_0`) is for all tokens or for none. A position
that leaves the cache frees its cell for a later token; no other position moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_cpp import llama_cpp

from chunkwise_lora.method.config import ChunkWiseConfig, KVCacheConfig
from chunkwise_lora.method.kv_policy import KVDecision

Q8_0 = 8
"""The type in ggml: blocks of 32 INT8 codes with a scale."""


def type_options(config: ChunkWiseConfig | None) -> dict[str, Any]:
    """Return options of `llama_cpp.Llama` for a config: a q8_0 cache if all its levels store INT8."""
    if config is None or any(level.precision != "int8" for level in config.kv_cache.levels):
        return {}
    return {"type_k": Q8_0, "type_v": Q8_0, "flash_attn": True}


def carry_out(llm: Any, sequence: int, decisions: Sequence[KVDecision]) -> list[tuple[int, int]]:
    """Drop the positions that `decisions` drop, and return them as (start, end)."""
    dropped = []
    for decision in decisions:
        if decision.action == "drop":
            memory = llama_cpp.llama_get_memory(llm.ctx)
            if llama_cpp.llama_memory_seq_rm(memory, sequence, decision.start, decision.end):
                dropped.append((decision.start, decision.end))
    return dropped


def left_undone(llm: Any, config: KVCacheConfig) -> list[str]:
    """Return the parts of a KV policy that the model's context does not carry out, and the reasons."""
    notes = []
    wants = {level.precision == "int8" for level in config.levels}
    is_int8 = llm.context_params.type_k == Q8_0 and llm.context_params.type_v == Q8_0
    if True in wants and not is_int8:
        notes.append(
            "INT8 keys and values: llama.cpp's cache has one type for all tokens, and this one is not q8_0; load the "
            "model with type_k=8, type_v=8 and flash_attn=True"
        )
    if False in wants and is_int8:
        notes.append("full-precision keys and values: all tokens are in the q8_0 cache that this model was loaded with")
    if any(level.duplicate_similarity is not None for level in config.levels):
        notes.append("near-duplicates: llama.cpp does not show the keys in its cache, so these tokens stay")
    for name in sorted({level.evict for level in config.levels if level.evict is not None}):
        notes.append(f"{name}: llama.cpp does not show the keys in its cache, so these tokens stay")
    return notes


def used_bytes(llm: Any, sequence: int) -> int:
    """Return the bytes of a sequence's keys and values, measured by llama.cpp."""
    return int(llama_cpp.llama_state_seq_get_size(llm.ctx, sequence))


def reserved_bytes(llm: Any) -> int:
    """Return the bytes that llama.cpp has reserved for the keys and values of the whole context."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    kinds = (llm.context_params.type_k, llm.context_params.type_v)
    sizes = (GGML_QUANT_SIZES[GGMLQuantizationType(kind)] for kind in kinds)
    per_head = sum(width * size / block for width, (block, size) in zip(head_widths(llm), sizes, strict=True))
    return int(llm.n_ctx() * _kv_heads(llm) * per_head)


def head_widths(llm: Any) -> tuple[int, int]:
    """Return the numbers of a key and of a value per head."""
    architecture = llm.metadata.get("general.architecture")
    width = llama_cpp.llama_model_n_embd(llm.model) // llama_cpp.llama_model_n_head(llm.model)
    key, value = (llm.metadata.get(f"{architecture}.attention.{side}_length", width) for side in ("key", "value"))
    return int(key), int(value)


def full_bytes_per_token(llm: Any) -> int:
    """Return the bytes that the keys and values of a token take in float16, llama.cpp's default, over all layers."""
    return 2 * sum(head_widths(llm)) * _kv_heads(llm)


def _kv_heads(llm: Any) -> int:
    """Return the number of key-value heads of all layers."""
    return int(llama_cpp.llama_model_n_head_kv(llm.model) * llama_cpp.llama_model_n_layer(llm.model))
