"""What the engine reads off a model before it runs: its positions, and whether prompts may be cut into passes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as t
from transformers import GenerationConfig

import models
from chunkwise_lora import ChunkWiseConfig, ChunkWiseModel
from chunkwise_lora.engines.transformers import positions
from chunkwise_lora.engines.transformers.checks import GenerateOptions
from chunkwise_lora.engines.transformers.traits import ModelTraits
from models import adapter, build, greedy, peft_model

LOSSLESS = ChunkWiseConfig.preset("lossless")


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 1e4, **parameters}


LONGROPE = rope(
    "longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4, factor=2.0, original_max_position_embeddings=64
)


def with_rope(architecture: str, parameters: dict[str, Any], **changes: Any) -> Callable[[], t.PreTrainedConfig]:
    def config() -> t.PreTrainedConfig:
        config = models.ARCHITECTURES[architecture]()
        config.rope_parameters = parameters
        for name, value in changes.items():
            setattr(config, name, value)
        return config

    return config


# Positions


PAST_THE_END = {
    "default": rope("default"),
    "yarn": rope("yarn", factor=4.0, original_max_position_embeddings=32),
    "dynamic": rope("dynamic", factor=4.0),
}


@pytest.mark.parametrize("kind", PAST_THE_END)
def test_models_that_compute_positions_go_past_the_configured_length_like_peft(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, inputs = f"qwen2_{kind}", models.prompts((70,))
    monkeypatch.setitem(models.ARCHITECTURES, name, with_rope("qwen2", PAST_THE_END[kind], max_position_embeddings=32))
    tokens, logits = greedy(ChunkWiseModel(build(name), adapter(name), LOSSLESS), inputs, 4)
    expected_tokens, expected_logits = greedy(peft_model(name), inputs, 4)
    assert torch.equal(tokens, expected_tokens)
    assert (logits - expected_logits).abs().max() < 1e-4


def test_the_first_prompt_past_the_configured_length_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    positions._warn_once.cache_clear()
    model = ChunkWiseModel(build("llama", max_position_embeddings=32), adapter("llama"), LOSSLESS)
    for _ in range(2):
        model(**models.prompts((40,)))
    messages = [record.message for record in caplog.records]
    assert messages == ["a prompt is longer than the 32 positions that LlamaForCausalLM was configured for"]


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [("gpt2", 1024), ("opt", 1024), ("gptj", 1024), ("llama", math.inf), ("bloom", math.inf), ("xglm", math.inf)],
)
def test_only_tables_of_positions_limit_a_sequence(architecture: str, expected: float) -> None:
    assert ModelTraits.of(build(architecture)).positions == expected


# Prompts in several passes


def cuts(architecture: str, **options: Any) -> bool:
    model = build(architecture)
    asked = GenerateOptions(options, options.get("generation_config"), model.generation_config)
    return ModelTraits.of(model).prompt_passes_are_safe(asked)


IDS = torch.tensor([[5, 6, 7]])
TEXT = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


@pytest.mark.parametrize(
    "options",
    [
        TEXT,
        {**TEXT, "position_ids": torch.arange(3)[None]},
        {**TEXT, "pixel_values": None},
        {**TEXT, "max_new_tokens": 4, "do_sample": True, "num_beams": 2, "stop_strings": "x", "tokenizer": object()},
        {**TEXT, "logits_processor": [], "streamer": object(), "generation_config": GenerationConfig()},
    ],
    ids=",".join,
)
def test_a_prompt_of_text_may_run_in_several_passes(options: dict[str, Any]) -> None:
    assert cuts("llama", **options)


@pytest.mark.parametrize(
    "options",
    [
        {**TEXT, "pixel_values": torch.zeros(1, 3, 8, 8)},
        {**TEXT, "input_features": torch.zeros(1, 8, 8)},
        {**TEXT, "token_type_ids": IDS},
        {**TEXT, "past_key_values": t.DynamicCache()},
        {"input_ids": IDS, "attention_mask": torch.tensor([[0, 1, 1]])},
        {**TEXT, "output_hidden_states": True},
        {**TEXT, "generation_config": GenerationConfig(output_attentions=True)},
    ],
    ids=",".join,
)
def test_prompts_with_other_inputs_padding_or_outputs_of_every_pass_are_not_cut(options: dict[str, Any]) -> None:
    assert not cuts("llama", **options)


@pytest.mark.parametrize(
    ("parameters", "safe"),
    [
        (rope("linear", factor=2.0), True),
        (rope("yarn", factor=2.0, original_max_position_embeddings=64), True),
        (rope("dynamic", factor=2.0), False),
        (LONGROPE, False),
    ],
    ids=str,
)
def test_prompts_are_cut_only_where_angles_do_not_depend_on_the_length_of_a_pass(
    parameters: dict[str, Any], safe: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(models.ARCHITECTURES, "roped", with_rope("qwen2", parameters))
    assert cuts("roped", **TEXT) is safe


def test_the_rope_of_every_type_of_layer_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {"sliding_attention": rope("default"), "full_attention": rope("dynamic", factor=2.0)}
    assert cuts("gemma3", **TEXT)
    monkeypatch.setitem(models.ARCHITECTURES, "roped", with_rope("gemma3", kinds))
    assert not cuts("roped", **TEXT)


# Modules


@pytest.mark.parametrize("architecture", [*models.TYPICAL, *models.IMAGES])
def test_the_modules_that_see_the_tokens_of_a_pass_are_those_of_the_language_model_and_the_head(
    architecture: str,
) -> None:
    model = build(architecture)
    traits = ModelTraits.of(model)
    named = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    seeing = {name for name in named if traits.sees_tokens(name)}
    elsewhere = {name for name in named if re.search("vis|connector|projector", name)}
    assert seeing == named - elsewhere
    assert bool(elsewhere) == (architecture in models.IMAGES)
