"""Models that accelerate has spread over devices, or offloaded, run as models on one device do."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import attach_align_device_hook_on_blocks
from peft import PeftModel

import other_device
from chunkwise_lora import ChunkWiseConfig, ChunkWiseError, ChunkWiseModel, RankLadder
from chunkwise_lora.benchmark.methods import methods
from chunkwise_lora.calibration import CalibrationConfig
from chunkwise_lora.calibration.calibrate import calibrate
from chunkwise_lora.evaluation.baselines import Comparison
from chunkwise_lora.method.config import KVCacheConfig, LevelKVPolicy
from models import adapter, build, peft_model, prompts

MAP = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "lm_head": "cpu",
}
SPREAD: dict[str, Callable[[Path], Any]] = {
    "weights in memory": lambda folder: cpu_offload(build("llama"), execution_device=torch.device("cpu")),
    "weights on disk": lambda folder: disk_offload(build("llama"), folder, execution_device=torch.device("cpu")),
    "one layer on disk": lambda folder: dispatch_model(
        build("llama"), MAP, main_device="cpu", offload_dir=folder, force_hooks=True
    ),
}


def with_cache(**policy: Any) -> ChunkWiseConfig:
    balanced = ChunkWiseConfig.preset("balanced")
    levels = (LevelKVPolicy(**policy),) * balanced.levels
    return balanced.model_copy(update={"kv_cache": KVCacheConfig(levels=levels)})


CONFIGS = {
    "lossless": ChunkWiseConfig.preset("lossless"),
    "compact": ChunkWiseConfig.preset("compact"),
    "int8": with_cache(precision="int8"),
    "snapkv": with_cache(evict="snapkv", keep_share=0.5),
}


def generated(model: Any, config: str) -> torch.Tensor:
    with ChunkWiseModel(model, adapter("llama"), CONFIGS[config]) as chunkwise:
        tokens: torch.Tensor = chunkwise.generate(**prompts(), max_new_tokens=24, do_sample=False)
        assert chunkwise.trace is not None and not chunkwise.trace.kv_notes
    return tokens.cpu()


@pytest.mark.parametrize("spread", SPREAD)
def test_an_offloaded_model_runs_as_one_in_memory_and_as_peft(spread: str, tmp_path: Path) -> None:
    model = SPREAD[spread](tmp_path)
    for config in CONFIGS:
        assert torch.equal(generated(model, config), generated(build("llama"), config))
    with torch.no_grad(), ChunkWiseModel(model, adapter("llama")) as chunkwise:
        assert torch.allclose(chunkwise(**prompts()).logits, peft_model("llama")(**prompts()).logits, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(model(**prompts()).logits, build("llama")(**prompts()).logits), "detached"


def test_loading_an_adapter_into_an_offloaded_model_warns_of_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as found:
        ChunkWiseModel(SPREAD["weights in memory"](tmp_path), adapter("llama"))
    assert not [one for one in found if "meta" in str(one.message)]


@pytest.mark.filterwarnings("ignore:for .*. copying from a non-meta parameter")
def test_an_adapter_that_peft_has_offloaded_is_refused(tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(SPREAD["weights in memory"](tmp_path), str(adapter("llama")))
    with pytest.raises(ChunkWiseError, match="offloaded; give ChunkWiseModel the base model and the adapter"):
        ChunkWiseModel(model).generate(**prompts(), max_new_tokens=2)


def test_calibration_evaluation_and_benchmark_refuse_a_spread_model(tmp_path: Path) -> None:
    model = SPREAD["one layer on disk"](tmp_path)
    ladder = RankLadder.from_peft(adapter("llama"))
    for run in (
        lambda: calibrate(model, ladder, [3] * 4000, CalibrationConfig(mean_rank=0.5, block=24)),
        lambda: Comparison(model, adapter("llama")),
        lambda: methods(model, {"a": adapter("llama")}, {}),
    ):
        with pytest.raises(ChunkWiseError, match="must lie on one device here; load it without device_map"):
            run()


def run_over_two_devices() -> dict[str, torch.Tensor]:
    """The tokens of a model whose second layer and head lie on the CPU, and all else on another device."""
    devices = dict.fromkeys(MAP, f"{other_device.NAME}:0") | dict.fromkeys(
        ["model.layers.1", "model.norm", "lm_head"], "cpu"
    )
    model = build("llama")
    attach_align_device_hook_on_blocks(model, {"": f"{other_device.NAME}:0", **devices}, dict.fromkeys(devices, False))
    with torch.no_grad(), ChunkWiseModel(model, adapter("llama"), CONFIGS["compact"]) as chunkwise:
        cache = chunkwise(**prompts(), use_cache=True).past_key_values
        assert [layer.device.type for layer in cache.chunkwise_layers] == [other_device.NAME, "cpu"]
        assert not cache.can_step, "a graph of a step knows one device"
    return {config: generated(model, config) for config in CONFIGS}


def test_every_layer_runs_its_adapters_and_its_cache_on_its_own_device() -> None:
    with other_device.in_another_process() as call:
        found = call(run_over_two_devices)
    for config, tokens in found.items():
        assert torch.equal(tokens, generated(build("llama"), config))
