"""Requests to a llama.cpp model with adapters: text, chat, streams, states, embeddings, and what they leave behind."""

from __future__ import annotations

import pickle
from functools import cache
from typing import Any

import numpy as np
import pytest
from llama_models import (
    E2E,
    OPTIONS,
    WIKI,
    Llama,
    base_file,
    llama_cpp,
    logits_of,
    text_file,
    text_model,
    tiny,
    token_ids,
)

from chunkwise_lora import ChunkWiseConfig
from chunkwise_lora.engines.llama_cpp import BASE, ChunkWiseLlama
from chunkwise_lora.errors import EngineError
from models import adapter

PROMPT = " = Aldhaven = \n \n Aldhaven is a town in"
FACTS = "name[Blue Spice], eatType[coffee shop], area[city centre] ->"
GREEDY: dict[str, Any] = {"max_tokens": 16, "temperature": 0.0}
BALANCED, HALF = ChunkWiseConfig.preset("balanced"), ChunkWiseConfig.uniform(0.5)


@pytest.fixture(scope="module")
def llm() -> ChunkWiseLlama:
    return text_model()


@cache
def fresh(prompt: str, adapter: str, config: ChunkWiseConfig | None = None) -> str:
    """The text of a model that has run nothing before."""
    return text(text_model(), prompt, adapter=adapter, chunkwise_config=config)


def text(llm: ChunkWiseLlama, prompt: str, **options: Any) -> str:
    return llm.create_completion(prompt, **{**GREEDY, **options})["choices"][0]["text"]


# Text


def test_adapters_take_turns(llm: ChunkWiseLlama) -> None:
    expected = {name: fresh(PROMPT, name) for name in ("wiki", "e2e", BASE)}
    assert len(set(expected.values())) == 3
    for name in ("wiki", "e2e", "wiki", BASE, "e2e"):
        assert text(llm, PROMPT, adapter=name) == expected[name]
        assert llm.trace.sequences[0].adapter == (None if name == BASE else name)


def test_without_an_adapter_the_text_is_that_of_llama_cpp(llm: ChunkWiseLlama) -> None:
    plain = Llama(text_file(), **OPTIONS)
    assert text(llm, FACTS, adapter=BASE) == plain.create_completion(FACTS, **GREEDY)["choices"][0]["text"]


def test_the_first_adapter_is_the_default(llm: ChunkWiseLlama) -> None:
    assert text(llm, PROMPT) == text(llm, PROMPT, adapter="wiki")
    assert llm(PROMPT, adapter="e2e", **GREEDY)["choices"][0]["text"] == text(llm, PROMPT, adapter="e2e")


def test_a_stream_gives_the_text_in_pieces(llm: ChunkWiseLlama) -> None:
    for config in (None, BALANCED):
        expected = text(llm, FACTS, adapter="e2e", chunkwise_config=config)
        pieces = llm.create_completion(FACTS, adapter="e2e", chunkwise_config=config, stream=True, **GREEDY)
        assert "".join(piece["choices"][0]["text"] for piece in pieces) == expected


def test_stop_strings_and_seeds(llm: ChunkWiseLlama) -> None:
    whole = text(llm, FACTS, adapter="e2e")
    assert text(llm, FACTS, adapter="e2e", stop=whole[4:8]) == whole[: whole.index(whole[4:8])]
    options = {"adapter": "wiki", "temperature": 1.0, "max_tokens": 24}
    assert text(llm, PROMPT, seed=1, **options) == text(llm, PROMPT, seed=1, **options)
    assert text(llm, PROMPT, seed=1, **options) != text(llm, PROMPT, seed=2, **options)


def test_log_probabilities_and_logits_processors(llm: ChunkWiseLlama) -> None:
    answer = llm.create_completion(PROMPT, adapter="wiki", logprobs=3, **GREEDY)
    assert len(answer["choices"][0]["logprobs"]["top_logprobs"]) == 16
    seen = []

    def forbid(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        seen.append(len(ids))
        scores[:300] = -np.inf
        return scores

    llm.create_completion(PROMPT, adapter="wiki", logits_processor=llama_cpp.LogitsProcessorList([forbid]), **GREEDY)
    assert len(seen) == 16
    assert min(llm.trace.sequences[0].tokens[-15:]) >= 300


def test_chat_runs_as_its_rendered_prompt(llm: ChunkWiseLlama) -> None:
    messages = [{"role": "user", "content": "Where is Aldhaven?"}]
    rendered = "user: Where is Aldhaven?\nassistant:"
    for name in ("wiki", "e2e"):
        answer = llm.create_chat_completion(messages, adapter=name, **GREEDY)
        assert llm.trace.sequences[0].adapter == name
        assert answer["choices"][0]["message"]["content"] == text(llm, rendered, adapter=name)
        pieces = llm.create_chat_completion(messages, adapter=name, stream=True, **GREEDY)
        streamed = "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces)
        assert streamed == answer["choices"][0]["message"]["content"]


def test_a_stream_keeps_its_adapter_whatever_is_called_between_its_pieces(llm: ChunkWiseLlama) -> None:
    expected = text(llm, FACTS, adapter="e2e")
    stream = llm.create_completion(FACTS, adapter="e2e", stream=True, **GREEDY)
    pieces = []
    for piece in stream:
        pieces.append(piece["choices"][0]["text"])
        with llm.using("wiki"):
            llm.tokenize(b"something else")
    assert "".join(pieces) == expected


def test_a_stream_that_another_request_interrupts_is_refused(llm: ChunkWiseLlama) -> None:
    stream = llm.create_completion(FACTS, adapter="e2e", stream=True, **GREEDY)
    next(stream)
    assert text(llm, PROMPT, adapter="wiki") == fresh(PROMPT, "wiki")
    with pytest.raises(EngineError, match="another request began"):
        list(stream)
    state = llm.save_state()
    stream = llm.create_completion(FACTS, adapter="e2e", stream=True, **GREEDY)
    next(stream)
    llm.load_state(state)
    with pytest.raises(EngineError, match="another request began"):
        list(stream)


def test_a_stream_that_an_embedding_interrupts_is_refused() -> None:
    llm = text_model(embedding=True)
    stream = llm.create_completion(PROMPT, adapter="wiki", stream=True, **GREEDY)
    next(stream)
    llm.embed("a text")
    with pytest.raises(EngineError, match="another request began"):
        list(stream)


def test_what_a_call_leaves_open_is_that_of_the_block_around_it(llm: ChunkWiseLlama) -> None:
    with llm.using("e2e", BALANCED):
        for options, adapter, config in (
            ({}, "e2e", BALANCED),
            ({"adapter": "wiki"}, "wiki", BALANCED),
            ({"config": HALF}, "e2e", HALF),
            ({"adapter": BASE}, BASE, BALANCED),
        ):
            request = llm.request(**options)
            assert (request.adapter.name or BASE, request.config) == (adapter, config)
    with llm.using(BASE):
        assert llm.request(config=HALF).adapter.name == ""


def test_a_stream_that_is_given_up_leaves_nothing_behind(llm: ChunkWiseLlama) -> None:
    stream = llm.create_completion(FACTS, adapter="e2e", stream=True, **GREEDY)
    next(stream)
    stream.close()
    assert text(llm, PROMPT) == fresh(PROMPT, "wiki")


# What a request may use again


@pytest.mark.parametrize("config", [None, BALANCED], ids=["lossless", "balanced"])
def test_an_answer_does_not_depend_on_what_ran_before(llm: ChunkWiseLlama, config: ChunkWiseConfig | None) -> None:
    first = text(llm, PROMPT, adapter="wiki", chunkwise_config=config)
    turn = PROMPT + first + " It has"
    expected = fresh(turn, "wiki", config)
    for before in ("wiki", "e2e", BASE):
        text(llm, PROMPT, adapter=before, chunkwise_config=config)
        assert text(llm, turn, adapter="wiki", chunkwise_config=config) == expected
    text(llm, turn, adapter="wiki", chunkwise_config=ChunkWiseConfig.uniform(0.25))
    assert text(llm, turn, adapter="wiki", chunkwise_config=config) == expected


def test_a_prefix_with_the_same_plan_runs_only_once(llm: ChunkWiseLlama) -> None:
    prompt = llm.tokenize(PROMPT.encode())
    llm.create_completion(prompt, adapter="wiki", **GREEDY)
    turn = [*llm.trace.sequences[0].tokens, *prompt]
    reused = len(llm.trace.sequences[0].tokens)
    evaluated: list[int] = []
    decode = llm._ctx.decode
    llm._ctx.decode = lambda batch: (evaluated.append(batch.n_tokens()), decode(batch))
    try:
        llm.create_completion(turn, adapter="wiki", max_tokens=1, temperature=0.0)
        assert evaluated == [len(turn) - reused]
        evaluated.clear()
        llm.create_completion(turn, adapter="e2e", max_tokens=1, temperature=0.0)
        assert sum(evaluated) == len(turn), "another adapter has other keys and values"
    finally:
        llm._ctx.decode = decode


def test_generated_tokens_are_planned_again_as_a_prompt() -> None:
    llm = text_model(chunkwise_config=BALANCED)
    prompt = llm.tokenize(PROMPT.encode())
    llm.create_completion(prompt, max_tokens=40, temperature=0.0)
    first = llm.trace.sequences[0]
    turn = [*first.tokens, *prompt]
    llm.create_completion(turn, max_tokens=1, temperature=0.0)
    second = llm.trace.sequences[0]
    other = text_model(chunkwise_config=BALANCED)
    other.create_completion(turn, max_tokens=1, temperature=0.0)
    assert second.ranks == other.trace.sequences[0].ranks
    assert second.ranks[: len(first.ranks)] != first.ranks, "entropies are not known for prompts"
    assert np.abs(llm.scores[len(turn) - 1] - other.scores[len(turn) - 1]).max() < 1e-4


# States


def test_a_saved_state_continues_its_text() -> None:
    llm, ids = tiny("qwen3", chunkwise_config=BALANCED), token_ids(60)
    expected = logits_of(llm, ids, range(20, 60))
    ranks = llm.trace.sequences[0].ranks
    logits_of(llm, ids[:40], range(20, 40))
    state = llm.save_state()
    logits_of(llm, token_ids(50, seed=9))
    for restored in (state, pickle.loads(pickle.dumps(state))):
        llm.load_state(restored)
        for token in ids[40:]:
            llm.eval([token])
        assert np.abs(llm.scores[40:60] - expected[40:]).max() < 1e-4
        assert llm.trace.sequences[0].ranks == ranks


def test_a_state_without_its_adapter_is_refused() -> None:
    llm, ids = tiny("qwen3"), token_ids(20)
    logits_of(llm, ids)
    state = llm.save_state()
    llm.load_adapter(adapter("qwen3", seed=5), "default")
    with pytest.raises(EngineError, match="not loaded"):
        llm.load_state(state)
    llm.load_adapter(adapter("qwen3"), "default")
    llm.load_state(state)
    with pytest.raises(EngineError, match="not saved by a model with adapters"):
        llm.load_state(Llama.save_state(llm))


def test_a_cache_of_states_gives_the_right_adapters_text() -> None:
    llm = text_model()
    expected = {name: text(llm, PROMPT, adapter=name) for name in ("wiki", "e2e")}
    llm.set_cache(llama_cpp.LlamaRAMCache())
    for name in ("wiki", "e2e", "wiki", "e2e"):
        assert text(llm, PROMPT, adapter=name) == expected[name]
        text(llm, FACTS, adapter=name)
    llm.load_adapter(E2E, "wiki")
    assert text(llm, PROMPT, adapter="wiki") == expected["e2e"]


def test_a_copy_by_pickle_has_the_adapters() -> None:
    llm = text_model(chunkwise_config=ChunkWiseConfig.uniform(0.5))
    copied = pickle.loads(pickle.dumps(llm))
    assert list(copied.adapters) == ["wiki", "e2e"]
    assert text(copied, FACTS, adapter="e2e") == text(llm, FACTS, adapter="e2e")


# Adapters


def test_adapters_are_loaded_replaced_and_deleted(llm: ChunkWiseLlama) -> None:
    texts = {name: text(llm, PROMPT, adapter=name) for name in ("wiki", "e2e", BASE)}
    other = text_model({})
    assert other.adapters == {}
    assert text(other, PROMPT) == texts[BASE]
    other.load_adapter(WIKI, "one")
    assert text(other, PROMPT) == texts["wiki"]
    other.load_adapter(E2E, "two")
    assert [text(other, PROMPT, adapter=name) for name in ("one", "two")] == [texts["wiki"], texts["e2e"]]
    other.load_adapter(E2E, "one")
    assert text(other, PROMPT, adapter="one") == texts["e2e"]
    assert other.trace is not None
    other.delete_adapter("one")
    assert other.trace.sequences[0].adapter == "one", "the trace of the last request stays"
    with pytest.raises(EngineError, match="'one' is not loaded; loaded are two, __base__"):
        text(other, PROMPT, adapter="one")
    assert text(other, PROMPT, adapter="two") == texts["e2e"]


def test_a_change_of_adapters_ends_a_running_text(llm: ChunkWiseLlama) -> None:
    other = text_model()
    stream = other.create_completion(FACTS, adapter="e2e", stream=True, **GREEDY)
    next(stream)
    other.load_adapter(WIKI, "third")
    with pytest.raises(EngineError, match="another request began"):
        list(stream)
    with other.using("third"):
        found = logits_of(other, token_ids(12))
        other.delete_adapter("third")
    assert other.n_tokens == 0
    with llm.using("wiki"):
        assert np.abs(logits_of(llm, token_ids(12)) - found).max() < 1e-4


def test_an_adapter_of_other_modules_beside_it_changes_nothing() -> None:
    ids = token_ids(30)
    both = ChunkWiseLlama(
        base_file("llama"),
        {name: adapter("llama", name) for name in ("plain", "one_layer", "wide")},
        factors="float32",
        **OPTIONS,
    )
    for name in ("plain", "one_layer", "wide", "plain"):
        with both.using(name):
            found = logits_of(both, ids, [15, 16])
        assert np.abs(found - logits_of(tiny("llama", name), ids)).max() < 1e-4


# Embeddings


def test_embeddings_are_those_of_the_adapter() -> None:
    options = {"embedding": True, "logits_all": False, "pooling_type": llama_cpp.LLAMA_POOLING_TYPE_MEAN}
    llm = text_model(**options)
    texts = [PROMPT, "The church was built"]
    by_adapter = {name: np.array(llm.embed(texts, adapter=name)) for name in ("wiki", "e2e", BASE)}
    assert llm.trace.sequences[0].adapter is None
    assert len(llm.trace.sequences) == 2
    plain = Llama(text_file(), **{**OPTIONS, **options})
    assert np.allclose(by_adapter[BASE], plain.embed(texts), atol=1e-4)
    assert np.abs(by_adapter["wiki"] - by_adapter["e2e"]).max() > 0.1
    one = llm.create_embedding(PROMPT, adapter="wiki")["data"][0]["embedding"]
    assert np.allclose(one, by_adapter["wiki"][0], atol=1e-4)
