"""Which config a sequence follows: that of the call, else of the model or server, else of the ladder, else lossless."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from chunkwise_lora import ChunkWiseConfig, ChunkWiseModel, ConfigError, RankLadder
from chunkwise_lora.engines.base import Engine, config_for
from chunkwise_lora.engines.requested_config import of_request
from chunkwise_lora.engines.vllm import settings
from chunkwise_lora.method.config import ComplexityConfig
from models import adapter, build, greedy, prompts

LOSSLESS, BALANCED, COMPACT = (ChunkWiseConfig.preset(name) for name in ("lossless", "balanced", "compact"))


def ladder(policy: ChunkWiseConfig | None = None, seed: int = 1) -> RankLadder:
    return replace(RankLadder.from_peft(adapter("llama", seed=seed)), policy=policy)


def test_the_call_is_asked_first_then_the_model_then_the_ladder() -> None:
    planned = ladder(BALANCED)
    assert config_for(planned, call=COMPACT, model=LOSSLESS) == COMPACT
    assert config_for(planned, model=COMPACT) == COMPACT
    assert config_for(planned) == BALANCED
    assert config_for(ladder()) == config_for(None) == LOSSLESS


def test_a_config_that_needs_a_learned_estimator_is_refused_without_one() -> None:
    learned = ChunkWiseConfig(complexity=ComplexityConfig(learned=True))
    with pytest.raises(ConfigError, match="chunkwise calibrate"):
        config_for(ladder(), call=learned)


def ranks(model: ChunkWiseModel, **options: object) -> list[float]:
    model.generate(**prompts((20, 20)), max_new_tokens=12, do_sample=False, **options)
    assert model.trace is not None
    return [sequence.mean_rank for sequence in model.trace.sequences]


@pytest.mark.parametrize("way", ["object", "folder", "loaded later"])
def test_every_way_to_attach_a_ladder_uses_its_policy(way: str, tmp_path: object) -> None:
    planned = ladder(ChunkWiseConfig.uniform(0.5))
    if way == "folder":
        planned.save_pretrained(str(tmp_path))
    if way == "loaded later":
        model = ChunkWiseModel(build("llama"), {"first": ladder(seed=2)})
        model.load_adapter(planned, "second")
        assert ranks(model, adapter_names="first") == [8, 8]
        assert ranks(model, adapter_names="second") == [4, 4]
    else:
        model = ChunkWiseModel(build("llama"), planned if way == "object" else str(tmp_path))
        assert ranks(model) == [4, 4]
        assert ranks(model, chunkwise_config=LOSSLESS) == [8, 8]
    whole = ChunkWiseModel(build("llama"), planned, ChunkWiseConfig.uniform(0.75))
    assert ranks(whole) == [6, 6]


def test_without_calibration_the_default_is_lossless() -> None:
    assert ranks(ChunkWiseModel(build("llama"), adapter("llama"))) == [8, 8]


def test_every_ladder_of_a_batch_follows_its_own_policy() -> None:
    ladders = {"a": ladder(ChunkWiseConfig.uniform(0.5)), "b": ladder(COMPACT, seed=2), "c": ladder(seed=3)}
    model = ChunkWiseModel(build("llama"), ladders)
    inputs = prompts((30, 30, 30))
    together = greedy(model, inputs, 16, adapter_names=["a", "b", "c"])[0]
    assert model.trace is not None
    mixed = model.trace.sequences
    for row, name in enumerate(ladders):
        alone = ChunkWiseModel(build("llama"), ladders[name])
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        tokens = greedy(alone, one, 16)[0]
        assert alone.trace is not None
        assert torch.equal(together[row], tokens[0])
        assert mixed[row].ranks == pytest.approx(alone.trace.sequences[0].ranks)
        cuts, expected = (
            [(one.chunk.start, one.chunk.end, one.selection, one.kv) for one in sequence.chunks]
            for sequence in (mixed[row], alone.trace.sequences[0])
        )
        assert cuts == expected


def test_the_model_fulfils_the_protocol_of_an_engine() -> None:
    model = ChunkWiseModel(build("llama"), adapter("llama"))
    assert isinstance(model, Engine)
    assert model.planner is None
    with model.stream() as call:
        assert model.planner is call.planner


# The server


def test_a_server_may_name_its_config_in_its_settings_or_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHUNKWISE_PRESET", raising=False)
    assert settings.of_server({}).chosen is None
    monkeypatch.setenv("CHUNKWISE_PRESET", "compact")
    assert settings.of_server({}).chosen == COMPACT
    assert settings.of_server({"chunkwise": {"mean_rank": 0.5}}).chosen == ChunkWiseConfig.uniform(0.5)
    assert of_request({"chunkwise_preset": "balanced", "other": 1}) == BALANCED
    assert of_request({"other": 1}) is None


def test_a_server_may_give_all_settings() -> None:
    config = ChunkWiseConfig.uniform(0.75)
    assert settings.of_server({"chunkwise": {"config": config.model_dump(mode="json")}}).chosen == config


@pytest.mark.parametrize(
    ("additional", "says"),
    [
        ({"chunkwise": {"preset": "fast"}}, r"--additional-config, 'chunkwise': ServerSettings: preset = 'fast'"),
        ({"chunkwise": {"speed": 1}}, r"speed"),
        ({"chunkwise": {"preset": "compact", "mean_rank": 0.5}}, r"not several"),
        ({"chunkwise": 3}, r"--additional-config"),
    ],
)
def test_an_impossible_server_setting_names_its_place(additional: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        settings.of_server(additional)


def test_a_variable_may_give_the_memory_for_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHUNKWISE_ADAPTER_MEMORY", "512MiB")
    assert settings.of_server({}).adapter_memory == 2**29
    monkeypatch.setenv("CHUNKWISE_PRESET", "compact")
    assert settings.of_server({}).chosen == COMPACT


def test_an_impossible_variable_names_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHUNKWISE_MEAN_RANK", "much")
    with pytest.raises(ConfigError, match="environment"):
        settings.of_server({})
