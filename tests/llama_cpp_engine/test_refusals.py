"""What a llama.cpp model refuses, with the reason and the remedy, and that requests leave no memory behind."""

from __future__ import annotations

import gc
import resource
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_models import OPTIONS, base_file, base_logits, logits_of, peft_logits, text_model, tiny, token_ids

from chunkwise_lora import ChunkWiseConfig, RankLadder
from chunkwise_lora.backends.native import build as native_build
from chunkwise_lora.engines.llama_cpp import BASE, ChunkWiseLlama, fallback, kernels, library, selfcheck
from chunkwise_lora.errors import ChunkWiseError, ConfigError, EngineError
from chunkwise_lora.method.config import ComplexityConfig
from models import adapter


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise native_build.BuildError("no C compiler was found")

    monkeypatch.setattr(fallback, "functions", fail)


# Files and options


def test_what_is_not_a_model_is_refused(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(Path(base_file("llama")).read_bytes()[:5000])
    text = tmp_path / "model.gguf"
    text.write_text("not a model")
    for path in (damaged, text, tmp_path / "missing.gguf", tmp_path):
        with pytest.raises(EngineError, match=path.name):
            ChunkWiseLlama(str(path), **OPTIONS)


def test_options_that_cannot_work_are_refused() -> None:
    sizes = ({"n_batch": -1}, {"n_batch": 0}, {"n_ubatch": 0}, {"n_ctx": -1}, {"n_ctx": 3, "max_sequences": 4})
    for options in ({"lora_path": "adapter.gguf"}, {"draft_model": object()}, {"factors": "float64"}, *sizes):
        with pytest.raises(EngineError, match=next(iter(options))):
            tiny("llama", **options)


def test_ladders_for_another_base_are_refused() -> None:
    llm = tiny("llama")
    with pytest.raises(EngineError, match=r"adapter 'x'.*attn"):
        llm.load_adapter(adapter("gpt2"), "x")
    ladder = RankLadder.load(adapter("llama"))
    name = next(iter(ladder.modules))
    module = ladder.modules[name]
    other = replace(ladder, modules={name: replace(module, down=module.down[:, :-1])})
    with pytest.raises(EngineError, match="shape"):
        llm.load_adapter(other, "x")
    with pytest.raises(EngineError, match="replaces"):
        llm.load_adapter(adapter("llama", "saved_head"), "x")
    assert list(llm.adapters) == ["default"]
    assert np.abs(logits_of(llm, token_ids(20)) - peft_logits("llama", token_ids(20))).max() < 1e-4


def test_adapters_must_be_ladders_or_paths_with_a_name() -> None:
    llm = tiny("llama")
    for name, source, reason in (("", "x", "another name"), (BASE, "x", "another name"), ("x", 3, "give a RankLadder")):
        with pytest.raises(EngineError, match=reason):
            llm.load_adapter(source, name)
    with pytest.raises(ChunkWiseError, match="no such folder"):
        llm.load_adapter("no such folder", "x")


def test_an_unknown_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import llama_cpp

    monkeypatch.setattr(llama_cpp, "__version__", "0.3.1")
    with pytest.raises(EngineError, match=r"tested with llama-cpp-python 0.3.36, not with 0.3.1.*pip install"):
        library.check_installed()


# Requests


def test_requests_that_cannot_work_are_refused() -> None:
    llm = text_model()
    with pytest.raises(EngineError, match="'sqaud' is not loaded; loaded are wiki, e2e, __base__"):
        llm.create_completion("text", adapter="sqaud")
    with pytest.raises(EngineError, match="give a ChunkWiseConfig"):
        llm.create_chat_completion([{"role": "user", "content": "text"}], chunkwise_config="balanced")
    learned = ChunkWiseConfig(complexity=ComplexityConfig(learned=True))
    with pytest.raises(ConfigError, match="nothing learned"):
        llm.create_completion("text", chunkwise_config=learned)
    for ids in ([3, 4096], [-1]):
        with pytest.raises(EngineError, match="from 0 to 4095"):
            llm.create_completion(ids)
    with pytest.raises(ValueError, match="exceed context window"):
        llm.create_completion([5] * 256)
    llm.reset()
    llm.eval(token_ids(256))
    with pytest.raises(EngineError, match="context is full: it has room for 256 tokens"):
        llm.eval([3])
    assert llm.create_completion("The king", max_tokens=4)["choices"][0]["text"]


STRANGE: dict[str, list[Any]] = {
    "temperature": [-1.0, 1e30, float("nan")],
    "top_p": [-1.0, 0.0, 7.0, float("nan")],
    "top_k": [-5, 0, 10**6],
    "max_tokens": [-3, 0, None, 10**9],
    "stop": ["", [""], ["\ud83d"], ["x"] * 50, [3]],
    "seed": [-1, 0, 2**40],
    "prompt": ["", "\x00", "\u202e", "🦙" * 30, [], [0], [1, 1, 1]],
    "logit_bias": [{5: 1e30}, {"7": -1e30}, {"x": 1}],
}


def test_after_strange_fields_the_next_request_is_right() -> None:
    llm = text_model(logits_all=False)
    options: dict[str, Any] = {"prompt": "The king", "max_tokens": 4, "temperature": 0.0}
    expected = llm.create_completion(**options)["choices"][0]["text"]
    for field, values in STRANGE.items():
        for value in values:
            with suppress(Exception):  # whatever llama-cpp-python says to it
                llm.create_completion(**{"prompt": "The", "max_tokens": 3, field: value})
            assert llm.create_completion(**options)["choices"][0]["text"] == expected, (field, value)


# Kernels


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_the_check_at_load_knows_right_kernels_from_wrong_ones(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selfcheck, "TESTED", ())
    monkeypatch.setattr("chunkwise_lora.engines.llama_cpp.model.TESTED", ())
    ids = token_ids(20)
    assert np.abs(logits_of(tiny(architecture), ids) - peft_logits(architecture, ids)).max() < 1e-4
    right = selfcheck._rank_1

    def wrong(loaded: Any) -> Any:
        random = right(loaded)
        modules = {name: replace(factors, down=1.5 * factors.down) for name, factors in random.modules.items()}
        return replace(random, modules=modules)

    llm = tiny(architecture)
    monkeypatch.setattr(selfcheck, "_rank_1", wrong)
    with pytest.raises(EngineError, match="do not compute"):
        llm.load_adapter(adapter(architecture, seed=5), "other")
    assert np.abs(logits_of(llm, ids) - peft_logits(architecture, ids)).max() < 1e-4, "the first one still runs"
    with pytest.raises(EngineError, match=r"do not compute what llama.cpp's own LoRA computes"):
        tiny(architecture)


def test_a_module_that_the_graph_does_not_use_is_an_error() -> None:
    llm = tiny("llama")
    llm._graph._pass.module_count += 1
    with pytest.raises(EngineError, match="14 of 15 adapted modules"):
        llm.eval(token_ids(5))
    with pytest.raises(EngineError, match="load it again"):
        llm.eval(token_ids(5))


def test_tokens_that_were_not_planned_are_an_error() -> None:
    llm = tiny("llama")
    begin = llm._graph.begin
    llm._graph.begin = lambda tokens, plan: begin([token + 1 for token in tokens], plan)
    with pytest.raises(EngineError, match="other tokens than were planned"):
        llm.eval(token_ids(5))


def test_every_refusal_of_the_kernels_has_a_message() -> None:
    for code in kernels._REFUSALS:
        assert "blk.0" in str(kernels.refusal(code, b"blk.0"))


# Without kernels


def test_without_a_compiler_llama_cpps_own_lora_runs_one_rung(no_kernels: None) -> None:
    llm, ids = tiny("qwen3", "patterns"), token_ids(30)
    ladder = llm.adapters["default"]
    assert np.abs(logits_of(llm, ids, [20]) - peft_logits("qwen3", ids, "patterns")).max() < 2e-2  # factors in float16
    assert "one rung for each request" in llm.trace.kv_notes[0]
    assert "no C compiler was found" in llm.trace.kv_notes[0]
    with llm.using(BASE):
        assert np.abs(logits_of(llm, ids) - base_logits("qwen3", ids)).max() < 1e-4
    with llm.using(chunkwise_config=ChunkWiseConfig.preset("balanced")):
        logits_of(llm, ids, [20])
    shares = ChunkWiseConfig.preset("balanced").selection.rank_shares
    nearest = min(ladder.rung_ranks, key=lambda rank: abs(rank - max(shares) * ladder.rung_ranks[-1]))
    assert llm.trace.sequences[0].ranks == pytest.approx([nearest] * len(ids))
    with llm.using(chunkwise_config=ChunkWiseConfig.uniform(0)):
        assert np.abs(logits_of(llm, ids) - base_logits("qwen3", ids)).max() < 1e-4


def test_layers_on_a_gpu_run_by_llama_cpps_own_lora(caplog: pytest.LogCaptureFixture) -> None:
    llm = tiny("llama", n_gpu_layers=1)  # this llama.cpp has no GPU and ignores the layers
    assert "n_gpu_layers is 1" in caplog.text
    assert np.abs(logits_of(llm, token_ids(20)) - peft_logits("llama", token_ids(20))).max() < 2e-2


# Memory


def resident() -> int:
    """Bytes of memory that this process uses."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_thousand_requests_leave_no_memory_behind() -> None:
    llm = text_model(logits_all=False, chunkwise_config=ChunkWiseConfig.preset("balanced"))
    used = []
    for request in range(1000):
        name = ("wiki", "e2e", BASE)[request % 3]
        for _ in llm.create_completion(token_ids(6, request), adapter=name, max_tokens=2, stream=True):
            pass
        if request % 100 == 99:
            gc.collect()
            used.append(resident())
    assert used[-1] - used[1] < 4 * 2**20


def test_adapters_that_come_and_go_leave_no_memory_behind() -> None:
    llm, ladder = tiny("llama"), RankLadder.load(adapter("llama", seed=5))
    used = []
    for change in range(60):
        llm.load_adapter(ladder, "other")
        llm.delete_adapter("other")
        if change % 20 == 19:
            gc.collect()
            used.append(resident())
    assert used[-1] - used[0] < 8 * 2**20
