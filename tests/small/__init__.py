"""The model of 5.5 million parameters on which the tests run, and two adapters for it. See MODEL_CARD.md."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

import chunkwise_lora
from chunkwise_lora import ChunkWiseConfig, RankLadder
from chunkwise_lora.method.complexity import SIGNALS, LearnedComplexity

_HERE = Path(__file__).parent

BASE = _HERE / "base"
BASE_NAME = "tests/small/base"
"""How the adapters name the base model."""

WIKI, E2E = _HERE / "wiki", _HERE / "e2e"
"""Folders of PEFT adapters: encyclopedia text, and a sentence from facts about a restaurant."""

HELD_TEXT = Path(chunkwise_lora.__file__).parent / "sample" / "wiki.txt"
"""A text in the style of the `wiki` data. Neither the base model nor an adapter was trained on it."""

VOCABULARY = 4096
RUNGS = 17


def calibrated(adapter: Path = WIKI) -> RankLadder:
    """A ladder like those of calibration, made at once: modules differ in rank, and a policy takes about half of it.

    The costs of tokens are random numbers.
    """
    plain = RankLadder.load(adapter)
    importance = {
        name: module.sigma.square() * 4 ** (place % 5) for place, (name, module) in enumerate(plain.modules.items())
    }
    numbers = np.random.default_rng(0)
    learned = LearnedComplexity(
        token=numbers.normal(size=VOCABULARY).astype(np.float32),
        previous=numbers.normal(size=VOCABULARY).astype(np.float32),
        weights=numbers.normal(size=len(SIGNALS)).astype(np.float32),
        means=np.full(len(SIGNALS), 0.5, np.float32),
    )
    levels = 5
    policy = ChunkWiseConfig.model_validate(
        {
            "complexity": {"learned": True},
            "chunking": {
                "min_length": 1,
                "thresholds": np.linspace(0.2, 0.8, levels - 1),
                "hysteresis": 0,
                "memory": 1,
                "hard_share": 1,
            },
            "selection": {"rank_shares": np.linspace(0.3, 0.7, levels), "scales": [0.95] * levels},
            "composition": {"window": 0},
            "kv_cache": {"levels": [{"precision": "int8"}] * levels},
        }
    )
    return replace(
        plain.sorted_by(importance, RUNGS - 1),
        learned=learned,
        policy=policy,
        rung_divergence=tuple(2.0 * (1 - rung / (RUNGS - 1)) ** 3 for rung in range(RUNGS)),
    )
