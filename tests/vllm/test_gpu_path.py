"""What layers add on a GPU gives the tokens of what they add elsewhere. Without a GPU, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from chunkwise_lora.engines.vllm.addition import PartAdditions
from conftest import E2E, WIKI, Engine

PROMPTS = ["The king", "name[The Eagle]", "He said"]


def mixed(engine: Engine) -> dict[str, list[int]]:
    engine.add("balanced", PROMPTS[0], WIKI, 4, chunkwise_preset="balanced")
    engine.add("half", PROMPTS[1], E2E, 4, chunkwise_mean_rank=0.5)
    engine.add("base", PROMPTS[2], None, 4)
    return engine.run()


def test_triton_gives_the_tokens_of_products(
    new_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")  # before Triton is imported
    pytest.importorskip("triton", reason="Triton is not installed")
    from chunkwise_lora.engines.vllm import manager
    from chunkwise_lora.engines.vllm.triton_addition import TritonAdditions

    monkeypatch.setattr(manager, "additions_on", lambda device, dtype, *_: PartAdditions(device, dtype))
    expected = mixed(new_engine())
    monkeypatch.setattr(manager, "additions_on", TritonAdditions)
    engine = new_engine()
    assert mixed(engine) == expected
    assert len(engine.runner.lora_manager.ladders.additions.slots) == 2
