"""docs/extending.md: its examples run unchanged, and its tables name everything that is shipped."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chunkwise_lora import ChunkWiseConfig
from chunkwise_lora.method.complexity import TokenComplexityEstimator
from chunkwise_lora.method.config import ComplexityConfig
from chunkwise_lora.method.kv_policies import KV_POLICY_REGISTRY
from chunkwise_lora.method.signals import SIGNAL_REGISTRY
from models import VOCABULARY, adapter, build, prompts

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
SHIPPED = SIGNAL_REGISTRY.names + KV_POLICY_REGISTRY.names


@pytest.fixture
def page(capsys: pytest.CaptureFixture[str]) -> Iterator[dict[str, Any]]:
    """The names that the examples of the page define when they run."""
    names: dict[str, Any] = {
        "__name__": "extending",
        "model": build("llama"),
        "ladder": adapter("llama"),
        "inputs": prompts((600,)),
    }
    for block in BLOCKS:
        exec(compile(block, "docs/extending.md", "exec", dont_inherit=True), names)
    yield names
    SIGNAL_REGISTRY.remove("rare_tokens")
    KV_POLICY_REGISTRY.remove("keep_large_values")


def test_the_examples_register_a_signal_and_a_policy_that_work(page: dict[str, Any]) -> None:
    config = ComplexityConfig(entropy=0, novelty=0, attention=0, position=0, signals={"rare_tokens": 1})
    assert TokenComplexityEstimator(config, VOCABULARY).update([1, VOCABULARY - 1], [None] * 2) == [0, 1]
    trace = page["chunkwise"].trace
    assert {scheduled.kv.evict for scheduled in trace.sequences[0].chunks if scheduled.kv} <= {
        "keep_large_values",
        "snapkv",
        None,
    }
    assert trace.kv_bytes < trace.kv_bytes_full
    assert trace.kv_notes == ()
    assert ChunkWiseConfig.from_json(page["config"].to_json()) == page["config"]


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_signal_and_policy_is_in_the_tables(name: str) -> None:
    assert f"\n| `{name}` |" in PAGE


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_signal_and_policy_names_its_source(name: str) -> None:
    registry = SIGNAL_REGISTRY if name in SIGNAL_REGISTRY.names else KV_POLICY_REGISTRY
    assert re.search(r"arXiv\s+\d{4}\.\d{5}", registry.factory(name).__doc__ or "")
