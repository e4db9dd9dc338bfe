"""The cache carries out KV decisions exactly, changes nothing else, and reports the bytes that it really uses."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from chunkwise_lora import ChunkWiseConfig, ChunkWiseModel, RankLadder, RuntimeScheduler, Trace
from chunkwise_lora.engines.transformers.cache import NO_TOKEN, ChunkWiseCache, ChunkWiseLayer, Int8Pool, quantise
from chunkwise_lora.method.config import (
    ChunkingConfig,
    CompositionConfig,
    KVCacheConfig,
    LevelKVPolicy,
    SelectionConfig,
)
from chunkwise_lora.method.kv_policy import KVDecision
from models import FAST, PAD, VOCABULARY, adapter, build, greedy, peft_model, prompts

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
    full = [layer for layer in cache.layers if not isinstance(layer, DynamicSlidingWindowLayer)]
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
                input_ids=new[None], attention_mask=mask, position_ids=positions, past_key_values=cache
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
    with torch.no_grad(), model.stream(batch=2, prompt_columns=20) as session:
        scored = [
            model.model(input_ids=piece, past_key_values=session.cache, use_cache=True).logits[:, -1]
            for piece in pieces
        ]
        trace = session.trace()
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
        with torch.no_grad(), model.stream(prompt_columns=prompt_tokens) as session:
            for piece in (ids[:prompt_tokens], *ids[prompt_tokens:].split(1)):
                model.model(input_ids=piece[None], past_key_values=session.cache)
            (alone,) = session.trace().sequences
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
    with torch.no_grad(), model.stream(prompt_columns=12) as session:
        log_p = [
            model.model(input_ids=piece[None], past_key_values=session.cache).logits[0, -1].log_softmax(-1)
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
    assert trace_of(model).kv_bytes == sum(held.values())


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
    sizes = []
    for new_tokens in (80, 160, 320):
        model.generate(**prompts((8,)), max_new_tokens=new_tokens, do_sample=False)
        sizes.append(trace_of(model).kv_bytes)
    assert max(sizes) < 1.3 * sizes[0]


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
        pool.append(part)
    held = pool.read(dtype)
    assert held.dtype == dtype
    assert torch.equal(held[:, [0, 2]], states[:, [0, 2]]), "heads that are not INT8 are exact"
    error = (held - states).float().abs().amax(-1) / states.float().abs().amax(-1)
    assert 0 < error[:, [1, 3]].max() < 0.012
    assert torch.equal(pool.read(dtype)[1], held[1])
    pool.pick(torch.tensor([[0, 8], [3, 4]]))
    assert torch.equal(pool.read(dtype), torch.stack([held[0, :, [0, 8]], held[1, :, [3, 4]]]))
    pool.select(torch.tensor([1, 1, 0]))
    assert torch.equal(pool.read(dtype)[2], held[0, :, [0, 8]])


def test_int8_is_used_for_the_heads_with_the_least_error() -> None:
    states = torch.randn(1, 4, 20, 8)
    states[:, [0, 2], :, 0] *= 1000  # one large number leaves few INT8 steps for the others
    states[:, [0, 2], :, 1:] *= 0.5
    layer = ChunkWiseLayer(int8_head_share=0.5)
    layer.update(states, states)
    slots = torch.arange(20)[None]
    layer.quantise(slots[:, :10])
    layer.sweep(None, slots[:, 10:])
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
        self.position = 0

    def add(self, keys: Tensor) -> list[int]:
        tokens = list(range(self.position, self.position + len(keys)))
        self.keys |= dict(zip(tokens, keys, strict=True))
        self.position += len(keys)
        return tokens

    def carry_out(self, decision: KVDecision) -> None:
        for token in range(decision.start, decision.end):
            if decision.action == "drop":
                self.keys.pop(token, None)
            elif decision.action == "int8" and token in self.keys and token not in self.cold:
                self.keys[token] = roundtrip(self.keys[token])
                self.cold.add(token)


def as_set(keys: Iterator[Tensor]) -> set[tuple[float, ...]]:
    return {tuple(key.flatten().tolist()) for key in keys}


@given(data=st.data())
def test_random_decisions_change_the_cache_exactly_as_the_reference(data: st.DataObject) -> None:
    heads, width, batch = 2, 4, data.draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    model_config = build("llama").config
    cache = ChunkWiseCache(model_config, 1.0, carries_out=True)
    references = [Reference() for _ in range(batch)]
    columns: list[np.ndarray] = []
    for step in range(data.draw(st.integers(1, 6))):
        tokens = data.draw(st.integers(1, 6)) if step == 0 else data.draw(st.integers(1, 2))
        pads = [data.draw(st.integers(0, tokens - 1)) if step == 0 else 0 for _ in range(batch)]
        keys = torch.randn(batch, heads, tokens, width, generator=generator)
        new = np.full((batch, tokens), NO_TOKEN)
        for row, reference in enumerate(references):
            new[row, pads[row] :] = reference.add(keys[row, :, pads[row] :].transpose(0, 1))
        columns.append(new != NO_TOKEN)
        mask = cache.slot_mask(columns[-1])
        for layer in range(len(cache.layers)):
            seen_keys, seen_values = cache.update(keys, 2 * keys, layer)
            for row, reference in enumerate(references):
                # Without a mask, slots are the columns of the input.
                used = torch.from_numpy(np.concatenate(columns, axis=1)[row] if mask is None else mask[row])
                held = seen_keys[row][:, used].transpose(0, 1)
                assert as_set(iter(held)) == as_set(iter(reference.keys.values()))
                assert torch.allclose(seen_values[row][:, used].transpose(0, 1), 2 * held)
        cache.note(new)
        decisions: list[list[KVDecision]] = []
        for reference in references:
            spans = data.draw(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 5)), max_size=2))
            # Drops come last, because expiry follows the decisions for closed chunks.
            actions = sorted((data.draw(st.sampled_from(["keep", "int8", "drop"])) for _ in spans), key="drop".__eq__)
            decisions.append(
                [KVDecision(s, min(s + n, reference.position), a) for (s, n), a in zip(spans, actions, strict=True)]
            )
            for decision in decisions[-1]:
                reference.carry_out(decision)
        cache.carry_out(decisions)
        if data.draw(st.booleans()):
            order = [data.draw(st.integers(0, batch - 1)) for _ in range(batch)]
            cache.reorder_cache(torch.tensor(order))
            references = [copy.deepcopy(references[row]) for row in order]
            columns = [part[order] for part in columns]
    assert cache.get_seq_length() == cache.layers[0].seen


def test_a_long_generation_needs_no_more_memory_than_a_short_one() -> None:
    window = LevelKVPolicy(precision="int8", max_age=200)
    config = kv_only(window, window, window)
    model = ChunkWiseModel(build("llama"), adapter("llama"), config)
    held, token = [], torch.tensor([[5]])
    with torch.no_grad(), model.stream() as session:
        for step in range(4000):
            logits = model.model(token, past_key_values=session.cache, use_cache=True).logits[0, -1]
            token = (logits + torch.randn(VOCABULARY)).argmax()[None, None]
            if step % 500 == 499:
                held.append((session.cache.nbytes, session.cache.chunkwise_layers[0].slots))
    assert session.cache.get_seq_length() == 4000
    assert max(slots for _, slots in held) < 200 * 9 / 8 + 40
    assert max(nbytes for nbytes, _ in held[1:]) < 1.3 * held[0][0]
