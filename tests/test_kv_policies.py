"""KV policies drop exactly the tokens with the lowest scores, for every split of the tokens into passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from caches import new_cache, run_pass
from chunkwise_lora import ChunkWiseConfig, ChunkWiseModel, ConfigError
from chunkwise_lora.engines.transformers.cache import NO_TOKEN, ChunkWiseCache
from chunkwise_lora.engines.vllm.loading import kv_left_undone
from chunkwise_lora.method.config import (
    ChunkingConfig,
    CompositionConfig,
    KVCacheConfig,
    LevelKVPolicy,
    SelectionConfig,
)
from chunkwise_lora.method.eviction import ChunkStates, evicted_tokens
from chunkwise_lora.method.kv_policies import KV_POLICY_REGISTRY, Knorm, KVPolicy, SnapKV, register_kv_policy
from chunkwise_lora.method.kv_policy import KVDecision
from models import adapter, build, greedy, peft_model, prompts

SINKS = 2


def config_of(*policies: LevelKVPolicy, max_length: int = 5) -> ChunkWiseConfig:
    """Full rank, so that only the KV policy matters, and short chunks, so that there are many decisions."""
    levels = policies if len(policies) == 3 else policies * 3
    return ChunkWiseConfig(
        chunking=ChunkingConfig(min_length=2, max_length=max_length, thresholds=(0.5, 0.7), hysteresis=0.0, memory=2),
        selection=SelectionConfig(rank_shares=(1.0,) * 3, scales=(1.0,) * 3),
        composition=CompositionConfig(window=0),
        kv_cache=KVCacheConfig(levels=levels, sinks=SINKS),
    )


def evicting(name: str, keep_share: float = 0.5, **others: Any) -> ChunkWiseConfig:
    return config_of(LevelKVPolicy(evict=name, keep_share=keep_share, **others))


def tokens_held(cache: ChunkWiseCache, row: int) -> set[int]:
    """The tokens of one sequence that the cache still holds."""
    return {int(token) for slots in (cache._slots.hot, cache._slots.cold) for token in slots[row] if token != NO_TOKEN}


def run_prompt(model: ChunkWiseModel, inputs: dict[str, Tensor], **options: Any) -> Any:
    """The cache after the prompt alone."""
    output = model.generate(**inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, **options)
    return output.past_key_values


def closed_chunks(model: ChunkWiseModel, row: int) -> list[range]:
    """The tokens of each closed chunk of one sequence, without sinks."""
    assert model.trace is not None
    chunks = (scheduled.chunk for scheduled in model.trace.sequences[row].chunks)
    spans = (range(max(chunk.start, SINKS), chunk.end) for chunk in chunks if chunk.end is not None)
    return [span for span in spans if span]


@pytest.fixture
def registered() -> Iterator[Callable[[str, type[KVPolicy]], str]]:
    """Registers a policy for one test."""
    names = []

    def register(name: str, policy: type[KVPolicy]) -> str:
        register_kv_policy(name)(policy)
        names.append(name)
        return name

    yield register
    for name in names:
        KV_POLICY_REGISTRY.remove(name)


# The published scores


def test_knorm_keeps_the_smallest_keys() -> None:
    keys = torch.randn(3, 2, 7, 4)
    scores = Knorm().score(keys, keys, keys[:, :0])
    assert torch.allclose(scores, -keys.square().sum(-1).sqrt())


@given(
    tokens=st.integers(1, 14),
    window=st.integers(1, 6),
    kernel=st.sampled_from([1, 3, 5]),
    groups=st.sampled_from([1, 3]),
)
def test_snapkv_equals_its_definition(tokens: int, window: int, kernel: int, groups: int) -> None:
    layers, heads, width = 2, 2, 4
    keys = torch.randn(layers, heads, tokens, width)
    queries = torch.randn(layers, heads * groups, tokens, width)
    scores = SnapKV(window, kernel).score(keys, keys, queries)
    observed = max(1, min(window, tokens // 2))
    past = tokens - observed
    for layer in range(layers):
        for head in range(heads):
            received = [0.0] * past
            for query_head in range(head * groups, (head + 1) * groups):
                for position in range(past, tokens):
                    logits = [
                        float(queries[layer, query_head, position] @ keys[layer, head, earlier])
                        for earlier in range(position + 1)
                    ]
                    total = sum(map(math.exp, logits))
                    for token in range(past):
                        received[token] += math.exp(logits[token]) / total / (groups * observed)
            around = [
                sum(received[max(0, token - kernel // 2) : token + kernel // 2 + 1]) / kernel for token in range(past)
            ]
            assert scores[layer, head].tolist() == pytest.approx([*around, *[math.inf] * observed], abs=1e-5)


# What is dropped


@given(scores=st.lists(st.integers(0, 3), min_size=1, max_size=12), share=st.floats(0, 1))
def test_tokens_with_the_lowest_scores_are_dropped_and_among_equals_the_earlier(
    scores: list[int], share: float
) -> None:
    class Given(KVPolicy):
        def score(self, keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
            return keys[..., 0]

    register_kv_policy("given")(Given)
    try:
        keys = torch.tensor(scores, dtype=torch.float32)[None, None, :, None]
        decision = KVDecision(0, len(scores), "keep", evict="given", keep_share=share)
        dropped = evicted_tokens(decision, [ChunkStates(keys, keys, keys[:, :0])])
    finally:
        KV_POLICY_REGISTRY.remove("given")
    order = sorted(range(len(scores)), key=lambda token: (scores[token], token))
    expected = set(order[: len(scores) - round(share * len(scores))])
    assert set(np.flatnonzero(dropped).tolist()) == expected


def test_scores_are_averaged_over_heads_and_layers_of_every_shape() -> None:
    small, large = torch.rand(1, 2, 5, 4), torch.rand(3, 1, 5, 8)
    states = [ChunkStates(keys, keys, keys[:, :0]) for keys in (small, large)]
    dropped = evicted_tokens(KVDecision(0, 5, "keep", evict="knorm", keep_share=0.4), states)
    norms = (small.norm(dim=-1).mean((0, 1)) + large.norm(dim=-1).mean(1).sum(0)) / 4
    assert set(np.flatnonzero(dropped).tolist()) == set(norms.argsort()[2:].tolist())


@pytest.mark.parametrize("precision", ["full", "int8"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_a_registered_policy_drops_the_tokens_with_its_lowest_scores(
    architecture: str, precision: str, registered: Callable[[str, type[KVPolicy]], str]
) -> None:
    @dataclass(frozen=True)
    class FirstNumber(KVPolicy):
        """Keeps the tokens whose keys and values begin with large numbers."""

        def score(self, keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
            assert queries.shape[1] == 0, "nobody asked for queries"
            return keys[..., 0] + 2 * values[..., 0]

    name = registered("first_number", FirstNumber)
    inputs = prompts((40, 5, 23))
    model = ChunkWiseModel(build(architecture), adapter(architecture), evicting(name, 0.6, precision=precision))
    full = run_prompt(model, inputs, chunkwise_config=ChunkWiseConfig.preset("lossless"))
    cache = run_prompt(model, inputs)
    for row, mask in enumerate(inputs["attention_mask"]):
        states = [
            (layer.keys[row][:, :40][:, mask.bool()], layer.values[row][:, :40][:, mask.bool()])
            for layer in full.chunkwise_layers
        ]
        scores = sum((keys[..., 0] + 2 * values[..., 0]).mean(0) for keys, values in states)
        expected = set(range(int(mask.sum())))
        for chunk in closed_chunks(model, row):
            worst_first = sorted(chunk, key=lambda token: float(scores[token]))
            expected -= set(worst_first[: len(chunk) - round(0.6 * len(chunk))])
        assert tokens_held(cache, row) == expected
        assert expected >= set(range(min(SINKS, int(mask.sum()))))


def test_the_memory_of_dropped_tokens_is_freed() -> None:
    held = {}
    for share in (1.0, 0.5, 0.25):
        model = ChunkWiseModel(build("llama"), adapter("llama"), evicting("knorm", share))
        run_prompt(model, prompts((400,)))
        assert model.trace is not None
        held[share] = model.trace.kv_bytes / model.trace.kv_bytes_full
    assert held[1.0] == pytest.approx(1, abs=0.05)
    assert held[0.5] < 0.6
    assert held[0.25] < 0.4


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda keys: keys, r"'broken': score returned shape .* for 4 tokens"),
        (lambda keys: keys.sum(), r"'broken': score returned shape \(\)"),
        (lambda keys: keys[..., 0] * math.nan, "'broken': score returned NaN"),
    ],
    ids=["shape", "scalar", "NaN"],
)
def test_an_unusable_score_is_refused_by_the_name_of_its_policy(
    returned: Callable[[Tensor], Tensor], message: str, registered: Callable[[str, type[KVPolicy]], str]
) -> None:
    policy = type("Broken", (KVPolicy,), {"score": lambda self, keys, values, queries: returned(keys)})
    keys = torch.ones(1, 1, 4, 8)
    decision = KVDecision(0, 4, "keep", evict=registered("broken", policy), keep_share=0.5)
    with pytest.raises(ConfigError, match=message):
        evicted_tokens(decision, [ChunkStates(keys, keys, keys[:, :0])])


def test_a_policy_that_is_not_registered_is_refused_with_the_known_names() -> None:
    with pytest.raises(ConfigError, match=r"'nobody' is not registered; registered are knorm, .*snapkv"):
        LevelKVPolicy(evict="nobody", keep_share=0.5)


# Queries


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "gpt_neox", "gemma3"])
def test_queries_and_keys_of_a_chunk_give_the_models_attention(
    architecture: str, registered: Callable[[str, type[KVPolicy]], str]
) -> None:
    seen: list[Tensor] = []

    @dataclass(frozen=True)
    class Watch(KVPolicy):
        needs_queries: ClassVar[bool] = True

        def score(self, keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
            layers, heads, tokens, width = keys.shape
            logits = queries.reshape(layers, heads, -1, tokens, width) @ keys[:, :, None].transpose(-1, -2)
            future = torch.ones(tokens, tokens).triu(1).bool()
            seen.append(logits.masked_fill(future, -math.inf).softmax(-1).flatten(1, 2))
            return keys[..., 0]

    config = evicting(registered("watch", Watch), 1.0)
    inputs = prompts((30,))
    model = ChunkWiseModel(build(architecture), adapter(architecture), config)
    run_prompt(model, inputs)
    reference = peft_model(architecture)
    reference.set_attn_implementation("eager")
    with torch.no_grad():
        layers = reference(**inputs, output_attentions=True).attentions
    layer_types = getattr(reference.config, "layer_types", None) or ["full_attention"] * len(layers)
    full = torch.stack([a[0] for a, kind in zip(layers, layer_types, strict=True) if kind == "full_attention"])
    chunks = closed_chunks(model, 0)
    assert len(seen) == len(chunks) > 3
    for attention, chunk in zip(seen, chunks, strict=True):
        within = full[:, :, chunk.start : chunk.stop, chunk.start : chunk.stop]
        assert torch.allclose(attention, within / within.sum(-1, keepdim=True), atol=1e-4)


@dataclass
class Stream:
    """A sequence of random states that is fed to a cache in pieces, and whose chunks close from time to time."""

    ends: list[int]
    policy: str
    layers: int = 2
    keys: Tensor = field(init=False)
    queries: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(len(self.ends))
        self.keys = torch.randn(self.layers, 1, 2, self.ends[-1], 4, generator=generator)
        self.queries = torch.randn(self.layers, 1, 6, self.ends[-1], 4, generator=generator)

    def run(self, pieces: list[tuple[int, int]]) -> set[int]:
        """Feed the states in pieces. The decision for a chunk comes with the pass in which the next chunk begins."""
        cache = new_cache(record_queries=True)
        for start, end in pieces:
            piece = slice(start, end)
            run_pass(cache, np.arange(start, end)[None], self.keys[..., piece, :], self.queries[..., piece, :])
            chunks = [(a, b) for a, b in pairwise([0, *self.ends]) if start <= b < end]
            cache.carry_out([[KVDecision(a, b, "keep", evict=self.policy, keep_share=0.5) for a, b in chunks]])
        assert not cache.notes
        return tokens_held(cache, 0)


@pytest.mark.parametrize("policy", ["knorm", "snapkv", "near_duplicates"])
@given(data=st.data(), lengths=st.lists(st.integers(1, 9), min_size=2, max_size=12))
def test_any_split_into_passes_keeps_the_same_tokens(policy: str, data: st.DataObject, lengths: list[int]) -> None:
    stream = Stream(np.cumsum(lengths).tolist(), policy)
    length = stream.ends[-1]
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=length)))
    assert stream.run(list(pairwise([0, *cuts, length]))) == stream.run([(0, length)])
    assert stream.run([(i, i + 1) for i in range(length)]) == stream.run([(0, length)])


@pytest.mark.parametrize("policy", ["knorm", "snapkv"])
def test_a_prefill_in_pieces_closes_the_same_chunks_and_keeps_the_same_number_of_tokens(policy: str) -> None:
    model = ChunkWiseModel(build("llama"), adapter("llama"), evicting(policy))
    whole = run_prompt(model, prompts((40,)))
    chunks = closed_chunks(model, 0)
    pieces = run_prompt(model, prompts((40,)), prefill_chunk_size=7)
    assert closed_chunks(model, 0) == chunks
    first = [token for chunk in chunks for token in chunk if chunk.stop <= 7]
    assert len(tokens_held(pieces, 0)) == len(tokens_held(whole, 0)) < 40
    # Before the first drop, keys and queries are the same, so the same tokens are kept.
    assert tokens_held(pieces, 0) & set(first) == tokens_held(whole, 0) & set(first)


def test_queries_of_closed_chunks_are_freed() -> None:
    model = ChunkWiseModel(build("llama"), adapter("llama"), evicting("snapkv"))
    cache = run_prompt(model, prompts((300, 120)))
    for layer in cache.chunkwise_layers:
        assert sum(queries.shape[2] for queries in layer.queries) <= 5 + 16
        assert sum(queries.untyped_storage().nbytes() for queries in layer.queries) < 0.2 * 300 * 2 * 4 * 8 * 4
    ended = int(greedy(model, prompts((20, 12)), 4)[0][0, 3])  # one sequence ends early, the other continues
    output = model.generate(
        **prompts((20, 12)), max_new_tokens=120, do_sample=False, eos_token_id=ended, return_dict_in_generate=True
    )
    for layer in output.past_key_values.chunkwise_layers:
        assert sum(queries.shape[2] for queries in layer.queries) <= 5 + 16


def test_no_queries_are_kept_if_no_policy_reads_them() -> None:
    model = ChunkWiseModel(build("llama"), adapter("llama"), evicting("knorm"))
    assert all(layer.queries is None for layer in run_prompt(model, prompts()).chunkwise_layers)


@pytest.mark.parametrize("architecture", ["bloom", "mistral"])
def test_a_model_that_cannot_carry_out_decisions_keeps_everything_and_reports_it(architecture: str) -> None:
    model = ChunkWiseModel(build(architecture), adapter(architecture), evicting("snapkv"))
    greedy(model, prompts(), 4)
    assert model.trace is not None and model.trace.kv_notes
    assert model.trace.kv_bytes == model.trace.kv_bytes_full


def test_vllm_names_the_policies_that_it_leaves_undone() -> None:
    (undone,) = kv_left_undone(evicting("snapkv").kv_cache, "auto")
    assert "snapkv" in undone
    assert not kv_left_undone(ChunkWiseConfig.preset("lossless").kv_cache, "auto")
