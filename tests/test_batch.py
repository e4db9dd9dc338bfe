"""Plans of many sequences do not depend on how tokens are split into passes. All engines use this planning."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkwise_lora import ChunkWiseConfig, RuntimeScheduler
from chunkwise_lora.method.batch import BatchPlanner, Span, Usage
from chunkwise_lora.method.complexity import LearnedComplexity
from chunkwise_lora.method.config import CompositionConfig, SelectionConfig
from chunkwise_lora.method.segments import PassPlan, Segment, segments_of
from chunkwise_lora.method.sequence import NO_ADAPTER, AdapterInfo, SequencePlanner

VOCABULARY = 50
BALANCED, LOSSLESS = ChunkWiseConfig.preset("balanced"), ChunkWiseConfig.preset("lossless")

tokens_of = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=60)


def info(key: str, rungs: int = 9, name: str = "") -> AdapterInfo:
    ranks = np.arange(float(rungs))
    return AdapterInfo(key, name or key, ranks, 2 * ranks.astype(int))


ADAPTER = info("a")


def scheduler(config: ChunkWiseConfig) -> RuntimeScheduler:
    return RuntimeScheduler(config, ADAPTER.rung_ranks.tolist(), VOCABULARY)


def planned(config: ChunkWiseConfig, tokens: list[int], entropies: list[float | None]) -> np.ndarray:
    return scheduler(config).step(tokens, entropies).weights


def sequence(prompt: list[int], config: ChunkWiseConfig = BALANCED, adapter: AdapterInfo = ADAPTER) -> SequencePlanner:
    return SequencePlanner(adapter, config, VOCABULARY, prompt)


@given(tokens_of, st.lists(st.integers(1, 9), min_size=1), st.integers(0, 60), st.data())
def test_a_plan_does_not_depend_on_splits_cache_hits_or_preemption(
    tokens: list[int], cuts: list[int], prompt: int, data: st.DataObject
) -> None:
    prompt = min(prompt, len(tokens) - 1)
    entropies = [None] * prompt + [float(i % 4) for i in range(len(tokens) - prompt)]
    one = sequence(tokens[:prompt])
    for position in range(prompt, len(tokens)):
        one.learn(position, entropies[position] or 0.0)
    expected = planned(BALANCED, tokens, entropies)
    start = data.draw(st.integers(0, prompt), "found in the cache")
    for cut in [*cuts, len(tokens)]:
        end = min(start + cut, len(tokens))
        assert np.array_equal(one.plan(start, tokens[start:end]), expected[start:end])
        start = data.draw(st.integers(0, end), "preempted") if data.draw(st.booleans(), "is preempted") else end
    assert np.array_equal(one.plan(0, tokens), expected)


@given(tokens_of, tokens_of, st.integers(0, 60))
def test_a_token_that_is_sampled_again_is_planned_again(tokens: list[int], others: list[int], keep: int) -> None:
    keep = min(keep, len(tokens))
    one = sequence(tokens[:keep])
    one.plan(0, tokens)
    changed = tokens[:keep] + others
    assert np.array_equal(one.plan(0, changed), planned(BALANCED, changed, [None] * len(changed)))


@given(tokens_of, tokens_of, st.integers(0, 60), st.lists(st.booleans(), min_size=60, max_size=60))
def test_a_constant_plan_has_the_chunks_of_its_tokens_whenever_they_are_read(
    tokens: list[int], others: list[int], keep: int, reads: list[bool]
) -> None:
    keep = min(keep, len(tokens))
    one, changed = sequence([], LOSSLESS), tokens[:keep] + others
    for position, token in enumerate(tokens):
        assert np.array_equal(one.plan(position, [token]), planned(LOSSLESS, [token], [None]))
        assert not reads[position] or sum(chunk.chunk.end is None for chunk in one.chunks) == 1
    one.rewind(keep)
    one.plan(0, changed)
    expected = scheduler(LOSSLESS)
    assert np.array_equal(one.weights, expected.step(changed).weights)
    assert one.tokens == changed and one.chunks == expected.chunks


@pytest.mark.parametrize("scale", [1.0, 0.95, 0.8])
def test_a_constant_plan_gives_all_tokens_the_same_weights(scale: float) -> None:
    selection = SelectionConfig(rank_shares=(0.5,), scales=(scale,))
    config = LOSSLESS.model_copy(update={"selection": selection, "composition": CompositionConfig(window=2)})
    tokens = [position % VOCABULARY for position in range(300)]
    one, other = sequence([], config), sequence([], config)
    all_at_once = one.plan(0, tokens)
    steps = np.concatenate([other.plan(position, [token]) for position, token in enumerate(tokens)])
    assert np.array_equal(all_at_once, steps) and np.array_equal(steps, other.weights)
    assert (steps == other.last_weights).all() and len(other.chunks) > 1


@given(tokens_of, st.integers(1, 9), st.integers(0, 60), st.sampled_from([BALANCED, LOSSLESS]))
def test_the_mean_rank_is_that_of_all_tokens(tokens: list[int], size: int, keep: int, config: ChunkWiseConfig) -> None:
    planner = sequence([], config)
    for start in range(0, len(tokens), size):
        planner.plan(start, tokens[start : start + size])
    assert np.isclose(planner.mean_rank, np.mean(planner.trace().ranks), atol=1e-4)
    planner.rewind(min(keep, len(tokens) - 1))
    assert not planner.tokens or np.isclose(planner.mean_rank, np.mean(planner.trace().ranks), atol=1e-4)


def test_entropies_of_prompt_tokens_are_ignored() -> None:
    one = sequence([1, 2, 3])
    for position in range(6):
        one.learn(position, 3.0)
    tokens = [1, 2, 3, 4, 5, 6]
    assert np.array_equal(one.plan(0, tokens), planned(BALANCED, tokens, [None] * 3 + [3.0] * 3))


def no_ids() -> list[list[int]]:
    raise AssertionError("no plan of this pass depends on its tokens")


def test_constant_plans_need_no_tokens_and_are_reused() -> None:
    seen: list[tuple[str, Usage]] = []
    planner = BatchPlanner(VOCABULARY, record=lambda key, usage: seen.append((key, usage)))
    planner.open("x", sequence([1], LOSSLESS))
    planner.open("y", sequence([1], ChunkWiseConfig.uniform(0.5), info("b", 5)))
    batch = [Span("base", 0, 2), Span("x", 0, 1), Span("y", 0, 3)]
    first = planner.plan(batch, no_ids)
    assert [(one.adapter, one.rung, one.weights) for one in first.segments] == [("a", 8, None), ("b", 2, None)]
    assert [one.rows.tolist() for one in first.segments if one.rows is not None] == [[2], [3, 4, 5]]
    assert planner.plan(batch, no_ids) is first
    assert [(key, usage.rank, usage.tokens.sum()) for key, usage in seen] == [("a", 8, 1), ("b", 6, 3)] * 2


def test_a_constant_plan_runs_alone_and_then_beside_one_that_needs_tokens() -> None:
    planner = BatchPlanner(VOCABULARY)
    planner.open("x", sequence([1], LOSSLESS))
    for start in range(20):
        planner.plan([Span("x", start, 1)], no_ids)
    planner.open("y", sequence([2], BALANCED, info("b")))
    plan = planner.plan([Span("x", 20, 1), Span("y", 0, 1)], lambda: [[5], [2]])
    assert [(one.adapter, one.rows.tolist()) for one in plan.segments if one.rows is not None] == [
        ("a", [0]),
        ("b", [1]),
    ]
    assert plan.segments[0].rung == 8


def test_constant_plans_see_tokens_if_the_engine_needs_their_chunks() -> None:
    planner = BatchPlanner(VOCABULARY, feeds_all=True)
    planner.open(0, sequence([], LOSSLESS))
    first = planner.plan([Span(0, 0, 3)], lambda: [[1, 2, 3]], width=3)
    second = planner.plan([Span(0, 3, 1)], lambda: [[4]], width=1)
    assert planner.plan([Span(0, 4, 1)], lambda: [[5]], width=1) is second is not first
    assert planner[0].tokens == [1, 2, 3, 4, 5]
    assert len(planner[0].chunks) == 1


def test_a_plan_is_not_reused_after_its_sequence_has_ended_or_moved() -> None:
    planner = BatchPlanner(VOCABULARY)
    planner.open("x", sequence([1], LOSSLESS))
    spans = [Span("x", 1, 1)]
    assert planner.plan(spans, no_ids).adapters == ("a",)
    planner.close(["x"])
    assert planner.plan(spans, no_ids).adapters == ()
    for number, adapter in enumerate((ADAPTER, info("b"))):
        planner.open(number, sequence([1], LOSSLESS, adapter))
    spans = [Span(0, 1, 1), Span(1, 1, 1)]
    before = planner.plan(spans, no_ids)
    planner.reorder({0: 1, 1: 0})
    after = planner.plan(spans, no_ids)
    assert [before.adapters, after.adapters] == [("a", "b"), ("b", "a")]


def test_two_adapters_of_one_name_are_counted_apart() -> None:
    seen: dict[str, float] = {}
    planner = BatchPlanner(VOCABULARY, record=lambda key, usage: seen.update({key: usage.rank}))
    planner.open("x", sequence([1], LOSSLESS, info("1", 9, "same")))
    planner.open("y", sequence([1], LOSSLESS, info("2", 5, "same")))
    planner.plan([Span("x", 0, 1), Span("y", 0, 2)], no_ids)
    assert seen == {"1": 8, "2": 8}


def test_a_padded_row_runs_like_its_tokens_alone() -> None:
    planner = BatchPlanner(VOCABULARY, feeds_all=True)
    for row in range(2):
        planner.open(row, sequence([], LOSSLESS))
    plan = planner.plan([Span(0, 0, 2, np.array([1, 2])), Span(1, 0, 3)], lambda: [[1, 2], [1, 2, 3]], width=3)
    (segment,) = plan.segments
    assert plan.is_uniform and plan.tokens == 6 and segment.rung == 8
    plan = planner.plan([Span(0, 2, 0, np.array([], int)), Span(1, 3, 1)], lambda: [[], [4]], width=1)
    assert plan.is_uniform, "a sequence that has ended"


def test_sequences_of_the_base_model_run_no_adapter() -> None:
    planner = BatchPlanner(VOCABULARY, feeds_all=True)
    planner.open(0, sequence([], BALANCED, NO_ADAPTER))
    planner.open(1, sequence([], LOSSLESS))
    plan = planner.plan([Span(0, 0, 2), Span(1, 0, 2)], lambda: [[1, 2], [3, 4]], width=2)
    assert [(one.adapter, one.rows.tolist()) for one in plan.segments if one.rows is not None] == [("a", [2, 3])]


def test_each_sequence_follows_its_own_config() -> None:
    planner = BatchPlanner(VOCABULARY)
    planner.open("x", sequence([1, 2], BALANCED))
    planner.open("y", sequence([1], LOSSLESS))
    planner["x"].learn(2, float(np.log(VOCABULARY)))
    planner.plan([Span("x", 0, 2), Span("y", 0, 1)], lambda: [[1, 2], [1]])
    (segment,) = planner.plan([Span("x", 2, 1), Span("y", 1, 1)], lambda: [[7], [7]]).segments
    expected = planned(BALANCED, [1, 2, 7], [None, None, float(np.log(VOCABULARY))])
    assert segment.weights is not None
    assert np.array_equal(segment.weights[0], expected[2]) and segment.weights[1].tolist() == [0.0] * 8 + [1.0]
    planner.close(["x", "y", "unknown"])
    assert len(planner) == 0


def test_a_copied_beam_is_planned_separately() -> None:
    planner = BatchPlanner(VOCABULARY, feeds_all=True)
    adapter = replace(ADAPTER, learned=LearnedComplexity.neutral())
    for row in range(2):
        planner.open(row, sequence([], BALANCED, adapter))
    planner.plan([Span(0, 0, 1), Span(1, 0, 1)], lambda: [[1], [2]], width=1)
    planner.reorder({0: 1, 1: 1})
    planner.plan([Span(0, 1, 1), Span(1, 1, 1)], lambda: [[3], [4]], width=1)
    assert (planner[0].tokens, planner[1].tokens) == ([2, 3], [2, 4])
    assert planner[0].adapter is planner[1].adapter is adapter, "what never changes is shared"


def test_tokens_without_a_rung_count_on_the_lowest() -> None:
    weights = np.array([[0, 0, 0], [0.5, 0.5, 0], [0, 0, 1]], np.float32)
    assert Usage.of(info("a", 3), weights).tokens.tolist() == [1, 1, 1]


def test_a_scale_does_not_change_the_rank_of_a_token() -> None:
    weights = np.array([[0, 0, 0], [0.5, 0.5, 0], [0, 0, 1]], np.float32)
    for scale in (0.5, 1, 2):
        assert Usage.of(info("a", 3), scale * weights).rank == pytest.approx(0.5 + 2)


def test_a_sequence_whose_adapter_is_replaced_is_planned_again() -> None:
    planner, other = BatchPlanner(VOCABULARY), info("a", 5)
    planner.open("x", sequence([1, 2]))
    planner.plan([Span("x", 0, 3)], lambda: [[1, 2, 3]])
    assert planner["x"].adapter.has_rungs_of(info("a")) and not planner["x"].adapter.has_rungs_of(other)
    planner.open("x", SequencePlanner(other, BALANCED, VOCABULARY, [1, 2, 3, 4], prompt_length=2))
    (segment,) = planner.plan([Span("x", 3, 1)], lambda: [[4]]).segments
    expected = RuntimeScheduler(BALANCED, other.rung_ranks.tolist(), VOCABULARY).step([1, 2, 3, 4]).weights
    given = np.eye(5)[segment.rung] if segment.weights is None else segment.weights[0]
    assert np.array_equal(given, expected[3])


@given(st.integers(1, 4), st.integers(1, 6), st.data())
def test_a_layer_that_sees_only_the_last_columns_gets_their_plan(batch: int, width: int, data: st.DataObject) -> None:
    columns = data.draw(st.integers(1, width))
    rows = np.array(sorted(data.draw(st.sets(st.integers(0, batch * width - 1), min_size=1))))
    weights = np.arange(2.0 * len(rows), dtype=np.float32).reshape(-1, 2)
    tail = PassPlan((Segment("a", 1, weights, rows),), batch, width).tail(columns)
    (segment,) = tail.segments
    full = np.full((batch, width, 2), -1.0, np.float32)
    full.reshape(-1, 2)[rows] = weights
    seen = np.full((batch * columns, 2), -1.0, np.float32)
    seen[segment.rows] = segment.weights
    assert tail.tokens == batch * columns
    assert np.array_equal(seen, full[:, width - columns :].reshape(-1, 2))


@pytest.mark.parametrize(
    ("weights", "gain", "count"),
    [
        ([[0, 0, 1]] * 4, 0.0, 1),
        ([[0, 0.5, 0]] * 4, 0.0, 1),
        ([[1, 0, 0], [0, 0, 1]] * 2, 1e9, 1),
        ([[1, 0, 0], [0, 0, 1]] * 2, 1.0, 2),
        ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], 0.0, 3),
    ],
    ids=["slice", "scaled slice", "gated product", "two groups", "three groups"],
)
def test_tokens_are_grouped_by_rung_only_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, weights: list[list[float]], gain: float, count: int
) -> None:
    monkeypatch.setattr("chunkwise_lora.method.segments.GROUPING_GAIN", gain)
    plan = np.array(weights, np.float32)
    made = segments_of("a", plan, np.array([0.0, 4.0, 8.0]), None)
    assert len(made) == count
    assert (made[0].weights is None) == (count == 1 and (plan == plan[0]).all() and plan[0].max() == 1) or count > 1


@given(st.integers(1, 4), st.integers(1, 12), st.data())
def test_a_layer_that_sees_some_tokens_gets_their_plan(adapters: int, width: int, data: st.DataObject) -> None:
    def gates(plan: PassPlan) -> np.ndarray:
        given = np.zeros((plan.tokens, adapters, 9), np.float32)
        for one in plan.segments:
            rows = np.arange(plan.tokens) if one.rows is None else one.rows
            given[rows, int(one.adapter)] = np.eye(9)[one.rung] if one.weights is None else one.weights
        return given

    planner = BatchPlanner(VOCABULARY)
    counts = data.draw(st.lists(st.integers(1, width), min_size=1, max_size=5))
    spans, ids = [], []
    for key, count in enumerate(counts):
        owner, config = data.draw(st.integers(0, adapters)), data.draw(st.sampled_from([BALANCED, LOSSLESS]))
        if owner < adapters:
            planner.open(key, sequence([], config, info(str(owner))))
        spans.append(Span(key, 0, count))
        ids.append(data.draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=count, max_size=count)))
    plan = planner.plan(spans, lambda: ids)
    last = np.cumsum(counts) - 1
    assert np.array_equal(gates(plan.at(last)), gates(plan)[last])
