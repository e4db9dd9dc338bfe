"""A request keeps its own plan under overrides, prefix caching, chunked prefill, preemption and abort."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import small
from chunkwise_lora import ChunkWiseConfig, RankLadder
from chunkwise_lora.engines.vllm import loading, settings
from chunkwise_lora.engines.vllm.worker import NO_PROMPT_LOGPROBS
from chunkwise_lora.ladder.peft_files import CONFIG_NAME as CONFIG
from conftest import BLOCK, E2E, PROMPTS, WIKI, Engine, own_lora

LONG = small.HELD_TEXT.read_text(encoding="utf-8")[:900]


def ranks(engine: Engine, request: str) -> np.ndarray:
    plan = engine.plans[request]
    weights = plan.weights if plan.constant_weights is None else plan.constant_weights[None]
    return weights @ plan.adapter.rung_ranks


def test_a_request_may_ask_for_a_preset_or_a_mean_rank(engine: Engine) -> None:
    engine.add("default", PROMPTS[0], WIKI, 8)
    engine.add("half", PROMPTS[0], WIKI, 8, chunkwise_mean_rank=0.5)
    engine.add("balanced", PROMPTS[0], WIKI, 8, chunkwise_preset="balanced")
    engine.run()
    assert set(ranks(engine, "default")) == {16.0}
    assert set(ranks(engine, "half")) == {8.0}
    assert 8 < ranks(engine, "balanced").mean() < 16


def test_a_request_at_rank_0_is_the_base_model(engine: Engine) -> None:
    assert engine.greedy(PROMPTS, [E2E] * 4, 16, chunkwise_mean_rank=0.0) == engine.greedy(PROMPTS, [None] * 4, 16)


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"chunkwise_preset": "fast"}, "preset = 'fast': Input should be 'lossless', 'balanced' or 'compact'"),
        ({"chunkwise_mean_rank": 2}, "mean_rank"),
        ({"chunkwise_mean_rank": "half"}, "mean_rank"),
        ({"chunkwise_rank": 4}, "unknown chunkwise_rank"),
        ({"chunkwise_preset": "lossless", "chunkwise_mean_rank": 0.5}, "not several"),
    ],
)
def test_an_impossible_override_is_refused(engine: Engine, extra: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        engine.greedy(PROMPTS[:1], [WIKI], 4, **extra)
    assert engine.greedy(PROMPTS[:1], [WIKI], 4)


def test_an_override_without_an_adapter_is_refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match="names no adapter"):
        engine.greedy(PROMPTS[:1], [None], 4, chunkwise_preset="balanced")


def test_a_damaged_ladder_is_refused_and_the_engine_continues(engine: Engine, tmp_path: Path) -> None:
    RankLadder.from_peft(WIKI).save_pretrained(tmp_path)
    tensors = next(tmp_path.glob("*.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"was cut off or altered"):
        engine.greedy(PROMPTS[:1], [tmp_path], 4)
    assert engine.greedy(PROMPTS[:1], [WIKI], 4)


def test_the_policy_of_a_ladder_is_its_default(engine: Engine, tmp_path: Path) -> None:
    replace(RankLadder.from_peft(WIKI), policy=ChunkWiseConfig.uniform(0.25)).save_pretrained(tmp_path)
    engine.add("quarter", PROMPTS[0], tmp_path, 4)
    engine.run()
    assert set(ranks(engine, "quarter")) == {4.0}


def cached_tokens(engine: Engine, prompt: Any, tokens: int = 4, **extra: Any) -> tuple[int, list[int]]:
    """The number of prompt tokens that were found in the prefix cache, and the generated tokens."""
    output = engine.llm.generate(
        prompt, engine.params(tokens, **extra), lora_request=engine.adapter(WIKI), use_tqdm=False
    )[0]
    return output.num_cached_tokens, list(output.outputs[0].token_ids)


@pytest.mark.parametrize("first", ["lossless", "balanced"])
def test_a_plan_does_not_use_the_kv_of_another_plan(engine: Engine, first: str) -> None:
    engine.llm.reset_prefix_cache()
    second = {"lossless": "balanced", "balanced": "lossless"}[first]
    expected = cached_tokens(engine, LONG, chunkwise_preset=first)
    assert expected[0] == 0
    assert cached_tokens(engine, LONG, chunkwise_preset=second)[0] == 0
    found, tokens = cached_tokens(engine, LONG, chunkwise_preset=first)
    assert found >= BLOCK
    assert tokens == expected[1]


@pytest.mark.parametrize(("preset", "is_shared"), [("lossless", True), ("balanced", False)])
def test_kv_of_generated_tokens_is_shared_only_if_it_depends_on_no_entropy(
    engine: Engine, preset: str, is_shared: bool
) -> None:
    engine.llm.reset_prefix_cache()
    prompt = engine.llm.get_tokenizer()(LONG).input_ids[:40]
    _, answer = cached_tokens(engine, {"prompt_token_ids": prompt}, 3 * BLOCK, chunkwise_preset=preset)
    further = {"prompt_token_ids": prompt + answer}
    found, tokens = cached_tokens(engine, further, chunkwise_preset=preset)
    assert found == (len(prompt + answer) // BLOCK * BLOCK if is_shared else BLOCK)
    engine.llm.reset_prefix_cache()
    assert cached_tokens(engine, further, chunkwise_preset=preset) == (0, tokens)


def test_the_scheduler_sees_a_prefix_that_was_found_in_the_cache(engine: Engine) -> None:
    engine.llm.reset_prefix_cache()
    for request in ("cold", "warm"):
        engine.add(request, LONG, WIKI, 8, chunkwise_preset="balanced")
        engine.run()
    assert np.array_equal(engine.plans["cold"].weights, engine.plans["warm"].weights)


def test_an_aborted_request_leaves_no_plan_behind(engine: Engine) -> None:
    for number in range(4):
        engine.add(f"abort{number}", PROMPTS[number], [WIKI, E2E][number % 2], 64, chunkwise_preset="balanced")
    for _ in range(3):
        engine.step()
    assert len(engine.planner) == 4
    engine.llm.llm_engine.abort_request(["abort0", "abort3"])
    finished = engine.run()
    assert finished.keys() == {"abort1", "abort2"}
    assert len(engine.planner) == 0


@pytest.fixture(scope="module")
def with_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `wiki` adapter with LoRA on the output head, too."""
    folder = tmp_path_factory.mktemp("with_head")
    adapter, config = load_file(f"{WIKI}/adapter_model.safetensors"), json.loads(Path(WIKI, CONFIG).read_text())
    torch.manual_seed(0)
    width, vocabulary = adapter["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape[1], 4096
    for side, shape in (("A", (config["r"], width)), ("B", (vocabulary, config["r"]))):
        adapter[f"base_model.model.lm_head.lora_{side}.weight"] = 0.05 * torch.randn(shape)
    save_file(adapter, folder / "adapter_model.safetensors")
    (folder / CONFIG).write_text(json.dumps({**config, "target_modules": [*config["target_modules"], "lm_head"]}))
    return folder


def test_an_adapter_of_the_output_head_gives_the_tokens_of_vllms_own_lora(engine: Engine, with_head: Path) -> None:
    adapters = [str(with_head), WIKI, None, str(with_head)]
    expected = own_lora(PROMPTS, adapters, 24)
    assert engine.greedy(PROMPTS, adapters, 24) == expected
    assert expected[0] != engine.greedy(PROMPTS[:1], [WIKI], 24)[0]


def test_an_adapter_of_the_output_head_follows_the_plan(engine: Engine, with_head: Path) -> None:
    assert engine.greedy(PROMPTS[:1], [with_head], 8, chunkwise_mean_rank=0.0) == engine.greedy(PROMPTS[:1], [None], 8)
    prompt = {"prompt": PROMPTS[0]}
    params = engine.params(1)
    params.prompt_logprobs = 1
    (refused,) = engine.llm.generate(prompt, params, lora_request=engine.adapter(with_head), use_tqdm=False)
    assert refused.outputs[0].stop_reason.endswith(NO_PROMPT_LOGPROBS)
    (plain,) = engine.llm.generate(prompt, params, lora_request=engine.adapter(WIKI), use_tqdm=False)
    assert len(plain.prompt_logprobs) == len(plain.prompt_token_ids)


def test_an_adapter_of_the_embedding_gives_the_tokens_of_vllms_own_lora(engine: Engine, with_embedding: Path) -> None:
    adapters = [str(with_embedding), WIKI, None, str(with_embedding)]
    expected = own_lora(PROMPTS, adapters, 24)
    assert engine.greedy(PROMPTS, adapters, 24) == expected
    assert [engine.greedy([prompt], [one], 24)[0] for prompt, one in zip(PROMPTS, adapters, strict=True)] == expected
    assert expected[0] != engine.greedy(PROMPTS[:1], [WIKI], 24)[0]


def test_an_adapter_of_the_embedding_follows_the_plan(engine: Engine, with_embedding: Path, tmp_path: Path) -> None:
    base = engine.greedy(PROMPTS, [None] * 4, 16)
    assert engine.greedy(PROMPTS, [with_embedding] * 4, 16, chunkwise_mean_rank=0.0) == base
    half = loading.load(str(with_embedding)).truncated(0.5)
    only_embedding = {name: one for name, one in half.modules.items() if "embed_tokens" in name}
    assert [module.rank for module in only_embedding.values()] == [8]
    tensors = {}
    for name, module in half.modules.items():
        sides = (
            ("lora_embedding_A", "lora_embedding_B") if name in only_embedding else ("lora_A.weight", "lora_B.weight")
        )
        for side, factor in zip(sides, (module.down, module.up), strict=True):
            tensors[f"base_model.model.{name}.{side}"] = factor.contiguous()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = json.loads((with_embedding / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "r": 8, "lora_alpha": 8}))
    adapters = [str(with_embedding), None, str(with_embedding), str(with_embedding)]
    alone = engine.greedy(PROMPTS, [str(tmp_path) if one else None for one in adapters], 16)
    assert engine.greedy(PROMPTS[:1], adapters[:1], 16, chunkwise_mean_rank=0.5) == alone[:1]
    mixed = ("chunkwise_mean_rank", "chunkwise_preset")
    for number, (name, value) in enumerate(zip(mixed, (0.5, "balanced"), strict=True)):
        engine.add(f"mixed{number}", PROMPTS[2 * number], with_embedding, 16, **{name: value})
    together = engine.run()
    assert together["mixed0"] == alone[0]
    assert together["mixed1"] == engine.greedy(PROMPTS[2:3], [with_embedding], 16, chunkwise_preset="balanced")[0]


@pytest.fixture(scope="module")
def small_engine(new_engine: Callable[..., Engine]) -> Engine:
    """An engine that takes prompts in pieces and runs out of KV space."""
    return new_engine(max_num_batched_tokens=64, num_gpu_blocks_override=24)


def preemptions(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    scheduler, seen = engine.core.scheduler, []
    preempt = scheduler._preempt_request

    def note(request: Any, *rest: Any, **options: Any) -> Any:
        seen.append(request.request_id)
        return preempt(request, *rest, **options)

    monkeypatch.setattr(scheduler, "_preempt_request", note)
    return seen


def test_chunked_prefill_and_preemption_do_not_change_plan_or_tokens(
    small_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = small_engine.llm.get_tokenizer()(LONG).input_ids
    prompts = [{"prompt_token_ids": ids[start : start + 100]} for start in range(0, 80, 10)]
    alone: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        small_engine.add(f"alone{number}", prompt, [WIKI, E2E][number % 2], 60, chunkwise_preset="balanced")
        alone |= small_engine.run()
    small_engine.llm.reset_prefix_cache()
    seen = preemptions(small_engine, monkeypatch)
    for number, prompt in enumerate(prompts):
        small_engine.add(f"together{number}", prompt, [WIKI, E2E][number % 2], 60, chunkwise_preset="balanced")
    together = small_engine.run()
    assert seen
    for number in range(len(prompts)):
        assert together[f"together{number}"] == alone[f"alone{number}"]
        plans = [small_engine.plans[f"{how}{number}"].weights for how in ("alone", "together")]
        assert np.array_equal(*plans)
    assert len(small_engine.planner) == 0


def test_soak(small_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """CHUNKWISE_SOAK gives the number of requests."""
    chance = random.Random(0)
    ids = small_engine.llm.get_tokenizer()(LONG).input_ids
    kinds = [
        ({"prompt_token_ids": ids[start : start + length]}, adapter, tokens)
        for start, length, adapter, tokens in [
            (0, 120, WIKI, 24),
            (40, 150, E2E, 16),
            (5, 60, None, 40),
            (70, 100, WIKI, 60),
            (20, 33, E2E, 48),
            (90, 110, WIKI, 8),
        ]
    ]
    expected = [small_engine.greedy([prompt], [adapter], tokens)[0] for prompt, adapter, tokens in kinds]
    small_engine.llm.reset_prefix_cache()
    seen = preemptions(small_engine, monkeypatch)
    wanted = int(os.environ.get("CHUNKWISE_SOAK", "60"))
    waiting: dict[str, int] = {}
    given: dict[str, list[int]] = {}
    added = aborted = 0
    while added < wanted or waiting:
        while added < wanted and len(waiting) < 16:
            kind = chance.randrange(len(kinds))
            small_engine.add(f"soak{added}", *kinds[kind])
            waiting[f"soak{added}"] = kind
            added += 1
        if chance.random() < 0.03:
            victim = chance.choice(list(waiting))
            small_engine.llm.llm_engine.abort_request([victim])
            del waiting[victim]
            aborted += 1
        for request, tokens in small_engine.step().items():
            assert tokens == expected[waiting.pop(request)]
            given[request] = tokens
    small_engine.settle()
    assert aborted and seen and len(given) + aborted == wanted
    assert len(small_engine.planner) == 0
    assert not small_engine.runner.requests


def test_the_salt_of_a_plan_reading_entropies_is_private() -> None:
    lossless, balanced = (ChunkWiseConfig.preset(name) for name in ("lossless", "balanced"))
    assert settings.salt(lossless) is None
    assert settings.salt(balanced).endswith(settings.PRIVATE)
    assert not settings.salt(ChunkWiseConfig.uniform(0.5)).endswith(settings.PRIVATE)
