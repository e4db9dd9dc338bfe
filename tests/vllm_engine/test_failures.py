"""An adapter that cannot be loaded fails the requests that name it, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

import small
from chunkwise_lora import ChunkWiseConfig
from chunkwise_lora.benchmark.shapes import random_adapter
from chunkwise_lora.engines.vllm import reports, settings
from conftest import BLOCK, E2E, PROMPTS, WIKI, Engine

LONG = small.HELD_TEXT.read_text(encoding="utf-8")[:600]


@pytest.fixture(scope="module")
def engine(new_engine: Callable[..., Engine]) -> Engine:
    """An engine with room for two adapters."""
    return new_engine(max_loras=2, max_cpu_loras=2)


def copy_of(adapter: str, folder: Path, **changes: Any) -> Path:
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return folder


def outputs(engine: Engine, prompt: str, *adapters: Any) -> list[Any]:
    found = engine.llm.generate(
        [prompt] * len(adapters),
        engine.params(8),
        lora_request=[engine.adapter(one) for one in adapters],
        use_tqdm=False,
    )
    engine.settle()
    return [output.outputs[0] for output in found]


def evict(engine: Engine) -> None:
    engine.greedy(PROMPTS[:1], [WIKI], 1)
    engine.greedy(PROMPTS[:1], [E2E], 1)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut off": lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\x10"),
    "deleted": shutil.rmtree,
    "no config": lambda folder: (folder / "adapter_config.json").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_adapter_damaged_after_its_eviction_fails_alone_and_leaves_no_kv(
    engine: Engine, tmp_path: Path, damage: str
) -> None:
    folder = copy_of(E2E, tmp_path / "adapter")
    expected = [list(one.token_ids) for one in outputs(engine, LONG, folder, WIKI, None)]
    evict(engine)
    DAMAGES[damage](folder)
    engine.llm.reset_prefix_cache()
    failed, *others = outputs(engine, LONG, folder, WIKI, None)
    assert failed.finish_reason == "error"
    assert failed.stop_reason.startswith(f"{reports.SAYS}{folder}")
    assert [list(one.token_ids) for one in others] == expected[1:]
    assert len(engine.planner) == 0 and not engine.runner.requests
    copy_of(E2E, folder)
    (repaired,) = outputs(engine, LONG, folder)
    assert list(repaired.token_ids) == expected[0], "KV of the failed request was used"


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_adapter_in_memory_needs_no_files(engine: Engine, tmp_path: Path, damage: str) -> None:
    folder = copy_of(E2E, tmp_path / "adapter")
    expected = engine.greedy(PROMPTS[:1], [folder], 8)
    DAMAGES[damage](folder)
    assert engine.greedy(PROMPTS[:1], [folder], 8) == expected


def test_an_adapter_of_another_base_fails_alone(engine: Engine, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(small.BASE)
    config.hidden_size, config.num_hidden_layers = 128, 1
    expected = [list(one.token_ids) for one in outputs(engine, PROMPTS[0], WIKI, None)]
    failed, *others = outputs(engine, PROMPTS[0], random_adapter(config, 4, tmp_path), WIKI, None)
    assert "qkv_proj takes 128 inputs" in failed.stop_reason
    assert [list(one.token_ids) for one in others] == expected


def test_a_device_without_room_fails_one_adapter(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = engine.runner.lora_manager.ladders.backend
    load = backend.load
    folder = copy_of(E2E, tmp_path)

    def full(adapter: str, modules: Any) -> None:
        if adapter == str(engine.adapter(folder).lora_int_id):
            raise torch.OutOfMemoryError("no room")
        load(adapter, modules)

    monkeypatch.setattr(backend, "load", full)
    failed, other = outputs(engine, PROMPTS[0], folder, WIKI)
    assert failed.stop_reason == f"{reports.SAYS}{folder}: could not be loaded: no room"
    assert other.finish_reason == "length"
    monkeypatch.undo()
    assert outputs(engine, PROMPTS[0], folder)[0].finish_reason == "length"


def test_patterns_that_take_re_forever_are_matched(engine: Engine, tmp_path: Path) -> None:
    folder = copy_of(WIKI, tmp_path, rank_pattern={r"(\w+\w+\.*)+!": 3}, alpha_pattern={r"(.*a|.*)*b": 7})
    assert engine.greedy(PROMPTS[:1], [folder], 8) == engine.greedy(PROMPTS[:1], [WIKI], 8)


def test_an_error_quotes_only_part_of_a_long_value(engine: Engine) -> None:
    long = "x" * 200_000
    for adapter, extra in ((f"/{long}", {}), (WIKI, {"chunkwise_preset": long}), (WIKI, {f"chunkwise_{long}": 1})):
        with pytest.raises(ValueError, match=r"chunkwise|xxx") as error:
            engine.greedy(PROMPTS[:1], [adapter], 1, **extra)
        assert len(str(error.value)) < 2 * reports.LONGEST


def test_loading_in_place_reads_the_files_once_per_request(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.lora.request import LoRARequest

    manager, loads = engine.runner.lora_manager, []
    load = manager._load_adapter
    monkeypatch.setattr(manager, "_load_adapter", lambda request: loads.append(request) or load(request))
    request = LoRARequest("replaced", 1000, str(copy_of(WIKI, tmp_path)), load_inplace=True)
    for adapter in (WIKI, E2E):
        copy_of(adapter, tmp_path)
        output = engine.llm.generate(PROMPTS[:1], engine.params(8), lora_request=request, use_tqdm=False)[0]
        assert list(output.outputs[0].token_ids) == engine.greedy(PROMPTS[:1], [adapter], 8)[0]
    assert [one.lora_int_id for one in loads].count(1000) == 2


CONFIGS = [ChunkWiseConfig.preset(name) for name in ("lossless", "balanced", "compact")] + [
    ChunkWiseConfig.uniform(share) for share in (0.25, 0.5)
]
GIVEN = st.none() | st.lists(
    st.sampled_from(["", "a", settings.SALT, settings.PRIVATE, *(settings.salt(one) or "" for one in CONFIGS)])
).map("".join)


@given(st.sampled_from(CONFIGS), GIVEN, st.sampled_from(CONFIGS), GIVEN)
def test_no_salt_of_a_client_is_that_of_another_plan(
    one: ChunkWiseConfig, given_one: str | None, other: ChunkWiseConfig, given_other: str | None
) -> None:
    salts = [settings.salt(one, given_one) or None, settings.salt(other, given_other) or None]
    assert (salts[0] == salts[1]) is (one == other and (given_one or None) == (given_other or None))


def test_a_clients_salt_shares_no_kv_across_plans(engine: Engine) -> None:
    def cached(salt: str | None, preset: str) -> int:
        prompt = {"prompt": LONG, **({"cache_salt": salt} if salt else {})}
        params = engine.params(1, chunkwise_preset=preset)
        return engine.llm.generate(prompt, params, lora_request=engine.adapter(WIKI), use_tqdm=False)[
            0
        ].num_cached_tokens

    engine.llm.reset_prefix_cache()
    assert cached(None, "balanced") == 0
    assert cached(settings.salt(ChunkWiseConfig.preset("balanced")), "lossless") == 0
    assert cached("mine", "balanced") == 0
    assert cached("mine", "balanced") >= BLOCK
