"""The kernels compute the same on every kind of processor that they have code for."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from llama_models import OPTIONS, logits_of, peft_logits, text_model, tiny, token_ids

from chunkwise_lora import ChunkWiseConfig
from chunkwise_lora.backends.native import build
from chunkwise_lora.engines.llama_cpp import kernels

CHECK = Path(__file__).with_name("vectors_check.c")
FLAGS = {"this processor": ["-march=native"], "AVX2": ["-mavx2", "-mfma", "-mf16c"], "plain C": []}


@pytest.fixture(params=FLAGS)
def flags(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Compile the kernels with other flags, for this test."""
    if request.param == "AVX2" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("AVX2 is for x86")
    monkeypatch.setattr(build, "FLAGS", [[*FLAGS[request.param], "-fopenmp-simd"]])
    monkeypatch.setenv("CHUNKWISE_CACHE_DIR", str(tmp_path))
    kernels.functions.cache_clear()
    yield FLAGS[request.param]
    kernels.functions.cache_clear()


@pytest.mark.usefixtures("flags")
def test_products_and_attention_are_right() -> None:
    ids = token_ids(50)
    for factors, tolerance in (("float32", 1e-4), ("float16", 2e-2), ("int8", 0.5)):
        llm = tiny("llama", "patterns", factors=factors)
        difference = np.abs(logits_of(llm, ids, [30, 31, 34]) - peft_logits("llama", ids, "patterns"))
        assert difference.max() < tolerance
    text = token_ids(60, vocabulary=4000)
    config = ChunkWiseConfig.preset("balanced")
    exact = logits_of(text_model(chunkwise_config=config), text, range(40, 60))
    for kind in (1, 8):
        llm = text_model(chunkwise_config=config, **{**OPTIONS, "type_k": kind, "type_v": kind, "flash_attn": True})
        found = logits_of(llm, text, range(40, 60))
        assert llm._graph.attentions == 6
        assert np.abs(found - exact).max() < (5e-2 if kind == 1 else 0.5)


@pytest.mark.parametrize("target", ["host", "aarch64"])
def test_vectors_equal_plain_sums(target: str, tmp_path: Path) -> None:
    """The loads and sums of each processor against plain C. ARM runs under emulation where that is installed."""
    compiler, emulator = "cc", []
    if target == "aarch64":
        compiler, emulator = "aarch64-linux-gnu-gcc", ["qemu-aarch64-static", "-L", "/usr/aarch64-linux-gnu"]
        if shutil.which(compiler) is None or shutil.which(emulator[0]) is None:
            pytest.skip("needs Debian's gcc-aarch64-linux-gnu and qemu-user-static")
    for flags in ([], ["-march=native"], ["-mavx2", "-mfma", "-mf16c"]) if target == "host" else ([],):
        if "-mavx2" in flags and platform.machine() not in ("x86_64", "AMD64"):
            continue
        program = tmp_path / "check"
        command = [compiler, "-O3", *flags, f"-I{kernels.SOURCES[0].parent}", str(CHECK), "-o", str(program), "-lm"]
        subprocess.run(command, check=True, capture_output=True)
        found = subprocess.run([*emulator, str(program)], capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stdout
