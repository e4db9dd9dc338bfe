"""Settings: invalid values are refused by name, and every config can be written to JSON and read back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkwise_lora import ChunkWiseConfig, ChunkWiseError, ConfigError
from chunkwise_lora.calibration import CalibrationConfig
from chunkwise_lora.engines.requested_config import Choice
from chunkwise_lora.method.config import (
    PRESETS,
    ChunkingConfig,
    ComplexityConfig,
    CompositionConfig,
    KVCacheConfig,
    LevelKVPolicy,
    SelectionConfig,
    StrictConfig,
)

NAN, INFINITY = float("nan"), float("inf")
NOT_A_WEIGHT = (-0.1, 1e7, NAN, INFINITY, "high", None)
NOT_A_SHARE = (-0.1, 1.1, NAN, INFINITY, "half", None)
NOT_A_COUNT = (0, -1, 2.5, NAN, "many", None)

IMPOSSIBLE: dict[type[StrictConfig], dict[str, tuple[Any, ...]]] = {
    ComplexityConfig: {
        "entropy": NOT_A_WEIGHT,
        "novelty": NOT_A_WEIGHT,
        "attention": NOT_A_WEIGHT,
        "position": NOT_A_WEIGHT,
        "signals": ({"no_such_signal": 1}, {"novelty": 1}, {"entropy": 0.5}, 3, None),
        "ngram": (*NOT_A_COUNT, 9),
        "window": (*NOT_A_COUNT, 10**400),
        "half_life": (0, -1, NAN, INFINITY, "long", None),
        "learned": (2, "perhaps", None),
    },
    ChunkingConfig: {
        "min_length": NOT_A_COUNT,
        "max_length": NOT_A_COUNT,
        "thresholds": ((0.6, 0.4), (0.5, 0.5), (-0.1,), (1.1,), (NAN,), ("low",), 0.5, None),
        "hysteresis": (-0.1, 1, NAN, "wide", None),
        "memory": (0, 0.5, NAN, INFINITY, "long", None),
        "hard_share": NOT_A_SHARE,
    },
    SelectionConfig: {
        "rank_shares": ((-0.1,), (1.1,), (NAN,), 0.5, None),
        "scales": ((-0.1,), (4.1,), (INFINITY,), ("full",), 1.0, None),
    },
    CompositionConfig: {"window": (-1, 2.5, NAN, "wide", None)},
    LevelKVPolicy: {
        "precision": ("int4", "", 8, None),
        "duplicate_similarity": (0, -0.5, 1.1, NAN, "same"),
        "evict": ("no_such_policy", "", 3),
        "keep_share": (-0.1, 1.1, NAN, INFINITY, "half"),
        "max_age": (0, -1, 2.5, "old"),
    },
    KVCacheConfig: {
        "levels": ("int8", 3, None),
        "int8_head_share": NOT_A_SHARE,
        "sinks": (-1, 2.5, "some", None),
    },
    CalibrationConfig: {
        "mean_rank": (0, -0.1, 1.1, NAN, "half"),
        "max_loss_increase": (0, -0.1, 1.1, NAN, "little"),
        "tokens": NOT_A_COUNT,
        "block": (*NOT_A_COUNT, 8),
        "rungs": (*NOT_A_COUNT, 65),
        "lowest_share": (-0.1, 1, NAN, "half"),
        "self_generated_tokens": (-1, 2.5, "much", None),
        "refinements": (-1, 2.5, "few", None),
        "rounds": (-1, 0.5, "none", None),
        "keep_directions": (2, "perhaps", None),
        "distillations": (-1, 0.5, NAN, "many"),
        "distillation_rate": (0, -1e-3, 1.5, NAN, "fast"),
        "dtype": ("int8", "float64", None),
        "explorations": NOT_A_COUNT,
        "held_share": (0, 0.5, -0.1, NAN, "half", None),
        "int8": (2, "perhaps", None),
        "minutes": (0, -1, NAN, "long"),
        "seed": (-1, 2.5, "lucky", None),
    },
    Choice: {
        "preset": ("fast", "", 3),
        "mean_rank": (-0.1, 1.1, NAN, INFINITY, "half"),
        "config": (),  # refused under its own name
    },
}
CASES = [
    (kind, setting, value)
    for kind, settings in IMPOSSIBLE.items()
    for setting, values in settings.items()
    for value in values
]


@pytest.mark.parametrize(("kind", "setting", "value"), CASES, ids=lambda part: getattr(part, "__name__", str(part)))
def test_an_impossible_value_is_refused_by_name(kind: type[StrictConfig], setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{kind.__name__}: .*{setting}"):
        kind(**{setting: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"complexity": {"ngram": 0}}, "ComplexityConfig: ngram"),
        ({"chunking": {"no_such_setting": 1}}, "ChunkingConfig: no_such_setting"),
        ({"selection": {"scales": (1, 9, 1)}}, r"SelectionConfig: scales\.1"),
        ({"composition": {"window": -1}}, "CompositionConfig: window"),
        ({"kv_cache": {"levels": ({"max_age": 0},)}}, "LevelKVPolicy: max_age"),
        ({"kv_cache": {"levels": (None,)}}, "LevelKVPolicy"),
        ({"kv_cache": 3}, "KVCacheConfig"),
        ({"no_such_section": {}}, "ChunkWiseConfig: no_such_section"),
    ],
)
def test_an_impossible_nested_value_is_refused_by_the_name_of_its_setting(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ChunkWiseConfig(**values)


def test_every_setting_is_tested_with_impossible_values() -> None:
    assert set(IMPOSSIBLE) == set(StrictConfig.__subclasses__()) - {ChunkWiseConfig}
    assert {kind: set(kind.model_fields) for kind in IMPOSSIBLE} == {k: set(v) for k, v in IMPOSSIBLE.items()}


@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_every_setting_is_documented(kind: type[StrictConfig]) -> None:
    assert all(field.description for field in kind.model_fields.values())


@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_an_unknown_setting_is_refused_by_name(kind: type[StrictConfig]) -> None:
    with pytest.raises(ConfigError, match=r"no_such_setting"):
        kind(no_such_setting=1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"complexity": {"entropy": 0, "novelty": 0, "attention": 0, "position": 0}}, "weight"),
        ({"chunking": {"min_length": 9, "max_length": 8}}, "min_length"),
        ({"chunking": {"thresholds": (0.5,)}}, "rank_shares has 3 entries.*give 2"),
        ({"selection": {"scales": (1.0,)}}, "scales has 1 entries.*give 3"),
        ({"kv_cache": {"levels": ()}}, "kv_cache.levels has 0 entries.*give 3"),
        ({"composition": {"window": 5}}, "composition.window"),
        ({"kv_cache": {"levels": ({"evict": "knorm"},) * 3}}, "evict and keep_share belong together"),
        ({"kv_cache": {"levels": ({"keep_share": 0.5},) * 3}}, "evict and keep_share belong together"),
    ],
    ids=["no weights", "lengths crossed", "levels", "scales", "policies", "fades overlap", "no share", "no score"],
)
def test_values_that_do_not_fit_together_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ChunkWiseConfig(**values)
    with pytest.raises(ConfigError, match=r"my\.json.*" + message):
        ChunkWiseConfig.from_json(json.dumps(values), "my.json")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"no_such_setting": 1}', '{"chunking": {"min_length": "x"}}', "\x00"]
)
def test_bad_json_is_refused_by_the_name_of_its_file(text: str) -> None:
    with pytest.raises(ConfigError, match=r"my\.json"):
        ChunkWiseConfig.from_json(text, "my.json")


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"fastest.*lossless, balanced, compact"):
        ChunkWiseConfig.preset("fastest")


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_a_preset_survives_json(config: ChunkWiseConfig) -> None:
    assert ChunkWiseConfig.from_json(config.to_json()) == config


@given(
    length=st.integers(4, 100),
    thresholds=st.sets(st.floats(0, 1), max_size=4).map(sorted),
    age=st.none() | st.integers(1, 10**6),
    similarity=st.none() | st.floats(0.01, 1),
    weight=st.floats(0.01, 1e6),
)
def test_any_config_survives_json(
    length: int, thresholds: list[float], age: int | None, similarity: float | None, weight: float
) -> None:
    levels = len(thresholds) + 1
    config = ChunkWiseConfig(
        complexity=ComplexityConfig(entropy=weight),
        chunking=ChunkingConfig(max_length=length, thresholds=tuple(thresholds)),
        selection=SelectionConfig(rank_shares=(0.5,) * levels, scales=(1.0,) * levels),
        kv_cache=KVCacheConfig(levels=(LevelKVPolicy(duplicate_similarity=similarity, max_age=age),) * levels),
    )
    assert ChunkWiseConfig.from_json(config.to_json()) == config


def test_a_config_cannot_be_changed_in_place() -> None:
    with pytest.raises((ChunkWiseError, ValueError)):
        ChunkWiseConfig().chunking.min_length = 3  # type: ignore[misc]
