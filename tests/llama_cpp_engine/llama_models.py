"""GGUF files of tiny models, and llama.cpp models that run them. They need llama-cpp-python."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install '.[llama-cpp]'")

import llama_cpp
from llama_cpp import Llama
from transformers import AutoModelForCausalLM

import small
from chunkwise_lora import ChunkWiseConfig, ChunkWiseModel
from chunkwise_lora.engines.llama_cpp import ChunkWiseLlama
from chunkwise_lora.method.config import KVCacheConfig, LevelKVPolicy
from gguf_bases import ARCHITECTURES, tokenizer_of, write_base
from models import VOCABULARY, adapter, build, peft_model
from small import E2E, WIKI

__all__ = ["ARCHITECTURES", "E2E", "WIKI", "Llama", "llama_cpp"]

F32 = 0
OPTIONS: dict[str, Any] = {
    "n_ctx": 256,
    "n_batch": 64,
    "n_threads": 1,  # on a busy machine a second thread only waits
    "n_threads_batch": 1,
    "logits_all": True,
    "type_k": F32,
    "type_v": F32,
    "verbose": False,
}
"""Exact: the KV cache is in float32."""
TOLERANCE = {"gemma3": 5e-3}
"""Largest difference of a logit to PEFT; by default 1e-4. llama.cpp looks up the GELU of Gemma in a float16 table."""


@cache
def folder() -> Path:
    """A folder for files that all tests share."""
    made = tempfile.mkdtemp(prefix="chunkwise-gguf-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


@cache
def base_file(architecture: str) -> str:
    """The GGUF file of a tiny random model, in float32 and without a tokenizer."""
    return str(write_base(build(architecture), architecture, folder() / f"{architecture}.gguf"))


@cache
def text_file() -> str:
    """The GGUF file of the small base model, in float32 and with its tokenizer."""
    base = AutoModelForCausalLM.from_pretrained(small.BASE, dtype=torch.float32)
    return str(write_base(base, "llama", folder() / "small.gguf", add_tokenizer=tokenizer_of(small.BASE)))


def tiny(architecture: str, kind: str = "plain", **options: Any) -> ChunkWiseLlama:
    """A tiny random model with an adapter of `models.ADAPTERS`, whose factors are exact."""
    options = {"factors": "float32", **OPTIONS, **options}
    return ChunkWiseLlama(base_file(architecture), adapter(architecture, kind), **options)


def text_model(adapters: Any = None, **options: Any) -> ChunkWiseLlama:
    """The small base model with its adapters `wiki` and `e2e`, whose factors are exact."""
    options = {"factors": "float32", **OPTIONS, **options}
    return ChunkWiseLlama(text_file(), {"wiki": WIKI, "e2e": E2E} if adapters is None else adapters, **options)


def transformers_text_model(adapters: Any = None) -> ChunkWiseModel:
    """The same as `text_model` in the transformers engine."""
    base = AutoModelForCausalLM.from_pretrained(small.BASE, dtype=torch.float32)
    return ChunkWiseModel(base, {"wiki": WIKI, "e2e": E2E} if adapters is None else adapters)


def without_kv_policy(config: ChunkWiseConfig) -> ChunkWiseConfig:
    """The same config with a cache in full precision."""
    levels = (LevelKVPolicy(),) * len(config.kv_cache.levels)
    return config.model_copy(update={"kv_cache": KVCacheConfig(levels=levels)})


def token_ids(count: int, seed: int = 0, vocabulary: int = VOCABULARY) -> list[int]:
    """Random token ids."""
    return np.random.default_rng(seed).integers(3, vocabulary, count).tolist()


def logits_of(llm: Llama, ids: Sequence[int], cuts: Sequence[int] = ()) -> np.ndarray:
    """Run a text in passes that end at `cuts`; returns (tokens, vocabulary) logits. The model must keep all logits."""
    llm.reset()
    for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        llm.eval(list(ids[start:end]))
    return llm.scores[: len(ids)].copy()


@torch.no_grad()
def peft_logits(architecture: str, ids: Sequence[int], kind: str = "plain") -> np.ndarray:
    """(tokens, vocabulary) logits of unmerged PEFT."""
    return peft_model(architecture, kind)(torch.tensor([list(ids)])).logits[0].numpy()


@torch.no_grad()
def base_logits(architecture: str, ids: Sequence[int]) -> np.ndarray:
    """(tokens, vocabulary) logits of the base model in transformers."""
    return build(architecture)(torch.tensor([list(ids)])).logits[0].numpy()
