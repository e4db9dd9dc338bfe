"""The five components and the scheduler work in streaming, are causal and keep the bounds of their docstrings."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from chunkwise_lora import ChunkWiseConfig, ConfigError, RuntimeScheduler
from chunkwise_lora.method.chunking import AdaptiveChunker, Chunk
from chunkwise_lora.method.complexity import LearnedComplexity, TokenComplexityEstimator
from chunkwise_lora.method.composition import BoundarySafeComposer
from chunkwise_lora.method.config import (
    PRESETS,
    ChunkingConfig,
    ComplexityConfig,
    CompositionConfig,
    KVCacheConfig,
    LevelKVPolicy,
    SelectionConfig,
)
from chunkwise_lora.method.kv_policy import KVCachePolicyController, KVDecision
from chunkwise_lora.method.selection import RankScaleSelector, Selection
from chunkwise_lora.method.signals import SIGNAL_REGISTRY, Signal, register_signal

VOCABULARY = 50
RUNG_RANKS = tuple(float(rank) for rank in range(9))

LIVELY = ChunkWiseConfig(
    complexity=ComplexityConfig(ngram=2, window=9, half_life=8),
    chunking=ChunkingConfig(min_length=2, max_length=6, thresholds=(0.4, 0.6), hysteresis=0.01, memory=2),
    selection=SelectionConfig(rank_shares=(0.0, 0.5, 1.0), scales=(1.0, 1.5, 0.5)),
    kv_cache=KVCacheConfig(
        levels=(
            LevelKVPolicy(precision="int8", duplicate_similarity=0.9, max_age=7),
            LevelKVPolicy(max_age=15),
            LevelKVPolicy(precision="int8"),
        ),
        sinks=3,
    ),
)
CONFIGS = {**PRESETS, "lively": LIVELY}

tokens_and_entropies = st.lists(
    st.tuples(st.integers(0, VOCABULARY - 1) | st.integers(0, 3), st.none() | st.floats(0, 5)), min_size=1, max_size=150
)
scores = st.lists(st.floats(0, 1) | st.sampled_from([0.0, 0.4, 0.5, 0.6, 1.0]), min_size=1, max_size=200)


@st.composite
def chunkings(draw: st.DrawFn) -> ChunkingConfig:
    shortest = draw(st.integers(1, 8))
    return ChunkingConfig(
        min_length=shortest,
        max_length=draw(st.integers(shortest, 20)),
        thresholds=tuple(sorted(draw(st.sets(st.floats(0.05, 0.95), max_size=4)))),
        hysteresis=draw(st.floats(0, 0.2)),
        memory=draw(st.floats(1, 10)),
        hard_share=draw(st.floats(0, 1)),
    )


def splits(draw: st.DrawFn, length: int) -> list[tuple[int, int]]:
    cuts = sorted(draw(st.sets(st.integers(1, max(length - 1, 1)), max_size=12)))
    return list(pairwise([0, *(cut for cut in cuts if cut < length), length]))


def run(
    config: ChunkWiseConfig, stream: Sequence[tuple[int, float | None]], pieces: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, list[KVDecision], RuntimeScheduler]:
    scheduler = RuntimeScheduler(config, RUNG_RANKS, VOCABULARY)
    plans = []
    for start, end in pieces:
        tokens, entropies = zip(*stream[start:end], strict=True)
        plans.append(scheduler.step(tokens, entropies))
    decisions = [decision for plan in plans for decision in plan.decisions]
    return np.concatenate([plan.weights for plan in plans]), decisions, scheduler


# The scheduler


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@given(data=st.data(), stream=tokens_and_entropies)
def test_any_split_of_the_tokens_gives_the_same_plan(
    config: ChunkWiseConfig, data: st.DataObject, stream: list[tuple[int, float | None]]
) -> None:
    pieces = data.draw(st.composite(splits)(len(stream)))
    whole, cut = run(config, stream, [(0, len(stream))]), run(config, stream, pieces)
    assert np.array_equal(whole[0], cut[0])
    assert whole[1] == cut[1]
    assert whole[2].chunks == cut[2].chunks


@pytest.mark.parametrize("learned", [False, True], ids=["signals", "learned"])
@pytest.mark.parametrize("known", [False, True], ids=["no entropies", "entropies"])
@settings(max_examples=10)
@given(seed=st.integers(0, 2**31), length=st.integers(1, 1300))
def test_a_long_prompt_is_planned_at_once_as_token_by_token(learned: bool, known: bool, seed: int, length: int) -> None:
    rng = np.random.default_rng(seed)
    tokens = np.minimum(rng.zipf(1.3, length), VOCABULARY + 3).tolist()
    entropies = rng.choice([0.0, 0.5, 3.9], length).tolist() if known else [None] * length
    model = LearnedComplexity(*(rng.normal(size=size).astype(np.float32) for size in (VOCABULARY, VOCABULARY, 4, 4)))
    config = LIVELY.model_copy(update={"complexity": ComplexityConfig(window=200, learned=learned)})
    whole, single = (RuntimeScheduler(config, RUNG_RANKS, VOCABULARY, model) for _ in range(2))
    plan = whole.step(tokens, entropies)
    steps = [single.step([token], [entropy]) for token, entropy in zip(tokens, entropies, strict=True)]
    assert np.array_equal(plan.weights, np.concatenate([step.weights for step in steps]))
    assert plan.decisions == [decision for step in steps for decision in step.decisions]
    assert whole.chunks == single.chunks


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@given(data=st.data(), stream=tokens_and_entropies)
def test_later_tokens_do_not_change_earlier_plans(
    config: ChunkWiseConfig, data: st.DataObject, stream: list[tuple[int, float | None]]
) -> None:
    kept = data.draw(st.integers(0, len(stream)))
    other = stream[:kept] + data.draw(tokens_and_entropies)
    one_by_one = [(i, i + 1) for i in range(len(stream))]
    first = run(config, stream, one_by_one)
    second = run(config, other, [(i, i + 1) for i in range(len(other))])
    assert np.array_equal(first[0][:kept], second[0][:kept])
    if kept:
        prefix = run(config, stream[:kept], one_by_one[:kept])
        assert first[1][: len(prefix[1])] == prefix[1] == second[1][: len(prefix[1])]


@given(stream=tokens_and_entropies)
def test_chunks_tile_the_sequence_and_the_weights_follow_their_selections(
    stream: list[tuple[int, float | None]],
) -> None:
    weights, _, scheduler = run(LIVELY, stream, [(0, len(stream))])
    chunks = [scheduled.chunk for scheduled in scheduler.chunks]
    assert chunks[0].start == 0
    assert all(chunk.end == following.start for chunk, following in pairwise(chunks))
    assert chunks[-1].end is None
    for scheduled, end in zip(scheduler.chunks, [*(c.start for c in chunks[1:]), len(stream)], strict=True):
        settled = weights[scheduled.chunk.start + LIVELY.composition.window : end]
        expected = np.zeros(len(RUNG_RANKS), np.float32)
        expected[scheduled.selection.rung] = scheduled.selection.scale
        assert (settled == expected).all() or scheduled is scheduler.chunks[0]


@given(stream=tokens_and_entropies)
def test_lossless_gives_every_token_the_full_rank_and_decides_nothing(stream: list[tuple[int, float | None]]) -> None:
    weights, decisions, _ = run(PRESETS["lossless"], stream, [(0, len(stream))])
    assert (weights[:, -1] == 1).all() and not weights[:, :-1].any()
    assert all(decision.action == "keep" and decision.duplicate_similarity is None for decision in decisions)


def test_a_step_without_tokens_changes_no_later_plan() -> None:
    scheduler = RuntimeScheduler(LIVELY, RUNG_RANKS, VOCABULARY)
    plan = scheduler.step([])
    assert plan.weights.shape == (0, len(RUNG_RANKS))
    assert (plan.decisions, scheduler.chunks, scheduler.position) == ([], [], 0)


# 1 TokenComplexityEstimator


def slow_scores(config: ComplexityConfig, tokens: Sequence[int], entropies: Sequence[float | None]) -> list[float]:
    """The scores by the definition of every signal, computed from the whole past."""

    def age(position: int, length: int) -> float:
        ngram = tokens[position - length + 1 : position + 1]
        ends = [e for e in range(length - 1, position) if tokens[e - length + 1 : e + 1] == ngram]
        return position - ends[-1] if ends else math.inf

    scores = []
    for position, entropy in enumerate(entropies):
        ages = [age(position, n) for n in range(1, min(config.ngram, position + 1) + 1)]
        signals = {
            "novelty": np.mean([a > config.window for a in ages]),
            "attention": min(1.0, math.log(1 + ages[0]) / math.log(1 + config.window)),
            "position": 0.5 ** (position / config.half_life),
        }
        if entropy is not None:
            signals["entropy"] = min(1.0, entropy / math.log(VOCABULARY))
        total = sum(getattr(config, name) for name in signals)
        scores.append(sum(getattr(config, name) * value for name, value in signals.items()) / total if total else 0.5)
    return scores


weight = st.just(0.0) | st.floats(0.01, 10)


@given(
    stream=tokens_and_entropies,
    weights=st.tuples(weight, weight, weight, weight).filter(any),
    ngram=st.integers(1, 4),
    window=st.integers(1, 40),
)
def test_scores_equal_the_definition_of_the_four_signals(
    stream: list[tuple[int, float | None]], weights: tuple[float, ...], ngram: int, window: int
) -> None:
    entropy, novelty, attention, position = weights
    config = ComplexityConfig(
        entropy=entropy, novelty=novelty, attention=attention, position=position, ngram=ngram, window=window
    )
    tokens, entropies = (list(part) for part in zip(*stream, strict=True))
    scores = TokenComplexityEstimator(config, VOCABULARY).update(tokens, entropies)
    assert scores == pytest.approx(slow_scores(config, tokens, entropies))
    assert all(0 <= score <= 1 + 1e-12 for score in scores)


@pytest.mark.parametrize("entropy", [-1.0, 0.0, 1e9])
def test_an_entropy_out_of_range_stays_a_score_in_range(entropy: float) -> None:
    assert 0 <= TokenComplexityEstimator(ComplexityConfig(), VOCABULARY).update([1], [entropy])[0] <= 1


def test_an_unknown_entropy_is_left_out_and_does_not_count_as_zero() -> None:
    only_entropy = ComplexityConfig(entropy=1, novelty=0, attention=0, position=0)
    assert TokenComplexityEstimator(only_entropy, VOCABULARY).update([1, 1], [None, 0.0]) == [0.5, 0.0]
    unknown = TokenComplexityEstimator(ComplexityConfig(), VOCABULARY).update([1], [None])
    assert unknown == TokenComplexityEstimator(ComplexityConfig(entropy=0), VOCABULARY).update([1], [3.0])


def test_a_repeated_text_is_easier_than_a_new_one() -> None:
    estimator = TokenComplexityEstimator(ComplexityConfig(position=0), VOCABULARY)
    new, again = (sum(estimator.update(list(range(20)), [None] * 20)) for _ in range(2))
    assert again < new / 2


def test_the_estimators_memory_is_bounded() -> None:
    estimator = TokenComplexityEstimator(ComplexityConfig(window=32), 10**6)
    sizes = []
    for start in range(0, 3200, 32):
        estimator.update(list(range(start, start + 32)), [None] * 32)
        sizes.append(len(pickle.dumps(estimator)))
    assert max(sizes[50:]) < 1.1 * max(sizes[10:50])


@pytest.fixture
def every_third_token() -> Iterator[str]:
    """The name of a registered signal by which every third token is hard."""

    @register_signal("every_third_token")
    @dataclass
    class EveryThirdToken(Signal):
        position: int = 0

        def update(self, token: int, entropy: float | None) -> float | None:
            self.position += 1
            return float(self.position % 3 == 0)

    yield "every_third_token"
    SIGNAL_REGISTRY.remove("every_third_token")


NO_PAPER_SIGNALS = {"entropy": 0.0, "novelty": 0.0, "attention": 0.0, "position": 0.0}


def test_a_registered_signal_scores_tokens_by_its_weight(every_third_token: str) -> None:
    alone = ComplexityConfig(**NO_PAPER_SIGNALS, signals={every_third_token: 2.0})
    assert TokenComplexityEstimator(alone, VOCABULARY).update([7] * 6, [None] * 6) == [0, 0, 1, 0, 0, 1]
    beside = ComplexityConfig(**{**NO_PAPER_SIGNALS, "novelty": 1.0}, signals={every_third_token: 3.0})
    assert TokenComplexityEstimator(beside, VOCABULARY).update([1, 2, 3], [None] * 3) == [0.25, 0.25, 1.0]


def test_a_config_with_a_registered_signal_survives_json_and_can_be_hashed(every_third_token: str) -> None:
    config = ChunkWiseConfig(complexity=ComplexityConfig(signals={every_third_token: 0.5}))
    again = ChunkWiseConfig.from_json(config.to_json())
    assert again == config
    assert hash(again) == hash(config)


def test_a_signal_that_is_not_registered_is_refused_with_the_known_names() -> None:
    with pytest.raises(ConfigError, match=r"'every_third_token' is not registered; registered are .*novelty.*Import"):
        ChunkWiseConfig.from_json('{"complexity": {"signals": {"every_third_token": 1}}}')


def test_learned_scores_refuse_signals_that_they_do_not_know(every_third_token: str) -> None:
    with pytest.raises(ConfigError, match="learned scores know only the paper's four signals"):
        ComplexityConfig(learned=True, signals={every_third_token: 1.0})


def test_a_registered_name_cannot_be_taken_by_another_signal() -> None:
    with pytest.raises(ConfigError, match=r"'novelty' is taken by .*Novelty; choose another name"):
        register_signal("novelty")(type("Other", (Signal,), {}))
    with pytest.raises(ConfigError, match="use lower-case letters"):
        register_signal("My Signal")


@pytest.mark.parametrize(
    ("needs_entropy", "weight", "expected"), [(True, 1.0, True), (True, 0.0, False), (False, 1.0, False)]
)
def test_entropies_are_computed_only_if_a_signal_in_use_reads_them(
    every_third_token: str, needs_entropy: bool, weight: float, expected: bool
) -> None:
    SIGNAL_REGISTRY.factory(every_third_token).needs_entropy = needs_entropy  # type: ignore[attr-defined]
    complexity = ComplexityConfig(entropy=0, signals={every_third_token: weight})
    assert ChunkWiseConfig(complexity=complexity).reads_entropy is expected


def test_a_signal_that_leaves_its_range_is_named() -> None:
    try:
        register_signal("too_large")(type("TooLarge", (Signal,), {"update": lambda self, token, entropy: 1.5}))
        estimator = TokenComplexityEstimator(ComplexityConfig(signals={"too_large": 1.0}), VOCABULARY)
        with pytest.raises(ConfigError, match=r"'too_large' gave 1.5; a signal must stay within 0 and 1"):
            estimator.update([1], [None])
    finally:
        SIGNAL_REGISTRY.remove("too_large")


# 2 AdaptiveChunker


@given(config=chunkings(), stream=scores)
def test_every_closed_chunk_is_within_its_length_bounds(config: ChunkingConfig, stream: list[float]) -> None:
    chunks = AdaptiveChunker(config).update(stream)
    starts = [chunk.start for chunk in dict.fromkeys(chunks)]
    assert all(config.min_length <= b - a <= config.max_length for a, b in pairwise(starts))
    assert len(stream) - starts[-1] <= config.max_length


@given(config=chunkings(), stream=scores)
def test_hard_tokens_stay_within_the_budget_at_any_time(config: ChunkingConfig, stream: list[float]) -> None:
    assume(config.thresholds)
    hard = 0
    for n, chunk in enumerate(AdaptiveChunker(config).update(stream), start=1):
        hard += chunk.level == len(config.thresholds)
        assert hard <= config.hard_share * n + config.max_length


@given(config=chunkings(), stream=scores)
def test_a_level_is_the_number_of_passed_thresholds_unless_the_budget_forbids_the_last(
    config: ChunkingConfig, stream: list[float]
) -> None:
    for chunk in AdaptiveChunker(config).update(stream):
        passed = sum(chunk.complexity >= threshold for threshold in config.thresholds)
        assert chunk.level == passed or (passed == len(config.thresholds) and chunk.level == passed - 1)
        assert 0 <= chunk.complexity <= 1


def test_the_budget_binds_when_every_token_is_hard() -> None:
    config = ChunkingConfig(thresholds=(0.5,), hard_share=0.25, min_length=2, max_length=4)
    levels = [chunk.level for chunk in AdaptiveChunker(config).update([1.0] * 400)]
    assert sum(levels) == pytest.approx(100, abs=4)


@given(wobble=st.lists(st.floats(-0.049, 0.049), min_size=1, max_size=100), threshold=st.sampled_from([0.3, 0.5, 0.7]))
def test_a_mean_that_varies_within_the_hysteresis_never_cuts_early(wobble: list[float], threshold: float) -> None:
    config = ChunkingConfig(thresholds=(threshold,), hysteresis=0.05, memory=1, min_length=1, max_length=16)
    chunks = AdaptiveChunker(config).update([threshold + w for w in wobble])
    assert {chunk.start for chunk in chunks} == set(range(0, len(wobble), 16))


@pytest.mark.parametrize("low_first", [True, False])
def test_a_clear_crossing_cuts_as_soon_as_the_chunk_is_long_enough(low_first: bool) -> None:
    config = ChunkingConfig(thresholds=(0.5,), hysteresis=0.05, memory=1, min_length=4, max_length=64, hard_share=1)
    first, second = (0.2, 0.8) if low_first else (0.8, 0.2)
    chunks = AdaptiveChunker(config).update([first] * 10 + [second] * 2 + [first] * 10)
    assert sorted({chunk.start for chunk in chunks}) == [0, 10, 14]
    assert [chunk.level for chunk in dict.fromkeys(chunks)] == ([0, 1, 0] if low_first else [1, 0, 1])


# 3 RankScaleSelector


@given(
    ranks=st.lists(st.floats(0, 64), min_size=1, max_size=9, unique=True).map(sorted),
    share=st.floats(0, 1),
    scale=st.floats(0, 4),
)
def test_the_selector_takes_the_rung_nearest_to_the_share(ranks: list[float], share: float, scale: float) -> None:
    selector = RankScaleSelector(SelectionConfig(rank_shares=(share,), scales=(scale,)), ranks)
    selection = selector.select(Chunk(0, 0, 0.5))
    nearest = min(abs(rank - share * ranks[-1]) for rank in ranks)
    assert abs(ranks[selection.rung] - share * ranks[-1]) == nearest
    assert selection.scale == scale


# 4 BoundarySafeComposer


@given(
    data=st.data(),
    window=st.integers(0, 5),
    selections=st.lists(st.builds(Selection, st.integers(0, 4), st.floats(0, 2)), min_size=1, max_size=8),
)
def test_weights_use_at_most_two_rungs_and_fade_evenly(
    data: st.DataObject, window: int, selections: list[Selection]
) -> None:
    composer = BoundarySafeComposer(CompositionConfig(window=window), rungs=5)
    lengths = [data.draw(st.integers(max(window, 1), window + 6)) for _ in selections]
    before = None
    for index, (selection, length) in enumerate(zip(selections, lengths, strict=True)):
        outgoing = selections[index - 1] if index else selection
        for offset, weights in enumerate(composer.weights([(selection, 0, length)])):
            u = min(1.0, (offset + 1) / (window + 1))
            assert np.count_nonzero(weights) <= (2 if offset < window else 1)
            assert offset < window or weights[selection.rung] == np.float32(selection.scale)
            assert weights.sum() == pytest.approx((1 - u) * outgoing.scale + u * selection.scale, abs=1e-5)
            if before is not None:
                largest_step = 2 * max(s.scale for s in selections) / (window + 1)
                assert np.abs(weights - before).sum() <= largest_step + 1e-5
            before = weights.copy()


# 5 KVCachePolicyController


@given(stream=tokens_and_entropies, sinks=st.integers(0, 12))
def test_decisions_never_change_sinks_or_later_tokens(stream: list[tuple[int, float | None]], sinks: int) -> None:
    config = LIVELY.model_copy(update={"kv_cache": LIVELY.kv_cache.model_copy(update={"sinks": sinks})})
    scheduler = RuntimeScheduler(config, RUNG_RANKS, VOCABULARY)
    for position, (token, entropy) in enumerate(stream):
        for decision in scheduler.step([token], [entropy]).decisions:
            assert sinks <= decision.start < decision.end <= position


@given(stream=tokens_and_entropies)
def test_every_chunk_gets_the_policy_of_its_level_once_and_expires_at_its_age(
    stream: list[tuple[int, float | None]],
) -> None:
    scheduler = RuntimeScheduler(LIVELY, RUNG_RANKS, VOCABULARY)
    closed: dict[int, KVDecision] = {}
    dropped: dict[int, int] = {}
    for position, (token, entropy) in enumerate(stream):
        for decision in scheduler.step([token], [entropy]).decisions:
            if decision.action == "drop":
                assert decision.end not in dropped
                dropped[decision.end] = position
            else:
                assert decision.end == position
                closed[decision.end] = decision
    sinks, policies = LIVELY.kv_cache.sinks, LIVELY.kv_cache.levels
    for scheduled in scheduler.chunks[:-1]:
        end = scheduled.chunk.end
        assert end is not None
        if end <= sinks:
            assert scheduled.kv is None and end not in closed
            continue
        policy = policies[scheduled.chunk.level]
        action = "int8" if policy.precision == "int8" else "keep"
        start = max(scheduled.chunk.start, sinks)
        assert closed[end] == scheduled.kv == KVDecision(start, end, action, policy.duplicate_similarity)
        expected = end + policy.max_age if policy.max_age is not None else len(stream)
        assert dropped.get(end) == (expected if expected < len(stream) else None)


def test_expiry_comes_in_order_of_age_and_only_once() -> None:
    policy = KVCacheConfig(levels=(LevelKVPolicy(max_age=5), LevelKVPolicy(max_age=50)), sinks=0)
    controller = KVCachePolicyController(policy)
    controller.close(Chunk(0, 1, 0.5, end=10))
    controller.close(Chunk(10, 0, 0.5, end=20))
    assert controller.expire(24) == []
    assert controller.expire(25) == [KVDecision(10, 20, "drop")]
    assert controller.expire(1000) == [KVDecision(0, 10, "drop")]
    assert controller.expire(1000) == []
