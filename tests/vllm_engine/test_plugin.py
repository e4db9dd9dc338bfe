"""What the plug-in refuses, does not change and switches off, and how much memory it needs."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import small
from chunkwise_lora import ChunkWiseConfig, EngineError, LadderError, RankLadder
from chunkwise_lora.benchmark.shapes import random_adapter
from chunkwise_lora.engines.base import Engine as ChunkWiseEngine
from chunkwise_lora.engines.requested_config import KEY
from chunkwise_lora.engines.vllm import frontend, loading, plugin, settings
from chunkwise_lora.engines.vllm.manager import _nbytes
from chunkwise_lora.engines.vllm.settings import ServerSettings
from chunkwise_lora.method.complexity import LearnedComplexity
from chunkwise_lora.method.config import ComplexityConfig
from conftest import OPTIONS, PROMPTS, WIKI, Engine


def patched_names() -> list[Any]:
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    return [InputProcessor.process_inputs, LoRAModelRunnerMixin.load_lora_model]


def messages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.chunkwise")
    monkeypatch.setattr(logger, "handlers", [handler])
    return seen


def test_an_unknown_version_is_refused_and_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = patched_names(), messages(monkeypatch)
    monkeypatch.setattr(plugin, "_registered", False)
    monkeypatch.setattr("vllm.__version__", "0.99.0+cpu")
    plugin.register()
    assert patched_names() == before
    assert not plugin._registered
    assert "supports vLLM 0.30, 0.31, 0.32, 0.33, not 0.99.0, and is off" in seen[0]


def test_a_vllm_that_lacks_a_needed_class_is_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = patched_names(), messages(monkeypatch)
    monkeypatch.setattr(plugin, "_registered", False)
    monkeypatch.delattr("vllm.v1.core.kv_cache_utils._gen_prompt_embeds_extra_hash_keys")
    plugin.register()
    assert patched_names() == before
    assert "changes nothing" in seen[0]


def test_the_runner_fulfils_the_protocol_of_an_engine(engine: Engine) -> None:
    assert isinstance(engine.runner.chunkwise, ChunkWiseEngine)
    assert engine.runner.chunkwise.kv_left_undone(ChunkWiseConfig.preset("balanced").kv_cache)


def test_a_second_call_changes_nothing(engine: Engine) -> None:
    before = patched_names()
    plugin.register()
    assert patched_names() == before


def test_the_switch_keeps_vllm_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    before = patched_names()
    monkeypatch.setattr(plugin, "_registered", False)
    monkeypatch.setenv("CHUNKWISE_VLLM", "0")
    plugin.register()
    assert patched_names() == before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"speculative_config": object()}, "speculative decoding"),
        ({"parallel_config": SimpleNamespace(pipeline_parallel_size=2, use_ubatching=False)}, "pipeline parallelism"),
        ({"parallel_config": SimpleNamespace(pipeline_parallel_size=1, use_ubatching=True)}, "dual-batch overlap"),
        (
            {"lora_config": SimpleNamespace(fully_sharded_loras=True, enable_tower_connector_lora=False)},
            "fully_sharded_loras",
        ),
        ({"use_v2_model_runner": True}, "Model Runner V2"),
    ],
)
def test_options_that_ladders_do_not_support_are_refused_by_name(changes: dict[str, Any], says: str) -> None:
    config: Any = SimpleNamespace(
        lora_config=SimpleNamespace(fully_sharded_loras=False, enable_tower_connector_lora=False),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, use_ubatching=False),
        speculative_config=None,
        use_v2_model_runner=False,
        additional_config={},
    )
    vars(config).update(changes)
    with pytest.raises(EngineError, match=f"{says}.*CHUNKWISE_VLLM=0"):
        frontend.prepare(config)


def test_a_sleep_that_would_discard_the_adapters_is_refused(engine: Engine) -> None:
    with pytest.raises(EngineError, match=r"sleep level 2.*level 1"):
        engine.llm.sleep(level=2)
    engine.llm.sleep(level=1)
    engine.llm.wake_up()
    assert engine.greedy(["A town"], [None], 2)


def test_the_environment_is_settled_for_all_processes(engine: Engine) -> None:
    config = engine.llm.llm_engine.vllm_config
    assert settings.of_server(config.additional_config) == ServerSettings()
    assert KEY in config.additional_config


def copy_adapter(folder: Path, **changes: Any) -> Path:
    """The `wiki` adapter with another config."""
    folder.mkdir(exist_ok=True)
    for file in Path(WIKI).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_dora": True}, "use_dora is set"),
        ({"r": 8}, "says rank 8"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    ],
)
def test_an_adapter_that_is_no_plain_lora_is_refused_before_the_engine_sees_it(
    engine: Engine, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        engine.greedy(PROMPTS[:1], [copy_adapter(tmp_path, **changes)], 4)
    assert engine.greedy(PROMPTS[:1], [WIKI], 4)


def test_an_adapter_that_replaces_modules_is_refused_before_the_engine_sees_it(engine: Engine, tmp_path: Path) -> None:
    folder = copy_adapter(tmp_path, modules_to_save=["lm_head"])
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(tensors | {"base_model.model.lm_head.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"replaces lm_head\.weight \(modules_to_save\)"):
        engine.greedy(PROMPTS[:1], [folder], 4)


def test_a_path_from_home_is_salted_by_its_own_config(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    ladder = replace(RankLadder.from_peft(WIKI), policy=ChunkWiseConfig.preset("balanced"))
    ladder.save_pretrained(tmp_path / "ladder")
    salts = []
    for path in ("~/ladder", str(tmp_path / "ladder")):
        request = SimpleNamespace(
            sampling_params=engine.params(4),
            lora_request=engine.adapter(path),
            prompt_token_ids=[1],
            prompt_embeds=None,
            cache_salt=None,
        )
        frontend.accept(engine.llm.llm_engine.vllm_config, request)
        salts.append(request.cache_salt)
    assert salts[0] == salts[1] == settings.salt(ChunkWiseConfig.preset("balanced"))


def test_a_request_is_planned_by_the_config_that_its_kv_is_salted_with(engine: Engine, tmp_path: Path) -> None:
    ladder = RankLadder.from_peft(WIKI)
    for name, share in {"first": 1.0, "changed": 0.5}.items():  # of a ladder that is loaded
        replace(ladder, policy=ChunkWiseConfig.uniform(share)).save_pretrained(tmp_path)
        engine.add(name, PROMPTS[0], tmp_path, 2)
        engine.run()
        weights = engine.plans[name].constant_weights
        assert weights is not None and weights.argmax() == round(share * (len(weights) - 1))
    learned = ChunkWiseConfig(complexity=ComplexityConfig(learned=True))
    folder = copy_adapter(tmp_path / "later")
    engine.greedy(PROMPTS[:1], [folder], 2)
    replace(ladder, learned=LearnedComplexity.neutral(), policy=learned).save_pretrained(folder)
    assert engine.greedy(PROMPTS[:1], [folder], 8) == engine.greedy(PROMPTS[:1], [WIKI], 8), "full rank till reloaded"


def test_a_ladder_of_another_base_is_refused_by_name_and_shape(engine: Engine, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(small.BASE)
    config.hidden_size, config.num_hidden_layers = 128, 1
    narrow = random_adapter(config, 4, tmp_path / "narrow")
    with pytest.raises(LadderError, match=r"qkv_proj takes 128 inputs .* 256 to 256 in the model"):
        engine.llm.llm_engine.add_lora(engine.adapter(narrow))
    config.hidden_size, config.num_hidden_layers = 256, 7
    with pytest.raises(LadderError, match=r"adapts model\.layers\.6.* no linear layer"):
        engine.llm.llm_engine.add_lora(engine.adapter(random_adapter(config, 4, tmp_path / "deep")))
    assert engine.greedy(PROMPTS[:1], [WIKI], 4)


def test_kv_decisions_that_vllm_cannot_carry_out_are_reported_once_per_ladder(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = messages(monkeypatch)
    replace(RankLadder.from_peft(WIKI), policy=ChunkWiseConfig.preset("compact")).save_pretrained(tmp_path)
    for _ in range(2):
        engine.greedy(PROMPTS[:1], [tmp_path], 2)
    (said,) = seen
    for undone in ("int8", "near-duplicate", "far past"):
        assert undone in said


def test_the_number_format_of_the_cache_is_reported() -> None:
    config = ChunkWiseConfig.preset("balanced").kv_cache
    for dtype, says in (
        ("auto", "is stored like the model"),
        ("fp8", "is stored as fp8, as --kv-cache-dtype fp8 says"),
    ):
        assert says in loading.kv_left_undone(config, dtype)[0]
    assert not loading.kv_left_undone(ChunkWiseConfig.preset("lossless").kv_cache, "fp8")


def test_ladders_of_mixed_rank_take_less_than_half_of_padded_slots(engine: Engine, tmp_path: Path) -> None:
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    config = AutoConfig.from_pretrained(small.BASE)
    ranks = [4, 8, 12, 16, 24, 32, 48, 64]
    manager = engine.runner.lora_manager.ladders
    requests = [engine.adapter(random_adapter(config, rank, tmp_path / str(rank))) for rank in ranks]
    for request in requests:
        engine.llm.llm_engine.add_lora(request)
    loaded = [engine.runner.lora_manager.loaded(request.lora_int_id).modules for request in requests]
    held = {  # by storage, because a layer and its loaded ladder share some
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for adapter in manager.backend.adapters
        for of_layer in manager.backend._products.factors(adapter).values()
        for factors in of_layer
        for tensor in factors.slices[-1]
    } | {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for ladder in loaded
        for modules in ladder.values()
        for module in modules
        for tensor in (module.up, module.down)
    }
    taken = sum(held.values())
    assert taken == sum(map(_nbytes, loaded))
    padded = sum(
        len(ranks) * stacked[0].numel() * stacked.element_size()
        for module in manager.modules.values()
        if isinstance(module, BaseLinearLayerWithLoRA)
        for pair in zip(module.lora_a_stacked, module.lora_b_stacked, strict=True)
        for stacked in (torch.empty(1, *one.shape[1:], dtype=one.dtype) for one in pair)
    )
    assert taken / padded == pytest.approx(sum(ranks) / (64 * len(ranks)))
    assert taken < 0.5 * padded
    for request in requests:
        engine.llm.llm_engine.remove_lora(request.lora_int_id)
    assert not manager.backend.adapters & {str(one.lora_int_id) for one in requests}


def test_files_are_checked_again_only_when_they_change(tmp_path: Path) -> None:
    loading._check.cache_clear()
    server = ServerSettings()
    for _ in range(2):
        loading.check(str(copy_adapter(tmp_path)) if not list(tmp_path.iterdir()) else str(tmp_path), server)
    assert loading._check.cache_info()[:2] == (1, 1)


def test_without_lora_vllm_does_not_change(new_engine: Callable[..., Engine]) -> None:
    """The last test, because it replaces the engine of this module."""
    from vllm import LLM, SamplingParams

    expected = new_engine().greedy(PROMPTS, [None] * 4, 16)
    llm = LLM(**{name: value for name, value in OPTIONS.items() if "lora" not in name})
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    assert not hasattr(runner, "chunkwise")
    assert "chunkwise" not in llm.llm_engine.vllm_config.additional_config
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert [list(one.outputs[0].token_ids) for one in outputs] == expected
