"""`chunkwise bench --engine llama-cpp`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_models import ARCHITECTURES, base_file, text_file
from transformers import LlamaConfig

import small
from chunkwise_lora.benchmark.llama_cpp import random_ladder
from chunkwise_lora.benchmark.random_gguf import write_random_gguf
from chunkwise_lora.benchmark.shapes import SHAPES
from chunkwise_lora.engines.llama_cpp import ChunkWiseLlama
from chunkwise_lora.engines.llama_cpp.base_model import base_of
from chunkwise_lora.ladder.gguf import place


def tiny_shape(tied: bool) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )


def test_bench_compares_with_llama_cpps_own_lora(run: Any, tmp_path: Path) -> None:
    lists = ("--contexts", 16, 32, "--presets", "lossless", "balanced")
    options = ("--model", text_file(), "--rounds", 2, "--new-tokens", 4, "--json", tmp_path / "b.json")
    for adapter in (("--adapter", "wiki"), ("--rank", 4)):
        code, out, error = run("bench", "--engine", "llama-cpp", *lists, *options, *adapter)
        assert code == 0, error
        assert "ChunkWise balanced" in out
        results = json.loads((tmp_path / "b.json").read_text())["results"]
        assert [result["context"] for result in results] == [16] * 5 + [32] * 5
        assert results[1]["decode_over_base"] == results[2]["decode_over_own"] == 1


def test_bench_runs_several_adapters_in_a_batch(run: Any, tmp_path: Path) -> None:
    lists = ("--contexts", 16, "--presets", "lossless", "--batch", 1, 3, "--adapters", 2, "--rank", 4)
    options = ("--model", text_file(), "--rounds", 1, "--new-tokens", 2, "--factors", "int8")
    code, out, error = run("bench", "--engine", "llama-cpp", *lists, *options, "--json", tmp_path / "b.json")
    assert code == 0, error
    assert "context 16, batch 3" in out
    results = json.loads((tmp_path / "b.json").read_text())["results"]
    assert [result["batch"] for result in results] == [1] * 4 + [3] * 4


def test_sequences_of_one_adapter_run_in_contexts_of_their_own(run: Any) -> None:
    lists = ("--contexts", 200, "--presets", "lossless", "--batch", 3)
    code, _, error = run(
        *("bench", "--engine", "llama-cpp", *lists, "--model", text_file(), "--rounds", 1, "--new-tokens", 60)
    )
    assert code == 0, error  # three of them do not fit into one


def test_bench_measures_the_policy_of_a_calibrated_ladder(run: Any, tmp_path: Path) -> None:
    small.calibrated().save_pretrained(tmp_path / "ladder")
    lists = ("--contexts", 16, "--presets", "lossless", "--adapter", tmp_path / "ladder")
    options = ("--model", text_file(), "--rounds", 1, "--new-tokens", 2)
    code, out, error = run("bench", "--engine", "llama-cpp", *lists, *options)
    assert code == 0, error
    assert "ChunkWise calibrated" in out


def test_bench_measures_random_weights_in_a_known_shape(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "135M", tiny_shape(tied=True))
    lists = ("--contexts", 16, "--presets", "lossless", "--random-weights", "135M", "--rank", 4)
    code, out, error = run("bench", "--engine", "llama-cpp", *lists, "--rounds", 1, "--new-tokens", 2)
    assert code == 0, error
    assert "ChunkWise lossless" in out


def test_random_weights_are_a_model_of_the_shape(tmp_path: Path) -> None:
    shape = tiny_shape(tied=False)
    llm = ChunkWiseLlama(str(write_random_gguf(shape, tmp_path / "m.gguf")), n_ctx=32, verbose=False, logits_all=True)
    llm.eval([3, 4, 5])
    assert np.isfinite(llm.scores[:3]).all()
    assert llm.scores[:3].std() > 0
    shapes = base_of(llm).shapes
    assert shapes is not None
    assert (shapes["blk.1.attn_k.weight"], shapes["output.weight"]) == ((64, 128), (64, 128))


def test_bench_refuses_what_it_cannot_measure(run: Any, tmp_path: Path) -> None:
    for options, reason in (
        (("--engine", "llama-cpp", "--dtype", "float32"), "--dtype belongs to --engine transformers"),
        (("--engine", "transformers", "--factors", "int8"), "--factors belongs to --engine llama-cpp"),
        (("--engine", "llama-cpp", "--adapter", "wiki", "--adapters", 2), "leave out --adapter"),
        (("--engine", "llama-cpp", "--adapter", "wiki", "--rank", 4), "--rank is for random adapters"),
        (("--rank", 4), "--rank is for random adapters; it needs --random-weights"),
        (("--random-weights", "135M", "--model", "x"), "stands for --model"),
        (("--random-weights", "135M", "--adapter", "wiki"), "leave out --adapter"),
        (("--engine", "llama-cpp", "--random-weights", "2B"), "choose one of 135M"),
        (("--engine", "llama"), "choose transformers or llama-cpp"),
        (("--engine", "llama-cpp", "--model", tmp_path / "missing.gguf"), "missing.gguf"),
        (("--engine", "llama-cpp", "--model", base_file("llama"), "--adapter", "wikki"), "wikki"),
    ):
        code, _, error = run("bench", *options)
        assert code == 1
        assert reason in error


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_random_adapter_has_all_linear_modules(architecture: str) -> None:
    base = base_of(ChunkWiseLlama(base_file(architecture), n_ctx=32, verbose=False))
    assert base.shapes is not None
    linear = {name for name in base.shapes if name.startswith("blk.") and "norm" not in name and ".bias" not in name}
    assert place(random_ladder(base, 4), base).keys() == linear
