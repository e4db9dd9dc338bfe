"""The KV policy in llama.cpp's cache, and attention over it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from llama_models import (
    OPTIONS,
    WIKI,
    Llama,
    base_file,
    logits_of,
    text_file,
    text_model,
    tiny,
    token_ids,
    transformers_text_model,
    without_kv_policy,
)

from chunkwise_lora import ChunkWiseConfig
from chunkwise_lora.engines.llama_cpp import BASE, ChunkWiseLlama
from chunkwise_lora.errors import EngineError
from chunkwise_lora.method.config import KVCacheConfig, LevelKVPolicy

F16, Q8_0 = 1, 8
VOCABULARY = 4096
IDS = token_ids(120, vocabulary=VOCABULARY)


def dropping(max_age: int) -> ChunkWiseConfig:
    """The preset balanced, in full precision, that drops easy and middling chunks after `max_age` tokens."""
    levels = (LevelKVPolicy(max_age=max_age), LevelKVPolicy(max_age=max_age), LevelKVPolicy())
    return ChunkWiseConfig(kv_cache=KVCacheConfig(levels=levels))


# Dropped positions


def test_dropped_positions_leave_the_cache_as_in_the_transformers_engine() -> None:
    config = dropping(16)
    llm, reference = text_model(), transformers_text_model()
    with llm.using("wiki", config):
        steps = llm.generate(IDS[:60], temp=0.0)
        tokens = [next(steps) for _ in range(41)]
    output = reference.generate(
        torch.tensor([IDS[:60]]),
        adapter_names="wiki",
        chunkwise_config=config,
        max_new_tokens=41,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        eos_token_id=None,
    )
    assert output.sequences[0].tolist() == [*IDS[:60], *tokens]
    assert np.abs(llm.scores[59:100] - torch.stack(output.logits, 1)[0].numpy()).max() < 2e-3
    dropped = llm.trace.kv_bytes
    with llm.using("wiki", without_kv_policy(config)):
        next(llm.generate([*IDS[:60], *tokens[:40]], temp=0.0))
    assert dropped < 0.7 * llm.trace.kv_bytes


def test_bytes_of_dropped_positions_are_free() -> None:
    llm = text_model()
    used = {}
    for max_age in (8, 1000):
        with llm.using("wiki", dropping(max_age)):
            llm.reset()
            for token in IDS:
                llm.eval([token])
        used[max_age] = llm.trace.kv_bytes
    assert used[8] < 0.6 * used[1000]
    llm = text_model(n_ctx=64)
    with llm.using("wiki", dropping(8)):
        llm.eval(IDS[:60])


def test_a_text_does_not_go_back_to_what_was_dropped() -> None:
    llm = text_model()
    with llm.using("wiki", dropping(8)):
        for token in IDS:
            llm.eval([token])
        llm.n_tokens = 50
        with pytest.raises(EngineError, match="begin it again"):
            llm.eval(IDS[50:51])
        llm.reset()
        llm.eval(IDS)


def test_after_drops_a_prompt_runs_anew() -> None:
    llm = text_model(chunkwise_config=dropping(8))
    options: dict[str, Any] = {"max_tokens": 24, "temperature": 0.0}
    first = llm.create_completion(IDS[:40], **options)["choices"][0]["text"]
    llm.create_completion(IDS[:60], **options)
    again = llm.create_completion(IDS[:40], **options)["choices"][0]["text"]
    assert again == first
    turn = [*llm.trace.sequences[0].tokens, *IDS[:8]]
    expected = text_model(chunkwise_config=dropping(8)).create_completion(turn, **options)
    assert llm.create_completion(turn, **options)["choices"][0]["text"] == expected["choices"][0]["text"]


# What is carried out


def test_the_type_of_the_cache_follows_the_config() -> None:
    compact = ChunkWiseConfig.preset("compact")
    options = {name: value for name, value in OPTIONS.items() if name not in ("type_k", "type_v")}
    llm = ChunkWiseLlama(text_file(), WIKI, chunkwise_config=compact, **options)
    assert llm.context_params.type_k == llm.context_params.type_v == Q8_0
    notes = " ".join(llm.kv_left_undone(compact.kv_cache))
    assert "near-duplicates" in notes
    assert "INT8" not in notes
    assert "full-precision" in " ".join(llm.kv_left_undone(ChunkWiseConfig.preset("lossless").kv_cache))
    llm = ChunkWiseLlama(text_file(), WIKI, chunkwise_config=ChunkWiseConfig.preset("balanced"), **options)
    assert llm.context_params.type_k == F16
    assert "type_k=8" in " ".join(llm.kv_left_undone(llm.chunkwise_config.kv_cache))
    logits_of(llm, IDS[:8])
    assert llm.trace.kv_notes == tuple(llm.kv_left_undone(llm.chunkwise_config.kv_cache))


def test_heads_that_q8_0_cannot_hold_keep_float16() -> None:
    compact = ChunkWiseConfig.preset("compact")
    llm = ChunkWiseLlama(base_file("qwen3"), chunkwise_config=compact, n_ctx=64, verbose=False)
    assert llm.context_params.type_k == F16
    assert "INT8" in " ".join(llm.kv_left_undone(compact.kv_cache))
    with pytest.raises(EngineError, match="refuses these options"):
        ChunkWiseLlama(base_file("qwen3"), type_k=Q8_0, type_v=Q8_0, flash_attn=True, n_ctx=64, verbose=False)


def test_q8_0_halves_the_bytes() -> None:
    options = {"flash_attn": True}
    bytes_of = {}
    for kind in (F16, Q8_0):
        llm = text_model(type_k=kind, type_v=kind, **options)
        logits_of(llm, IDS)
        bytes_of[kind] = llm.trace.kv_bytes
        assert llm.trace.kv_bytes_full == len(IDS) * 6 * 2 * 2 * 64 * 2
    assert bytes_of[Q8_0] < 0.56 * bytes_of[F16]


# Attention


@pytest.mark.parametrize("kind", [F16, Q8_0])
@pytest.mark.parametrize("threads", [1, 3])
def test_attention_of_one_token_is_that_of_llama_cpp(kind: int, threads: int) -> None:
    options = {**OPTIONS, "type_k": kind, "type_v": kind, "flash_attn": True, "n_threads": threads}
    llm, own = text_model(**options), Llama(text_file(), **options)
    exact = logits_of(Llama(text_file(), **OPTIONS), IDS)
    with llm.using(BASE):
        found = logits_of(llm, IDS, range(40, 120))
    assert llm._graph.attentions == 6, "one for each layer"
    expected = logits_of(own, IDS, range(40, 120))
    errors = [np.abs(logits - exact)[40:].max() for logits in (found, expected)]
    assert errors[0] < max(1.2 * errors[1], 2e-2)
    assert np.abs(found - expected).max() < 2 * errors[1] + 2e-2


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3"])
def test_attention_runs_with_other_heads_and_windows(architecture: str) -> None:
    """Groups of two query heads of width 16; the windows of `gemma3` hide cells."""
    ids = token_ids(60)
    options = {**OPTIONS, "type_k": F16, "type_v": F16, "flash_attn": True}
    llm = tiny(architecture, **options)
    with llm.using(BASE):
        found = logits_of(llm, ids, range(20, 60))
    assert llm._graph.attentions == 2
    exact = logits_of(Llama(base_file(architecture), **OPTIONS), ids)
    assert np.abs(found - exact).max() < 2e-2


def test_attention_over_a_cache_with_holes() -> None:
    options = {**OPTIONS, "type_k": F16, "type_v": F16, "flash_attn": True}
    results = []
    for chosen in (options, OPTIONS):
        llm = text_model(**chosen)
        with llm.using("wiki", dropping(8)):
            results.append(logits_of(llm, IDS, range(40, 120)))
    assert np.abs(results[0] - results[1]).max() < 5e-2
