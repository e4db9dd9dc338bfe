"""The cache carries out KV decisions exactly, changes nothing else, and reports the bytes that it really uses."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from caches import new_cache, run_pass
from chunkwise_lora import ChunkWiseConfig, ChunkWiseModel, EngineError, RankLadder, RuntimeScheduler, Trace
from chunkwise_lora.engines.transformers import FastPaths, attention, versions
from chunkwise_lora.engines.transformers.cache import NO_TOKEN, ChunkWiseCache, ChunkWiseLayer, Int8Pool, quantise
from chunkwise_lora.method.config import (
    ChunkingConfig,
    CompositionConfig,
    KVCacheConfig,
    LevelKVPolicy,
    SelectionConfig,
)
from chunkwise_lora.method.kv_policy import KVDecision
from models import PAD, VOCABULARY, adapter, build, greedy, peft_model, prompts

FAST = {"all fast paths": FastPaths(), "our attention alone": FastPaths(kernels=False, products=False)}
"""KV policies need our attention."""
INT8 = LevelKVPolicy(precision="int8")
POLICIES: dict[str, tuple[LevelKVPolicy, ...]] = {
    "int8": (INT8, INT8, LevelKVPolicy()),
    "drop": (LevelKVPolicy(max_age=6), LevelKVPolicy(max_age=12), LevelKVPolicy()),
    "duplicates": (LevelKVPolicy(duplicate_similarity=0.6),) * 3,
    "knorm": (LevelKVPolicy(evict="knorm", keep_share=0.5),) * 2 + (LevelKVPolicy(evict="knorm", keep_share=0.8),),
    "all": (
        LevelKVPolicy(precision="int8", duplicate_similarity=0.7, max_age=8),
        LevelKVPolicy(precision="int8", max_age=20),
        LevelKVPolicy(duplicate_similarity=0.8),
    ),
}


def kv_only(*policies: LevelKVPolicy, sinks: int = 2, int8_head_share: float = 1.0) -> ChunkWiseConfig:
    """Full rank, so that unmerged PEFT is the reference, and short chunks, so that there are many KV decisions."""
    return ChunkWiseConfig(
        chunking=ChunkingConfig(min_length=2, max_length=5, thresholds=(0.5, 0.7), hysteresis=0.0, memory=2),
        selection=SelectionConfig(rank_shares=(1.0,) * 3, scales=(1.0,) * 3),
        composition=CompositionConfig(window=0),
        kv_cache=KVCacheConfig(levels=policies, sinks=sinks, int8_head_share=int8_head_share),
    )


def roundtrip(states: Tensor) -> Tensor:
    codes, scales = quantise(states)
    return codes.float() * scales.float()


def similar_to_the_next(keys: list[Tensor], bound: float) -> Tensor:
    """(tokens,) bool: whether a token's keys (heads, tokens, head_dim), over all layers, are like the next token's."""
    flat = torch.cat([k.transpose(0, 1).flatten(1) for k in keys], dim=1)
    return torch.cat([torch.cosine_similarity(flat[:-1], flat[1:], dim=1) > bound, torch.tensor([False])])


def without_the_smallest_keys(keys: list[Tensor], decision: KVDecision) -> Tensor:
    """(tokens,) bool: whether Knorm drops a token, given the keys (heads, tokens, head_dim) of all layers."""
    assert decision.evict == "knorm" and decision.keep_share is not None
    norms = sum(k.square().sum(-1).sqrt().sum(0) for k in keys)
    dropped = torch.ones(len(norms), dtype=torch.bool)
    dropped[norms.argsort()[: round(decision.keep_share * len(norms))]] = False
    return dropped


def slow_generation(
    architecture: str, config: ChunkWiseConfig, prompt: Tensor, new_tokens: int
) -> tuple[Tensor, Tensor, int]:
    """Greedy generation of one sequence with PEFT, whose cache keeps all tokens.

    Decisions quantise keys and values in place, and an attention mask hides dropped tokens.

    Returns:
        New tokens (new,), their logits (new, vocabulary), and the number of tokens that are hidden at the end.
    """
    model = peft_model(architecture)
    ladder = RankLadder.from_peft(adapter(architecture))
    scheduler = RuntimeScheduler(config, ladder.rung_ranks, model.config.vocab_size)
    cache = DynamicCache(config=model.config)
    full = [layer for layer in cache.layers if type(layer) is DynamicLayer]
    hybrid = len(full) < len(cache.layers)
    hidden = torch.zeros(0, dtype=torch.bool)
    new, logits = prompt, []
    entropies: list[float | None] = [None] * len(prompt)
    for _ in range(new_tokens):
        decisions = scheduler.step(new.tolist(), entropies).decisions
        mask: Any = None
        if hidden.any():
            assert len(new) == 1
            mask = torch.cat([~hidden, torch.tensor([True])])[None, None, None]
            mask = {"full_attention": mask, "sliding_attention": None} if hybrid else mask
        positions = torch.arange(len(hidden), len(hidden) + len(new))[None]
        with torch.no_grad():
            output = model.get_base_model()(
                input_ids=new[None], attention_mask=mask, position_ids=positions, **{versions.CACHE: cache}
            )
        hidden = torch.cat([hidden, torch.zeros(len(new), dtype=torch.bool)])
        for decision in decisions:
            span = slice(decision.start, decision.end)
            if decision.duplicate_similarity is not None:
                keys = [layer.keys[0, :, span] for layer in full]
                hidden[span] |= similar_to_the_next(keys, decision.duplicate_similarity)
            if decision.evict is not None:
                hidden[span] |= without_the_smallest_keys([layer.keys[0, :, span] for layer in full], decision)
            if decision.action == "int8":
                for layer in full:
                    layer.keys[:, :, span] = roundtrip(layer.keys[:, :, span])
                    layer.values[:, :, span] = roundtrip(layer.values[:, :, span])
            elif decision.action == "drop":
                hidden[span] = True
        logits.append(output.logits[0, -1])
        new = logits[-1].argmax()[None]
        entropies = [float(torch.distributions.Categorical(logits=logits[-1]).entropy())]
        prompt = torch.cat([prompt, new])
    return prompt[-new_tokens:], torch.stack(logits), int(hidden.sum())


def trace_of(model: ChunkWiseModel) -> Trace:
    assert model.trace is not None
    return model.trace


@pytest.mark.parametrize("fast", FAST)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "opt", "gpt_neox", "gemma3", "gemma2"])
def test_a_padded_batch_equals_each_sequence_with_a_masked_full_cache(
    architecture: str, policy: str, fast: str
) -> None:
    if policy == "knorm" and architecture in ("qwen3", "gemma2", "gemma3"):
        pytest.skip("keys of equal norm (normalised, or of a repeated token): rounding decides which of them stay")
    config, inputs = kv_only(*POLICIES[policy]), prompts((5, 27, 16))
    model = ChunkWiseModel(build(architecture), adapter(architecture), config, FAST[fast])
    tokens, logits = greedy(model, inputs, 40)
    if model.base.config._attn_implementation == "eager":
        assert any(
            "does not read its cache through the engine's attention" in note for note in trace_of(model).kv_notes
        )
        pytest.skip("since transformers 5.24, models that cap attention scores run their own attention code")
    hidden = 0
    for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
        expected_tokens, expected_logits, hidden_here = slow_generation(architecture, config, ids[mask.bool()], 40)
        assert torch.equal(tokens[row], expected_tokens)
        # A difference in the last bit of a key can change how its INT8 code is rounded.
        tolerance = 0.05 if any(level.precision == "int8" for level in config.kv_cache.levels) else 1e-4
        assert (logits[row] - expected_logits).abs().max() < tolerance
        hidden += hidden_here
    assert (hidden > 0) == (policy != "int8")
    lossless = greedy(peft_model(architecture), inputs, 40)[1]
    assert (logits[:, 0] - lossless[:, 0]).abs().max() < 1e-4, "the prefill itself sees a full cache"
    assert (logits - lossless).abs().max() > 1e-3, "the policy changed nothing, so nothing was tested"


@pytest.mark.parametrize("preset", ["balanced", "compact"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_a_sequence_is_planned_in_a_batch_as_alone(architecture: str, preset: str) -> None:
    model = ChunkWiseModel(build(architecture), adapter(architecture), ChunkWiseConfig.preset(preset))
    inputs = prompts((4, 30, 13))
    tokens, logits = greedy(model, inputs, 24)
    together = trace_of(model)
    for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
        alone = greedy(model, {"input_ids": ids[mask.bool()][None], "attention_mask": mask[mask.bool()][None]}, 24)
        assert torch.equal(tokens[row], alone[0][0])
        assert (logits[row] - alone[1][0]).abs().max() < 0.05
        ours, expected = together.sequences[row], trace_of(model).sequences[0]
        assert ours.tokens == expected.tokens
        assert ours.ranks == pytest.approx(expected.ranks)
        assert [(c.chunk.start, c.chunk.end, c.selection, c.kv) for c in ours.chunks] == [
            (c.chunk.start, c.chunk.end, c.selection, c.kv) for c in expected.chunks
        ]


def test_a_sequence_that_ended_early_is_traced_as_alone() -> None:
    model = ChunkWiseModel(build("llama"), adapter("llama"), ChunkWiseConfig.preset("balanced"))
    inputs = prompts()
    tokens, _ = greedy(model, inputs, 24)
    row, step = 0, 5
    stop = int(tokens[row, step])
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": stop, "pad_token_id": PAD}
    model.generate(**inputs, **options)
    together = trace_of(model)
    assert together.passes > step + 1
    alone = inputs["input_ids"][row][inputs["attention_mask"][row].bool()][None]
    model.generate(alone, **options)
    expected = trace_of(model).sequences[0]
    assert together.sequences[row].tokens[: len(expected.tokens)] == expected.tokens
    assert PAD not in together.sequences[row].tokens
    assert together.sequences[row].ranks[: len(expected.ranks)] == pytest.approx(expected.ranks)


@pytest.mark.parametrize("preset", ["lossless", "balanced", "compact"])
def test_stream_gives_a_text_the_logits_that_generation_had(preset: str) -> None:
    model = ChunkWiseModel(build("llama"), adapter("llama"), ChunkWiseConfig.preset(preset))
    inputs = prompts((20, 20))
    tokens, logits = greedy(model, inputs, 24)
    expected = trace_of(model)
    pieces = [inputs["input_ids"], *tokens[:, :-1].split(1, dim=1)]
    with torch.no_grad(), model.stream(batch=2, prompt_columns=20) as call:
        scored = [
            model.model(input_ids=piece, **{versions.CACHE: call.cache}, use_cache=True).logits[:, -1]
            for piece in pieces
        ]
        trace = call.trace()
    assert (torch.stack(scored, dim=1) - logits).abs().max() < 1e-4
    assert [sequence.ranks for sequence in trace.sequences] == [sequence.ranks for sequence in expected.sequences]
    assert trace.kv_bytes == expected.kv_bytes


@pytest.mark.parametrize("preset", ["balanced", "compact"])
def test_a_prefill_in_pieces_gives_the_same_plan(preset: str) -> None:
    model = ChunkWiseModel(build("llama"), adapter("llama"), ChunkWiseConfig.preset(preset))
    chunks = []
    for options in ({}, {"prefill_chunk_size": 7}):
        model.generate(**prompts((40, 22)), max_new_tokens=8, do_sample=False, **options)
        chunks.append([sequence.chunks[:4] for sequence in trace_of(model).sequences])
    assert chunks[0] == chunks[1]


@pytest.mark.parametrize("policy", ["int8", "drop"])
def test_padding_on_the_right_changes_nothing(policy: str) -> None:
    model = ChunkWiseModel(build("llama"), adapter("llama"), kv_only(*POLICIES[policy]))
    ids, length = prompts((16,))["input_ids"], 16
    padded = torch.cat([ids, torch.full((1, 5), PAD)], dim=1)
    mask = torch.cat([torch.ones(1, length), torch.zeros(1, 5)], dim=1).long()
    tokens = greedy(model, {"input_ids": ids}, 1)[0]
    more = {
        "bare": {"input_ids": torch.cat([ids, tokens], dim=1)},
        "padded": {
            "input_ids": torch.cat([padded, tokens], dim=1),
            "attention_mask": torch.cat([mask, torch.ones(1, 1).long()], dim=1),
        },
    }
    bare, holed = (greedy(model, inputs, 24) for inputs in more.values())
    assert torch.equal(bare[0], holed[0])
    assert (bare[1] - holed[1]).abs().max() < 0.05


# Beams


BEAM_CONFIGS = {
    "balanced": ChunkWiseConfig.preset("balanced"),
    "compact": ChunkWiseConfig.preset("compact"),
    "all policies": kv_only(*POLICIES["all"]),
    "snapkv": kv_only(*(LevelKVPolicy(evict="snapkv", keep_share=0.5),) * 3),
}


@pytest.mark.parametrize("config", BEAM_CONFIGS.values(), ids=BEAM_CONFIGS)
def test_every_beam_is_planned_like_its_tokens_alone(config: ChunkWiseConfig) -> None:
    model = ChunkWiseModel(build("llama"), adapter("llama"), config)
    inputs = prompts((6, 17))
    model.generate(**inputs, max_new_tokens=20, do_sample=False, num_beams=3)
    beams = trace_of(model).sequences
    assert len({beam.tokens for beam in beams}) > 2
    for row, beam in enumerate(beams):
        prompt_tokens = int(inputs["attention_mask"][row // 3].sum())
        ids = torch.tensor(beam.tokens)
        assert torch.equal(ids[:prompt_tokens], inputs["input_ids"][row // 3][-prompt_tokens:])
        with torch.no_grad(), model.stream(prompt_columns=prompt_tokens) as call:
            for piece in (ids[:prompt_tokens], *ids[prompt_tokens:].split(1)):
                model.model(input_ids=piece[None], **{versions.CACHE: call.cache})
            (alone,) = call.trace().sequences
        assert beam.ranks == pytest.approx(alone.ranks)
        assert [scheduled.kv for scheduled in beam.chunks] == [scheduled.kv for scheduled in alone.chunks]


def test_beams_with_a_kv_policy_have_the_scores_of_their_tokens_alone() -> None:
    config = kv_only(*POLICIES["drop"])
    model = ChunkWiseModel(build("llama"), adapter("llama"), config)
    inputs = prompts((12,))
    output = model.generate(
        **inputs,
        max_new_tokens=24,
        do_sample=False,
        num_beams=3,
        return_dict_in_generate=True,
        output_scores=True,
        length_penalty=0.0,
    )
    sequence = output.sequences[0]
    with torch.no_grad(), model.stream(prompt_columns=12) as call:
        log_p = [
            model.model(input_ids=piece[None], **{versions.CACHE: call.cache}).logits[0, -1].log_softmax(-1)
            for piece in (sequence[:12], *sequence[12:-1].split(1))
        ]
    total = sum(float(row[token]) for row, token in zip(log_p, sequence[12:], strict=True))
    assert float(output.sequences_scores[0]) == pytest.approx(total, abs=1e-3)


# Bytes


def storages(value: Any) -> dict[int, int]:
    """Address and bytes of every storage of keys and values that an object holds."""
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()} if value.ndim == 4 else {}
    parts = value if isinstance(value, tuple | list) else getattr(value, "__dict__", {}).values()
    return {address: size for part in parts for address, size in storages(part).items()}


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("batch", [(9,), (5, 27, 16)], ids=["one", "ragged"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_traced_bytes_equal_the_bytes_of_the_storages(
    architecture: str, policy: str, batch: tuple[int, ...], share: float
) -> None:
    config = kv_only(*POLICIES[policy], int8_head_share=share)
    model = ChunkWiseModel(build(architecture), adapter(architecture), config)
    output = model.generate(**prompts(batch), max_new_tokens=24, do_sample=False, return_dict_in_generate=True)
    held = storages(output.past_key_values.layers)
    assert len(held) >= 4
    trace = trace_of(model)
    assert trace.kv_bytes <= trace.kv_bytes_reserved == sum(held.values())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_full_precision_bytes_equal_those_of_a_lossless_run(architecture: str) -> None:
    model = ChunkWiseModel(build(architecture), adapter(architecture), kv_only(*POLICIES["all"]))
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}
    model.generate(**prompts((9, 12)), **options)
    full = trace_of(model).kv_bytes_full
    lossless = model.generate(
        **prompts((9, 12)),
        **options,
        chunkwise_config=ChunkWiseConfig.preset("lossless"),
        return_dict_in_generate=True,
    ).past_key_values
    own = [layer for layer in lossless.layers if isinstance(layer, ChunkWiseLayer)]
    in_use = sum(states.nbytes for layer in own for states in layer.read())
    sliding = sum(storages([layer for layer in lossless.layers if layer not in own]).values())
    assert full == trace_of(model).kv_bytes_full == in_use + sliding


def test_compact_stores_a_fraction_of_a_long_text() -> None:
    levels = (
        LevelKVPolicy(precision="int8", duplicate_similarity=0.98, max_age=64),
        LevelKVPolicy(precision="int8", max_age=128),
        LevelKVPolicy(precision="int8"),
    )
    compact = ChunkWiseConfig.preset("compact")
    config = compact.model_copy(update={"kv_cache": compact.kv_cache.model_copy(update={"levels": levels})})
    model = ChunkWiseModel(build("llama"), adapter("llama"), config)
    model.generate(**prompts((640,)), max_new_tokens=32, do_sample=False)
    trace = trace_of(model)
    assert trace.kv_bytes_full == 2 * 2 * 2 * (640 + 31) * 8 * 4
    assert trace.kv_bytes < 0.3 * trace.kv_bytes_full


def test_with_a_maximum_age_the_bytes_stop_growing() -> None:
    policy = LevelKVPolicy(precision="int8", max_age=16)
    model = ChunkWiseModel(build("llama"), adapter("llama"), kv_only(policy, policy, policy))
    slot = 2 * 2 * 2 * 8 * 4
    for new_tokens in (80, 160, 320):
        model.generate(**prompts((8,)), max_new_tokens=new_tokens, do_sample=False)
        assert trace_of(model).kv_bytes < (16 + 5 + 16) * slot, "the maximum age, an open chunk and unused slots"


def test_int8_saves_three_quarters_of_float32_and_half_of_that_with_half_of_the_heads() -> None:
    sizes = {}
    for share in (0.0, 0.5, 1.0):
        config = kv_only(INT8, INT8, INT8, sinks=0, int8_head_share=share)
        model = ChunkWiseModel(build("llama"), adapter("llama"), config)
        model.generate(**prompts((300,)), max_new_tokens=2, do_sample=False)
        sizes[share] = trace_of(model).kv_bytes / trace_of(model).kv_bytes_full
    head_dim = 8
    assert sizes[1.0] == pytest.approx((head_dim + 2) / (4 * head_dim), abs=0.1)
    assert sizes[0.5] == pytest.approx((sizes[0.0] + sizes[1.0]) / 2, abs=0.02)


# Decisions that the engine does not carry out are named


@pytest.mark.parametrize(
    ("architecture", "note"),
    [("bloom", "ALiBi"), ("falcon_alibi", "ALiBi"), ("mistral", "sliding"), ("gemma3", "sliding")],
)
def test_decisions_that_the_engine_leaves_undone_are_named(
    architecture: str, note: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = ChunkWiseModel(build(architecture), adapter(architecture), kv_only(*POLICIES["all"]))
    greedy_tokens, logits = greedy(model, prompts(), 24)
    assert note in "".join(trace_of(model).kv_notes)
    assert note in caplog.text
    if architecture != "gemma3":
        expected_tokens, expected_logits = greedy(peft_model(architecture), prompts(), 24)
        assert torch.equal(greedy_tokens, expected_tokens)
        assert (logits - expected_logits).abs().max() < 1e-4
        assert trace_of(model).kv_bytes == trace_of(model).kv_bytes_full


@pytest.mark.parametrize("reason", ["eager attention", "no fast attention", "falcon", "gpt_neo"])
def test_a_cache_that_attention_reads_in_another_way_is_kept_whole_and_this_is_named(
    reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    architecture = reason if reason in ("falcon", "gpt_neo") else "llama"
    base = build(architecture)
    if reason == "eager attention":
        base.set_attn_implementation("eager")
    fast = FastPaths(attention=reason != "no fast attention")
    policy = LevelKVPolicy(precision="int8", evict="snapkv", keep_share=0.5)
    model = ChunkWiseModel(base, adapter(architecture), kv_only(policy, policy, policy), fast)
    tokens, logits = greedy(model, prompts(), 40)
    (note,) = trace_of(model).kv_notes
    assert "not carried out: the" in note and note in caplog.text
    assert trace_of(model).kv_bytes >= trace_of(model).kv_bytes_full
    expected_tokens, expected_logits = greedy(peft_model(architecture), prompts(), 40)
    assert torch.equal(tokens, expected_tokens)
    assert (logits - expected_logits).abs().max() < 1e-4


def test_there_is_no_note_if_all_decisions_are_carried_out() -> None:
    model = ChunkWiseModel(build("llama"), adapter("llama"), kv_only(*POLICIES["all"]))
    model.generate(**prompts(), max_new_tokens=4)
    assert trace_of(model).kv_notes == ()


# Duplicates


def test_a_repeated_token_is_dropped_if_keys_do_not_depend_on_position() -> None:
    base = build("llama")
    for layer in base.model.layers:
        layer.self_attn.q_proj.weight.data.zero_()
    base.model.rotary_emb.inv_freq.zero_()
    policy = LevelKVPolicy(duplicate_similarity=0.9999)
    model = ChunkWiseModel(base, adapter("llama"), kv_only(policy, policy, policy, sinks=0))
    repeated, varied = torch.full((1, 60), 7), torch.arange(2, 62)[None]
    held = {}
    for name, prompt in {"repeated": repeated, "varied": varied}.items():
        model.generate(prompt, max_new_tokens=2, do_sample=False)
        held[name] = trace_of(model).kv_bytes / trace_of(model).kv_bytes_full
    assert held["varied"] >= 1
    assert held["repeated"] < 0.8


# The cache alone


@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=8, max_size=8),
    scale=st.sampled_from([1e-6, 1e-3, 1.0, 100.0]),
)
def test_the_error_of_int8_is_at_most_half_a_step(values: list[float], scale: float) -> None:
    states = scale * torch.tensor(values)
    codes, scales = quantise(states)
    assert codes.dtype == torch.int8 and scales.dtype == torch.bfloat16
    step = float(scales)
    assert step == pytest.approx(float(states.abs().max()) / 127, rel=2**-8, abs=torch.finfo(torch.float32).tiny)
    assert (roundtrip(states) - states).abs().max() <= step * (0.5 + 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_pool_reads_back_its_states_within_one_percent(dtype: torch.dtype) -> None:
    states = torch.randn(2, 4, 9, 8).to(dtype)
    pool = Int8Pool(states, torch.tensor([1, 3]))
    for part in states.split(3, dim=2):
        pool.append(part, room=2)
    hot = torch.randn(2, 4, 1, 8).to(dtype)
    assert torch.equal(pool.read(hot)[:, :, 9:], hot)
    nothing = hot[:, :, :0]
    held = pool.read(nothing)
    assert held.dtype == dtype
    assert torch.equal(held[:, [0, 2]], states[:, [0, 2]]), "heads that are not INT8 are exact"
    error = (held - states).float().abs().amax(-1) / states.float().abs().amax(-1)
    assert 0 < error[:, [1, 3]].max() < 0.012
    assert torch.equal(pool.read(nothing)[1], held[1])
    pool.pick(torch.tensor([[0, 8], [3, 4]]))
    assert torch.equal(pool.read(nothing), torch.stack([held[0, :, [0, 8]], held[1, :, [3, 4]]]))
    pool.select(torch.tensor([1, 1, 0]))
    assert torch.equal(pool.read(hot[[1, 1, 0], :, :0])[2], held[0, :, [0, 8]])


def test_int8_is_used_for_the_heads_with_the_least_error() -> None:
    states = torch.randn(1, 4, 20, 8)
    states[:, [0, 2], :, 0] *= 1000  # one large number leaves few INT8 steps for the others
    states[:, [0, 2], :, 1:] *= 0.5
    layer = ChunkWiseLayer(int8_head_share=0.5)
    layer.update(states, states)
    slots = torch.arange(20)[None]
    layer.rearrange(to_cold=slots[:, :10], hot=slots[:, 10:])
    seen, _ = layer.update(states[:, :, :0], states[:, :, :0])
    changed = (seen != states).any(-1).any(-1)[0]
    assert int(changed.sum()) == 2
    relative = ((roundtrip(states) - states).square().sum((0, 2, 3)) / states.square().sum((0, 2, 3))).argsort()
    assert set(changed.nonzero().flatten().tolist()) == set(relative[:2].tolist())


def test_zeros_survive_int8() -> None:
    assert not roundtrip(torch.zeros(2, 3, 4, 8)).any()


class Reference:
    """The cache of one sequence as a dictionary from tokens to keys."""

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}
        self.cold: set[int] = set()
        self.dropped: dict[int, int] = {}
        """For each dropped token, the number of tokens that the sequence had."""
        self.columns: list[int | None] = []
        """The token in each column of the input; None for padding."""

    @property
    def position(self) -> int:
        return sum(token is not None for token in self.columns)

    def add(self, keys: Tensor, padding: int) -> list[int]:
        tokens = list(range(self.position, self.position + len(keys)))
        self.keys |= dict(zip(tokens, keys, strict=True))
        self.columns += [*[None] * padding, *tokens]
        return tokens

    def carry_out(self, decision: KVDecision) -> None:
        for token in range(decision.start, decision.end):
            if decision.action == "drop":
                self.dropped[token] = self.position
                self.keys.pop(token, None)
            elif decision.action == "int8" and token in self.keys and token not in self.cold:
                self.keys[token] = roundtrip(self.keys[token])
                self.cold.add(token)

    def is_exact(self, columns: int) -> bool:
        """Whether a cache of this number of columns would hold the same tokens."""
        length = sum(token is not None for token in self.columns[:columns])
        return all(token >= length or when <= length for token, when in self.dropped.items())

    def crop(self, columns: int) -> None:
        self.columns = self.columns[:columns]
        for held in (self.keys, self.dropped):
            for token in [token for token in held if token >= self.position]:
                del held[token]
        self.cold = {token for token in self.cold if token < self.position}


def as_set(keys: Iterator[Tensor]) -> set[tuple[float, ...]]:
    return {tuple(key.flatten().tolist()) for key in keys}


class Both:
    """A cache and its references, changed in the same way."""

    def __init__(self, data: st.DataObject, int8_head_share: float = 1.0) -> None:
        self.draw = data.draw
        batch = self.draw(st.integers(1, 3))
        self.generator = torch.Generator().manual_seed(self.draw(st.integers(0, 1000)))
        self.cache = new_cache(int8_head_share)
        self.references = [Reference() for _ in range(batch)]

    @property
    def columns(self) -> int:
        return len(self.references[0].columns)

    def run_pass(self, check: bool = True) -> None:
        tokens = self.draw(st.integers(1, 2 if self.columns else 6))
        pads = [0 if self.columns else self.draw(st.integers(0, tokens - 1)) for _ in self.references]
        keys = torch.randn(len(pads), 2, tokens, 4, generator=self.generator)
        new = np.full((len(pads), tokens), NO_TOKEN)
        for row, (reference, pad) in enumerate(zip(self.references, pads, strict=True)):
            new[row, pad:] = reference.add(keys[row, :, pad:].transpose(0, 1), pad)
        visible = torch.from_numpy(run_pass(self.cache, new, [keys] * len(self.cache.layers)))
        for layer in self.cache.chunkwise_layers if check else ():
            for row, (seen_keys, seen_values) in enumerate(zip(*layer.read(), strict=True)):
                held = seen_keys[:, visible[row]].transpose(0, 1)
                assert as_set(iter(held)) == as_set(iter(self.references[row].keys.values()))
                assert torch.allclose(seen_values[:, visible[row]].transpose(0, 1), 2 * held)

    def carry_out(self) -> None:
        decisions: list[list[KVDecision]] = []
        for reference in self.references:
            spans = self.draw(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 5)), max_size=2))
            # Drops come last, because expiry follows the decisions for closed chunks.
            actions = sorted((self.draw(st.sampled_from(["keep", "int8", "drop"])) for _ in spans), key="drop".__eq__)
            decisions.append(
                [KVDecision(s, min(s + n, reference.position), a) for (s, n), a in zip(spans, actions, strict=True)]
            )
            for decision in decisions[-1]:
                reference.carry_out(decision)
        self.cache.carry_out(decisions)

    def select(self) -> None:
        kind = self.draw(st.sampled_from(["reorder", "repeat", "indices", "flags"]))
        batch = len(self.references)
        if kind == "repeat":
            repeats = self.draw(st.integers(1, 2))
            order = [row for row in range(batch) for _ in range(repeats)]
            self.cache.batch_repeat_interleave(repeats)
        elif kind == "flags":
            flags = [row == 0 or self.draw(st.booleans()) for row in range(batch)]
            order = [row for row in range(batch) if flags[row]]
            self.cache.batch_select_indices(torch.tensor(flags))
        else:
            size = batch if kind == "reorder" else self.draw(st.integers(1, 3))
            order = [self.draw(st.integers(0, batch - 1)) for _ in range(size)]
            act = self.cache.reorder_cache if kind == "reorder" else self.cache.batch_select_indices
            act(torch.tensor(order))
        self.references = [copy.deepcopy(self.references[row]) for row in order]

    def crop(self) -> None:
        columns = self.draw(st.integers(1, self.columns))
        exact = [n for n in range(columns + 1) if all(reference.is_exact(n) for reference in self.references)]
        if exact[-1] < columns:
            with pytest.raises(EngineError, match=f"keep {exact[-1]} and run the others again"):
                self.cache.crop(columns)
            columns = exact[-1]
        self.cache.crop(self.draw(st.sampled_from([columns or -self.columns, columns - self.columns])))
        for reference in self.references:
            reference.crop(columns)


@given(data=st.data())
def test_random_calls_change_the_cache_exactly_as_the_reference(data: st.DataObject) -> None:
    both = Both(data)
    both.run_pass()
    for _ in range(data.draw(st.integers(1, 8))):
        getattr(both, data.draw(st.sampled_from(["run_pass", "carry_out", "select", "crop"])))()
        assert both.cache.get_seq_length() == both.cache.get_seq_length(1) == both.columns
    both.run_pass()


@pytest.mark.parametrize("share", [0.5, 1.0])
@given(data=st.data())
def test_storage_is_never_above_105_percent_of_a_full_cache(share: float, data: st.DataObject) -> None:
    both = Both(data, share)
    for _ in range(data.draw(st.integers(1, 40))):
        both.run_pass(check=False)
        assert both.cache.used_nbytes <= both.cache.nbytes <= 1.05 * both.cache.full_nbytes
        both.carry_out()
        assert both.cache.used_nbytes <= both.cache.nbytes <= 1.05 * both.cache.full_nbytes


def test_storage_of_a_long_text_is_seldom_copied() -> None:
    layer = ChunkWiseLayer()
    addresses = []
    for _ in range(1000):
        layer.update(*torch.randn(2, 1, 2, 1, 4))
        addresses.append(layer.keys.shape[2])
    assert len(set(addresses[500:])) < 20


def cache_of(tokens: int, record_queries: bool = False) -> ChunkWiseCache:
    """A cache of one sequence, filled in one pass."""
    cache = new_cache(record_queries=record_queries)
    run_pass(cache, np.arange(tokens)[None], torch.randn(2, 1, 2, tokens, 4))
    return cache


def tokens_in_use(cache: ChunkWiseCache) -> int:
    return int(cache._slots.visible(np.empty((1, 0), bool)).sum())


@pytest.mark.parametrize("policy", ["near_duplicates", "snapkv"])
def test_a_crop_into_a_chunk_that_was_scored_is_refused_and_one_at_its_start_scores_it_again(policy: str) -> None:
    cache = cache_of(20, record_queries=policy == "snapkv")
    chunks = [KVDecision(a, b, "keep", evict=policy, keep_share=0.5) for a, b in ((2, 8), (8, 14))]
    cache.carry_out([chunks])
    assert tokens_in_use(cache) == 20 - 3 - 3
    for length in (3, 8, 14):  # the next token closes a chunk
        with pytest.raises(EngineError, match=rf"crop\({length}\): .* keep 2 and run the others again"):
            cache.crop(length)
    cache.crop(15)
    cache.carry_out([chunks])
    assert tokens_in_use(cache) == 15 - 3 - 3, "a plan that runs again scores no chunk twice"
    cache.crop(2)
    run_pass(cache, np.arange(2, 15)[None], torch.randn(2, 1, 2, 13, 4))
    cache.carry_out([chunks])
    assert tokens_in_use(cache) == 15 - 3 - 3


def test_a_crop_keeps_int8_and_frees_the_memory_of_what_it_forgets() -> None:
    cache = cache_of(400)
    cache.carry_out([[KVDecision(4, 300, "int8")]])
    before = cache.nbytes
    cache.crop(200)
    assert cache.nbytes < 0.55 * before
    assert [layer.cold[0].used for layer in cache.chunkwise_layers if layer.cold] == [196, 196]
    assert cache.full_nbytes == 2 * 2 * 200 * 2 * 4 * 4


def test_a_window_that_has_slid_cannot_be_cropped_and_the_cache_stays_as_it_was() -> None:
    model = ChunkWiseModel(build("gemma3"), adapter("gemma3"), kv_only(*POLICIES["int8"]))
    cache = model.generate(**prompts((20,)), max_new_tokens=8, return_dict_in_generate=True).past_key_values
    with pytest.raises(EngineError, match=r"crop\(20\): a DynamicSlidingWindowLayer cannot be cropped: "):
        cache.crop(20)
    assert {layer.get_seq_length() for layer in cache.layers} == {27}
    cache = model.generate(**prompts((8,)), max_new_tokens=4, return_dict_in_generate=True).past_key_values
    cache.crop(8)
    assert {layer.get_seq_length() for layer in cache.layers} == {8}


def test_a_cache_that_was_reset_is_as_new() -> None:
    cache = cache_of(40, record_queries=True)
    cache.carry_out([[KVDecision(2, 30, "int8"), KVDecision(2, 8, "drop")]])
    cache.reset()
    assert cache.get_seq_length() == cache.used_nbytes == cache.full_nbytes == 0
    run_pass(cache, np.arange(12)[None].repeat(3, 0), torch.randn(2, 3, 2, 12, 4))
    cache.carry_out([[KVDecision(0, 9, "keep", evict="snapkv", keep_share=0.5)]] * 3)
    assert cache.chunkwise_layers[0].seen == 12


# What a pass must do, so that slots may move


def test_a_pass_that_leaves_out_the_cache_or_runs_twice_is_an_error() -> None:
    cache = cache_of(6)
    with pytest.raises(EngineError, match=r"should hold 7 tokens per sequence .* layers hold 6; the model does not"):
        cache.check_used(1)
    for index in range(2):
        cache.update(torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4), index)
    cache.check_used(1)
    cache.update(torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4), 1)
    with pytest.raises(EngineError, match="layers hold 7, 8"):
        cache.check_used(1)


def test_layers_that_a_model_never_uses_are_left_out() -> None:
    cache = new_cache()
    cache.slot_mask(np.ones((1, 30), bool))
    cache.update(torch.randn(1, 2, 30, 4), torch.randn(1, 2, 30, 4), 1)
    cache.layers[1].note_reading(torch.randn(1, 2, 30, 4), None, 0.5)
    cache.check_used(30)
    cache.note(np.arange(30)[None])
    cache.carry_out([[KVDecision(0, 20, "int8")]])
    assert cache.layers[1].cold is not None and cache.layers[1].hot == 10


def test_a_model_with_attention_code_of_its_own_moves_no_slots_whatever_its_signature_promises() -> None:
    model = build("gpt_neo")
    cache = ChunkWiseCache(model.config, 1.0, carries_out=True)
    model.config._attn_implementation = attention.NAME
    cache.slot_mask(np.ones((1, 30), bool))
    with torch.no_grad():
        model(prompts((30,))["input_ids"], **{versions.CACHE: cache})
    cache.check_used(30)
    cache.note(np.arange(30)[None])
    cache.carry_out([[KVDecision(2, 28, "int8")]])
    assert "does not read its cache through the engine's attention function" in cache.notes[0]
    assert cache.used_nbytes == cache.full_nbytes


def test_layers_that_read_the_cache_of_another_layer_see_what_is_left_of_it() -> None:
    config, ids = kv_only(*POLICIES["all"]), prompts((27,))["input_ids"]
    model = ChunkWiseModel(build("gemma3n"), adapter("gemma3n"), config)
    tokens, logits = greedy(model, {"input_ids": ids}, 24)
    expected_tokens, expected_logits, hidden = slow_generation("gemma3n", config, ids[0], 24)
    assert hidden and torch.equal(tokens[0], expected_tokens)
    assert (logits[0] - expected_logits).abs().max() < 0.05


WRONG_MASKS: dict[str, Tensor | None] = {
    "of another size": torch.ones(1, 1, 1, 12, dtype=torch.bool),
    "that hides a slot": torch.arange(13)[None, None, None] != 5,
    "with a bias by position": -torch.arange(13.0)[None, None, None].flip(-1),
}


@pytest.mark.parametrize("mask", WRONG_MASKS.values(), ids=WRONG_MASKS)
def test_a_mask_that_is_not_over_the_slots_keeps_them_in_place_and_once_they_have_moved_it_is_an_error(
    mask: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    cache, moved = cache_of(12), cache_of(12)
    moved.carry_out([[KVDecision(2, 10, "int8")]])
    for held in (cache, moved):
        held.slot_mask(np.ones((1, 1), bool))
        for index in range(2):
            held.update(*torch.randn(2, 1, 2, 1, 4), index)
    with pytest.raises(EngineError, match="have moved the cache's entries, but the model's attention masks are not"):
        moved.chunkwise_layers[0].note_reading(torch.randn(1, 2, 1, 4), mask, 0.5)
    for layer in cache.chunkwise_layers:
        layer.note_reading(torch.randn(1, 2, 1, 4), mask, 0.5)
    cache.note(np.array([[12]]))
    assert cache.notes == ()
    cache.carry_out([[KVDecision(2, 10, "int8")]])
    (note,) = cache.notes
    assert "not carried out: the model's attention masks" in note and note in caplog.text
    assert cache.nbytes >= cache.full_nbytes


def test_without_a_mask_attention_sees_all_slots() -> None:
    cache = cache_of(40)
    cache.carry_out([[KVDecision(2, 40, "int8")]])
    for new, right in (([[True]], True), ([[False]], False), ([[True, True]], False)):
        cache.slot_mask(np.array(new))
        query = torch.randn(1, 2, len(new[0]), 4)
        with nullcontext() if right else pytest.raises(EngineError, match="masks are not over the slots"):
            cache.chunkwise_layers[0].note_reading(query, None, 0.5)


def test_a_pass_that_was_not_planned_or_reads_moved_slots_in_another_way_is_an_error() -> None:
    cache = cache_of(12)
    cache.carry_out([[KVDecision(2, 10, "int8")]])
    with pytest.raises(EngineError, match="in a pass that was not planned"):
        cache.chunkwise_layers[0].note_reading(torch.randn(1, 2, 1, 4), None, 0.5)
    cache.slot_mask(np.ones((1, 1), bool))
    for index in range(2):
        cache.update(*torch.randn(2, 1, 2, 1, 4), index)
    with pytest.raises(EngineError, match="does not read its cache through the engine's attention function"):
        cache.note(np.array([[12]]))


def test_a_long_generation_needs_no_more_memory_than_a_short_one() -> None:
    window = LevelKVPolicy(precision="int8", max_age=200)
    config = kv_only(window, window, window)
    model = ChunkWiseModel(build("llama"), adapter("llama"), config)
    held, token = [], torch.tensor([[5]])
    with torch.no_grad(), model.stream() as call:
        for step in range(1500):
            logits = model.model(token, **{versions.CACHE: call.cache}, use_cache=True).logits[0, -1]
            token = (logits + torch.randn(VOCABULARY)).argmax()[None, None]
            if step % 500 == 499:
                held.append((call.cache.nbytes, call.cache.chunkwise_layers[0].slots))
    assert call.cache.get_seq_length() == 1500
    assert max(slots for _, slots in held) < 200 * 9 / 8 + 40
    assert max(nbytes for nbytes, _ in held[1:]) < 1.3 * held[0][0]
