"""Several prompts in one batch of llama.cpp, each with its own adapter and plan."""

from __future__ import annotations

from typing import Any

import pytest
from llama_models import text_model, token_ids

from chunkwise_lora import ChunkWiseConfig
from chunkwise_lora.engines.llama_cpp import BASE, ChunkWiseLlama
from chunkwise_lora.errors import EngineError

PROMPTS = [
    " = Aldhaven = \n \n Aldhaven is a town in",
    "name[Blue Spice], eatType[coffee shop], area[city centre] ->",
    "The king said to his daughter that",
    " = History = ",
    "name[The Eagle], food[Japanese] ->",
]
ADAPTERS = ["wiki", "e2e", BASE, "e2e", "wiki"]
CONFIGS = {"lossless": None, "balanced": ChunkWiseConfig.preset("balanced"), "uniform": ChunkWiseConfig.uniform(0.5)}


@pytest.fixture(scope="module")
def llm() -> ChunkWiseLlama:
    return text_model(max_sequences=5, n_ctx=512)


def alone(llm: ChunkWiseLlama, prompt: Any, adapter: str, **options: Any) -> dict[str, Any]:
    answer = llm.create_completion(prompt, adapter=adapter, **options)["choices"][0]
    return {**answer, "ranks": llm.trace.sequences[0].ranks}


@pytest.mark.parametrize("name", CONFIGS)
def test_each_prompt_gets_what_it_gets_alone(llm: ChunkWiseLlama, name: str) -> None:
    options: dict[str, Any] = {"chunkwise_config": CONFIGS[name], "max_tokens": 24, "temperature": 0.0}
    expected = [alone(llm, prompt, adapter, **options) for prompt, adapter in zip(PROMPTS, ADAPTERS, strict=True)]
    answer = llm.create_completions(PROMPTS, adapter=ADAPTERS, **options)
    for index, choice in enumerate(expected):
        assert answer["choices"][index]["text"] == choice["text"]
        assert answer["choices"][index]["finish_reason"] == choice["finish_reason"]
        assert llm.trace.sequences[index].ranks == pytest.approx(choice["ranks"])
    assert [sequence.adapter or BASE for sequence in llm.trace.sequences] == ADAPTERS


def test_long_prompts_run_in_several_passes(llm: ChunkWiseLlama) -> None:
    prompts = [token_ids(length, seed=length, vocabulary=4000) for length in (90, 3, 64, 100)]
    options: dict[str, Any] = {"max_tokens": 6, "temperature": 0.0}
    expected = [alone(llm, prompt, "wiki", **options)["text"] for prompt in prompts]
    answer = llm.create_completions(prompts, adapter="wiki", **options)
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert answer["usage"]["prompt_tokens"] == 257
    assert 7 <= llm.trace.passes <= 12


def test_more_prompts_than_a_pass_has_room_for_take_turns() -> None:
    with pytest.raises(EngineError, match="n_batch=3: give at least 5"):
        text_model(max_sequences=5, n_ctx=512, n_batch=3)
    llm = text_model(max_sequences=5, n_ctx=512, n_batch=5)
    prompts = [token_ids(length, seed=length, vocabulary=4000) for length in (7, 3, 2, 5, 4)]
    options: dict[str, Any] = {"max_tokens": 6, "temperature": 0.0}
    expected = [alone(llm, prompt, "wiki", **options)["text"] for prompt in prompts]
    answer = llm.create_completions(prompts, adapter="wiki", **options)
    assert [choice["text"] for choice in answer["choices"]] == expected


def test_stop_strings_and_seeds(llm: ChunkWiseLlama) -> None:
    options: dict[str, Any] = {"adapter": "wiki", "max_tokens": 16, "temperature": 1.0}
    texts = [choice["text"] for choice in llm.create_completions([PROMPTS[0]] * 3, seed=5, **options)["choices"]]
    assert len(set(texts)) == 3
    assert [
        choice["text"] for choice in llm.create_completions([PROMPTS[0]] * 3, seed=5, **options)["choices"]
    ] == texts
    stop = texts[1][5:8]
    stopped = llm.create_completions([PROMPTS[0]] * 3, seed=5, stop=stop, **options)["choices"]
    assert stopped[1]["text"] == texts[1][: texts[1].index(stop)]
    assert stopped[1]["finish_reason"] == "stop"


def test_after_a_batch_single_requests_are_right(llm: ChunkWiseLlama) -> None:
    options: dict[str, Any] = {"max_tokens": 8, "temperature": 0.0}
    expected = alone(llm, PROMPTS[1], "e2e", **options)["text"]
    llm.create_completions(PROMPTS[:2], adapter="wiki", **options)
    assert alone(llm, PROMPTS[1], "e2e", **options)["text"] == expected


def test_batches_that_cannot_work_are_refused(llm: ChunkWiseLlama) -> None:
    with pytest.raises(EngineError, match="6 prompts, but max_sequences is 5"):
        llm.create_completions(["text"] * 6)
    with pytest.raises(EngineError, match="2 names for 3 prompts"):
        llm.create_completions(["text"] * 3, adapter=["wiki", "e2e"])
    with pytest.raises(EngineError, match="not loaded"):
        llm.create_completions(["text"], adapter=["x"])
    with pytest.raises(EngineError, match="empty"):
        llm.create_completions(["text", []])
    with pytest.raises(EngineError, match="max_tokens=0: give at least 1"):
        llm.create_completions(["text"], max_tokens=0)
    with pytest.raises(EngineError, match="larger n_ctx"):
        llm.create_completions(["text"] * 4, max_tokens=200)
    with pytest.raises(EngineError, match="max_sequences=0"):
        text_model(max_sequences=0)
