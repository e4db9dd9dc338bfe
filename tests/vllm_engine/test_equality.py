"""vLLM with ladders generates the tokens of vLLM's own LoRA and of the transformers engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import small
from chunkwise_lora import ChunkWiseConfig, ChunkWiseModel, RankLadder
from chunkwise_lora.engines.transformers import BASE
from conftest import E2E, PROMPTS, WIKI, Engine, own_lora

MIXED = [WIKI, E2E, None, WIKI, E2E, None, E2E, WIKI]
BATCH = PROMPTS * 2


@pytest.fixture(scope="module")
def transformers_model() -> ChunkWiseModel:
    base = AutoModelForCausalLM.from_pretrained(small.BASE, dtype=torch.float32)
    return ChunkWiseModel(base, {"wiki": WIKI, "e2e": E2E}, ChunkWiseConfig.preset("lossless"))


def by_transformers(
    model: ChunkWiseModel, prompt: str, adapter: str | None, preset: str, tokens: int = 64
) -> list[int]:
    ids = AutoTokenizer.from_pretrained(small.BASE)(prompt, return_tensors="pt").input_ids
    output = model.generate(
        ids,
        adapter_names=BASE if adapter is None else Path(adapter).name,
        chunkwise_config=ChunkWiseConfig.preset(preset),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
    )
    return output[0, ids.shape[1] :].tolist()


def test_a_mixed_batch_gives_the_tokens_of_vllms_own_lora(engine: Engine) -> None:
    assert engine.greedy(BATCH, MIXED) == own_lora(BATCH, MIXED)


def test_a_mixed_batch_gives_the_tokens_of_the_transformers_engine(
    engine: Engine, transformers_model: ChunkWiseModel
) -> None:
    given = engine.greedy(BATCH, MIXED)
    for prompt, adapter, tokens in zip(BATCH, MIXED, given, strict=True):
        assert tokens == by_transformers(transformers_model, prompt, adapter, "lossless")


@pytest.mark.parametrize("preset", ["lossless", "balanced", "compact"])
def test_the_plan_is_that_of_the_transformers_engine(
    engine: Engine, transformers_model: ChunkWiseModel, preset: str
) -> None:
    for number, (prompt, adapter) in enumerate(zip(PROMPTS, [WIKI, E2E, WIKI, E2E], strict=True)):
        engine.add(f"{preset}{number}", prompt, adapter, 32, chunkwise_preset=preset)
    given = engine.run()
    for number, (prompt, adapter) in enumerate(zip(PROMPTS, [WIKI, E2E, WIKI, E2E], strict=True)):
        plan = engine.plans[f"{preset}{number}"]
        config = ChunkWiseConfig.preset(preset)
        ids = AutoTokenizer.from_pretrained(small.BASE)(prompt).input_ids
        tokens = ids + given[f"{preset}{number}"]
        # The transformers engine runs the tokens that vLLM generated, one by one after the prompt.
        with transformers_model.stream(
            prompt_columns=len(ids), adapter_names=Path(adapter).name, chunkwise_config=config
        ) as call:
            for part in ([ids], *([[token]] for token in tokens[len(ids) : -1])):
                transformers_model.model(torch.tensor(part), past_key_values=call.cache)
            ranks = call.trace().sequences[0].ranks
        if plan.constant_weights is not None:
            assert set(ranks) == {float(plan.constant_weights @ plan.adapter.rung_ranks)}
        else:
            assert np.allclose(plan.weights @ plan.adapter.rung_ranks, ranks)


def test_a_saved_ladder_gives_the_tokens_of_its_adapter_with_the_plug_in_and_without(
    engine: Engine, tmp_path: Path
) -> None:
    RankLadder.from_peft(WIKI).save_pretrained(tmp_path)
    expected = engine.greedy(PROMPTS, [WIKI] * 4, 32)
    assert engine.greedy(PROMPTS, [tmp_path] * 4, 32) == expected
    assert own_lora(PROMPTS, [str(tmp_path)] * 4, 32) == expected
