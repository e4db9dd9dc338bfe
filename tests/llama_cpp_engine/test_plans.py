"""In llama.cpp, tokens run by the plan of the method: the same one as in the transformers engine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from llama_models import (
    Llama,
    logits_of,
    text_model,
    tiny,
    token_ids,
    transformers_text_model,
    without_kv_policy,
)

import small
from chunkwise_lora import ChunkWiseConfig
from chunkwise_lora.engines.base import Engine
from chunkwise_lora.engines.llama_cpp import ChunkWiseLlama
from chunkwise_lora.method.batch import BatchPlanner, Span
from chunkwise_lora.method.config import PRESETS, CompositionConfig, SelectionConfig
from chunkwise_lora.method.sequence import SequencePlanner

CONFIGS = {
    **{name: without_kv_policy(config) for name, config in PRESETS.items()},
    "far-apart ranks": ChunkWiseConfig(
        selection=SelectionConfig(rank_shares=(0.0, 0.5, 1.0)), kv_cache=without_kv_policy(ChunkWiseConfig()).kv_cache
    ),
    "scales": ChunkWiseConfig(
        selection=SelectionConfig(scales=(0.5, 1.0, 1.5)), kv_cache=without_kv_policy(ChunkWiseConfig()).kv_cache
    ),
    "no cross-fades": ChunkWiseConfig(
        composition=CompositionConfig(window=0), kv_cache=without_kv_policy(ChunkWiseConfig()).kv_cache
    ),
}
PROMPT = b" = Aldhaven = \n \n Aldhaven is a town in the north of the county . It was built in 1734 by the family of"


def entropies(logits: np.ndarray) -> list[float]:
    """Entropies in nats of the next-token distributions of (tokens, vocabulary) logits."""
    log_p = torch.tensor(logits).log_softmax(-1)
    return (-(log_p.exp() * log_p).sum(-1)).tolist()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_generation_has_the_plan_and_the_logits_of_the_transformers_engine(name: str) -> None:
    llm, reference = text_model(), transformers_text_model()
    prompt = llm.tokenize(PROMPT)
    with llm.using("wiki", CONFIGS[name]):
        steps = llm.generate(prompt, temp=0.0)
        tokens = [next(steps) for _ in range(41)]
    output = reference.generate(
        torch.tensor([prompt]),
        adapter_names="wiki",
        chunkwise_config=CONFIGS[name],
        max_new_tokens=41,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        eos_token_id=None,
    )
    assert output.sequences[0].tolist() == [*prompt, *tokens]
    found, expected = llm.trace.sequences[0], reference.trace.sequences[0]
    assert found.ranks == expected.ranks
    assert [chunk.selection for chunk in found.chunks] == [chunk.selection for chunk in expected.chunks]
    assert len(set(found.ranks)) > 1 or name == "lossless"
    logits = torch.stack(output.logits, 1)[0].numpy()
    assert np.abs(llm.scores[len(prompt) - 1 : llm.n_tokens] - logits).max() < 2e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_the_plan_is_that_of_the_planner_for_the_same_tokens_and_entropies(name: str) -> None:
    llm, ids = tiny("qwen2", chunkwise_config=CONFIGS[name]), token_ids(60)
    logits = logits_of(llm, ids, range(20, 60))
    ladder = next(iter(llm.adapters.values()))
    info = llm.planner[0].adapter
    planner = BatchPlanner(llm.n_vocab())
    planner.open(0, SequencePlanner(info, CONFIGS[name], llm.n_vocab(), ids[:20]))
    for position, entropy in enumerate(entropies(logits), start=1):
        planner[0].learn(position, entropy)
    planner.plan([Span(0, 0, 60)], lambda: [ids])
    assert np.array_equal(planner[0].weights, llm.planner[0].weights) or planner[0].constant_weights is not None
    assert llm.trace.sequences[0].mean_rank <= ladder.rung_ranks[-1]


@pytest.mark.parametrize("name", ["balanced", "far-apart ranks", "scales"])
def test_a_prompt_gives_the_same_however_it_is_cut_into_passes(name: str) -> None:
    """Ranks change within a pass and in cross-fades, so every cut groups the tokens otherwise."""
    llm, ids = tiny("llama", "patterns", chunkwise_config=CONFIGS[name]), token_ids(60)
    expected = prompt_logits(llm, ids, [])
    assert len(set(llm.trace.sequences[0].ranks)) > 1
    for cuts in ([30], [1, 3, 7, 59], list(range(1, 60))):
        assert np.abs(prompt_logits(llm, ids, cuts) - expected).max() < 1e-4
    for options in ({"n_batch": 16}, {"n_ubatch": 8}, {"n_threads_batch": 3}):
        other = tiny("llama", "patterns", chunkwise_config=CONFIGS[name], **options)
        assert np.abs(prompt_logits(other, ids, []) - expected).max() < 1e-4


def prompt_logits(llm: ChunkWiseLlama, ids: Sequence[int], cuts: Sequence[int]) -> np.ndarray:
    """Logits of a text that is planned as one prompt, and run in passes that end at `cuts`."""
    llm._session.begin(llm.request(), list(ids))
    llm.n_tokens = 0
    for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        Llama.eval(llm, list(ids[start:end]))
    return llm.scores[: len(ids)].copy()


def test_it_is_an_engine() -> None:
    assert isinstance(tiny("llama"), Engine)


def test_a_calibrated_ladder_follows_its_own_policy() -> None:
    ladder = small.calibrated()
    llm, reference = text_model(ladder), transformers_text_model(ladder)
    prompt = llm.tokenize(PROMPT)
    llm.create_completion(prompt, max_tokens=24, temperature=0.0)
    reference.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
    found, expected = llm.trace.sequences[0], reference.trace.sequences[0]
    assert found.tokens == expected.tokens
    assert found.ranks == expected.ranks
    assert found.mean_rank < llm.adapters["default"].rung_ranks[-1]


def test_the_trace_counts_what_ran() -> None:
    llm = tiny("llama", chunkwise_config=ChunkWiseConfig.uniform(0.5))
    assert llm.trace is None
    ids = token_ids(40)
    logits_of(llm, ids, [38, 39])
    trace = llm.trace
    assert trace.passes == 3
    assert trace.sequences[0].tokens == tuple(ids)
    assert trace.sequences[0].adapter == "default"
    ladder = llm.adapters["default"]
    assert trace.sequences[0].mean_rank == pytest.approx(ladder.rung_ranks[4])
    numbers = sum(module.cost * module.ranks[4] for module in ladder.modules.values())
    assert trace.adapter_bytes_read == 3 * 4 * numbers
    assert 2 * trace.kv_bytes_full <= trace.kv_bytes < 2.2 * trace.kv_bytes_full, "the cache of the tests is in float32"
