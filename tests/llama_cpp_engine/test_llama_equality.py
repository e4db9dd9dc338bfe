"""In llama.cpp, full rank gives the logits of PEFT, of llama.cpp's own LoRA and of the base model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from llama_models import (
    ARCHITECTURES,
    OPTIONS,
    TOLERANCE,
    Llama,
    base_file,
    base_logits,
    logits_of,
    peft_logits,
    text_model,
    tiny,
    token_ids,
    transformers_text_model,
)

from chunkwise_lora import ChunkWiseConfig, RankLadder
from chunkwise_lora.engines.llama_cpp import BASE
from chunkwise_lora.ladder.gguf import write_gguf
from models import ADAPTERS, adapter

IDS = token_ids(40)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lossless_matches_peft(architecture: str) -> None:
    llm, expected = tiny(architecture), peft_logits(architecture, IDS)
    assert np.abs(expected - base_logits(architecture, IDS)).max() > 1, "the adapter must matter"
    for cuts in ([], range(1, 40), [1, 9, 30]):
        assert np.abs(logits_of(llm, IDS, list(cuts)) - expected).max() < TOLERANCE.get(architecture, 1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_an_adapter_the_base_model_runs(architecture: str) -> None:
    llm = tiny(architecture)
    with llm.using(BASE):
        found = logits_of(llm, IDS, [20])
    assert np.abs(found - base_logits(architecture, IDS)).max() < TOLERANCE.get(architecture, 1e-4)


@pytest.mark.parametrize("kind", [kind for kind in ADAPTERS if not kind.startswith(("saved", "tied", "lm_head"))])
def test_every_kind_of_adapter_matches_peft(kind: str) -> None:
    assert np.abs(logits_of(tiny("qwen3", kind), IDS, [20, 21]) - peft_logits("qwen3", IDS, kind)).max() < 1e-4


@pytest.mark.parametrize("rung", [2, 5, 8])
def test_a_rung_matches_llama_cpps_own_lora(tmp_path: Path, rung: int) -> None:
    ladder = RankLadder.load(adapter("llama", "patterns"))
    share = ladder.rung_ranks[rung] / ladder.rung_ranks[-1]
    write_gguf(ladder.truncated(share), tmp_path / "adapter.gguf", base=base_file("llama"))
    own = Llama(base_file("llama"), lora_path=str(tmp_path / "adapter.gguf"), **OPTIONS)
    llm = tiny("llama", "patterns", chunkwise_config=ChunkWiseConfig.uniform(share))
    for cuts in ([], [39]):
        assert np.abs(logits_of(llm, IDS, cuts) - logits_of(own, IDS, cuts)).max() < 1e-4


@pytest.mark.parametrize(("factors", "tolerance"), [("float16", 2e-2), ("int8", 0.5)])
def test_short_factors_round_and_nothing_else(factors: str, tolerance: float) -> None:
    difference = np.abs(logits_of(tiny("llama", factors=factors), IDS, [20, 21]) - peft_logits("llama", IDS))
    assert 0 < difference.max() < tolerance


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_the_number_of_threads_does_not_matter(threads: int) -> None:
    llm = tiny("llama", "patterns", n_threads=threads, n_threads_batch=threads)
    assert np.abs(logits_of(llm, IDS, [20, 21, 24]) - peft_logits("llama", IDS, "patterns")).max() < 1e-4


@pytest.mark.parametrize("name", ["wiki", "e2e"])
def test_greedy_text_is_that_of_the_transformers_engine(name: str) -> None:
    llm, reference = text_model(), transformers_text_model()
    prompt = llm.tokenize(b" = Aldhaven = \n \n Aldhaven is a town in")
    found = llm.create_completion(prompt, max_tokens=48, temperature=0.0, adapter=name)
    output = reference.generate(torch.tensor([prompt]), adapter_names=name, max_new_tokens=48, do_sample=False)
    assert llm.trace is not None
    assert list(llm.trace.sequences[0].tokens) == output[0, :-1].tolist()  # the last one was sampled, but not run
    assert found["choices"][0]["text"].encode() == llm.detokenize(output[0, len(prompt) :].tolist())
