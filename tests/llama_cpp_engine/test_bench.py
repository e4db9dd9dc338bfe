"""`chunkwise bench --engine llama-cpp`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from llama_models import ARCHITECTURES, base_file, text_file

from chunkwise_lora.benchmark.llama_cpp import random_ladder
from chunkwise_lora.engines.llama_cpp import ChunkWiseLlama
from chunkwise_lora.engines.llama_cpp.base_model import base_of
from chunkwise_lora.ladder.gguf import place


def test_bench_compares_with_llama_cpps_own_lora(run: Any, tmp_path: Path) -> None:
    lists = ("--contexts", 16, 32, "--presets", "lossless", "balanced")
    options = ("--model", text_file(), "--rounds", 2, "--new-tokens", 4, "--json", tmp_path / "b.json")
    for adapter in (("--adapter", "wiki"), ("--rank", 4)):
        code, out, error = run("bench", "--engine", "llama-cpp", *lists, *options, *adapter)
        assert code == 0, error
        assert "ChunkWise balanced" in out
        results = json.loads((tmp_path / "b.json").read_text())["results"]
        assert [result["context"] for result in results] == [16] * 4 + [32] * 4
        assert results[0]["decode_over_base"] == results[1]["decode_over_own"] == 1


def test_bench_refuses_what_it_cannot_measure(run: Any, tmp_path: Path) -> None:
    for options, reason in (
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
