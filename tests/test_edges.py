"""Unusual uses of the transformers engine: models with other caches, unusual calls, copies, parts of a model."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from packaging.version import Version

import models
from architectures import SIZES
from chunkwise_lora import ChunkWiseConfig, ChunkWiseModel, EngineError
from chunkwise_lora.engines.transformers import runner
from chunkwise_lora.engines.transformers.traits import forward_parameters
from models import adapter, build, greedy, peft_model, prompts

LOSSLESS, BALANCED = ChunkWiseConfig.preset("lossless"), ChunkWiseConfig.preset("balanced")
OTHERS: dict[str, tuple[Callable[[], t.PreTrainedConfig], Any]] = {
    "minimax": (
        lambda: t.MiniMaxConfig(
            **SIZES,
            num_local_experts=2,
            num_experts_per_tok=1,
            layer_types=["linear_attention", "full_attention"],
            head_dim=8,
        ),
        ["q_proj", "k_proj", "v_proj", "o_proj"],
    ),
    "openai-gpt": (
        lambda: t.OpenAIGPTConfig(
            vocab_size=97,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=512,
            initializer_range=0.18,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
        ),
        "all-linear",
    ),
    "deepseek_v3": (
        lambda: t.DeepseekV3Config(
            **{**SIZES, "num_key_value_heads": 4},
            moe_intermediate_size=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=16,
        ),
        ["q_b_proj", "kv_b_proj", "o_proj"],
    ),
    "doge": (lambda: t.DogeConfig(**SIZES), ["q_proj", "k_proj", "v_proj", "o_proj"]),
    "diffllama": (lambda: t.DiffLlamaConfig(**SIZES), "all-linear"),
    "rwkv": (
        lambda: t.RwkvConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, context_length=256, eos_token_id=None),
        "all-linear",
    ),
    "mamba": (
        lambda: t.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4, eos_token_id=None),
        r".*\.in_proj",
    ),
    "longrope": (
        lambda: t.Phi3Config(
            **{**SIZES, "max_position_embeddings": 256},
            original_max_position_embeddings=32,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
            },
        ),
        "all-linear",
    ),
}


@pytest.fixture(autouse=True)
def _other_models(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (config, targets) in OTHERS.items():
        monkeypatch.setitem(models.ARCHITECTURES, name, config)
        monkeypatch.setitem(models.TARGETS, name, targets)


def attached(name: str = "llama", config: ChunkWiseConfig = LOSSLESS) -> ChunkWiseModel:
    return ChunkWiseModel(build(name), adapter(name), config)


@pytest.mark.parametrize("name", ["minimax", "openai-gpt", "deepseek_v3", "rwkv", "doge", "diffllama"])
def test_a_model_with_another_cache_or_without_one_is_lossless_too(name: str) -> None:
    tokens, logits = greedy(attached(name), prompts(), 16)
    expected_tokens, expected_logits = greedy(peft_model(name), prompts(), 16)
    assert torch.equal(tokens, expected_tokens)
    assert (logits - expected_logits).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["doge", "diffllama"])
def test_a_model_with_its_own_attention_gets_the_whole_cache(name: str) -> None:
    compact = ChunkWiseConfig.preset("compact")
    slow = ChunkWiseModel(build(name), adapter(name), compact, models.FAST["no fast path"])
    expected = greedy(slow, prompts(), 40)[1]
    assert (greedy(attached(name, compact), prompts(), 40)[1] - expected).abs().max() < 0.05


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("rwkv", BALANCED, "sees .* tokens of a pass"),
        ("deepseek_v3", BALANCED, "kv_b_proj: sees .* tokens of a pass of 3 x 1.*lossless preset"),
    ],
)
def test_a_call_that_cannot_be_planned_is_refused(name: str, config: ChunkWiseConfig, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        attached(name, config).generate(**prompts(), max_new_tokens=40, do_sample=False)


def test_a_recurrent_model_goes_on_with_a_cache_that_the_user_made() -> None:
    logits = []
    for model in (peft_model("mamba"), attached("mamba")):
        name = next(name for name in ("cache", "cache_params") if name in forward_parameters(build("mamba")))
        with torch.no_grad():
            cache = getattr(model(prompts((9,))["input_ids"], **{name: t.DynamicCache(config=model.config)}), name)
            logits.append(model(torch.tensor([[5]]), **{name: cache}).logits)
    assert torch.allclose(*logits, atol=1e-4)


@pytest.mark.parametrize("config", [LOSSLESS, BALANCED])
def test_a_model_that_drops_its_cache_on_the_way_begins_again_or_is_refused(config: ChunkWiseConfig) -> None:
    model, options = attached("longrope", config), {"max_new_tokens": 40, "do_sample": False}
    if Version(t.__version__) < Version("5.20"):  # transformers passed only the last token then
        with pytest.raises(EngineError, match=r"has dropped its cache after 32 tokens.*use_cache=False"):
            model.generate(**prompts(), **options)
        return
    tokens = model.generate(**prompts(), **options)
    assert model.trace is not None
    assert [len(sequence.tokens) for sequence in model.trace.sequences] == [44, 50, 47]
    if config is LOSSLESS:
        assert torch.equal(tokens, peft_model("longrope").generate(**prompts(), **options))


def test_the_body_of_the_model_alone_runs_with_the_adapter() -> None:
    ids = prompts((9, 9))["input_ids"]
    expected = peft_model("llama").base_model.model.model(ids).last_hidden_state
    assert torch.allclose(attached().base.model(ids).last_hidden_state, expected, atol=1e-4)


def test_a_pass_that_fails_leaves_no_plan_behind() -> None:
    model, ids = attached(), prompts((9, 9))["input_ids"]
    expected = model.base.model(ids).last_hidden_state
    broken = model.base.lm_head.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids)
    broken.remove()
    assert torch.allclose(model.base.model(ids).last_hidden_state, expected, atol=1e-5)


@pytest.mark.parametrize("act", [copy.deepcopy, pickle.dumps])
def test_an_attached_model_refuses_to_be_copied_and_a_detached_one_does_not(act: Callable[[Any], Any]) -> None:
    model = attached()
    for thing in (model, model.model):
        with pytest.raises(EngineError, match=r"detach\(\) first"):
            act(thing)
    act(model.detach())


def test_a_returned_cache_outlives_its_generation() -> None:
    cache = attached().generate(**prompts(), max_new_tokens=2, return_dict_in_generate=True).past_key_values
    cache.reorder_cache(torch.tensor([0, 1, 2]))
    assert copy.deepcopy(cache).get_seq_length() == cache.get_seq_length() > 0


@pytest.mark.parametrize(("config", "passes"), [(LOSSLESS, 1), (BALANCED, 5)])
def test_only_a_kv_policy_that_acts_cuts_long_prompts(
    monkeypatch: pytest.MonkeyPatch, config: ChunkWiseConfig, passes: int
) -> None:
    monkeypatch.setattr(runner, "LONG_PROMPT", 16)
    monkeypatch.setattr(runner, "PREFILL_TOKENS", 4)
    model = attached("llama", config)
    for tokens, expected in ((16, 1), (17, passes)):
        model.generate(**prompts((tokens,)), max_new_tokens=1)
        assert model.trace is not None and model.trace.passes == expected


def test_an_inner_context_leaves_the_outer_one_attached() -> None:
    with attached() as model:
        with model:
            pass
        assert model.attached
    assert not model.attached


def test_unset_fields_of_a_generation_config_use_the_models_values() -> None:
    model, silent = attached(), t.GenerationConfig(max_new_tokens=16)
    model.model.generation_config.eos_token_id = list(range(2, 60))
    model.model.generation_config.pad_token_id = 0
    runs = []
    for options in ({"generation_config": silent}, {"max_new_tokens": 16}):
        model.generate(**prompts(), **options)
        assert model.trace is not None
        runs.append([sequence.tokens for sequence in model.trace.sequences])
    assert runs[0] == runs[1]
    model.model.generation_config.use_cache = False
    model.generate(prompts()["input_ids"], silent, attention_mask=prompts()["attention_mask"])
    assert model.trace.kv_bytes == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate(**prompts(), guidance_scale=1.5), "guidance_scale is not supported"),
        (lambda m: m.generate(prompts()["input_ids"], attention_mask=[[1]]), "attention_mask is a list"),
        (lambda m: m.generate(**prompts(), chunkwise_config="balanced"), "chunkwise_config is a str"),
        (lambda m: m.generate(**prompts(), adapter_names=5), "adapter_names is a int"),
        (lambda m: ChunkWiseModel(build("llama"), adapter("llama"), "balanced"), "config is a str"),
        (lambda m: ChunkWiseModel(build("llama"), None), "give a ladder"),
        (lambda m: ChunkWiseModel(build("llama"), {"a": 5}), "adapter 'a' is a int"),
    ],
)
def test_a_call_of_the_wrong_kind_is_refused_by_name(call: Callable[[ChunkWiseModel], Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        call(attached())


def _truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])


def _change(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "cannot be loaded"),
        (_change(num_attention_heads=0), "cannot be loaded"),
        (_change(hidden_act="nope"), "cannot be loaded"),
        (_change(num_hidden_layers=3), "has no weights for 9 parameters, such as model.layers.2"),
    ],
    ids=["truncated", "zero heads", "unknown activation", "a layer too many"],
)
def test_a_damaged_base_is_refused_in_one_line(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(EngineError, match=message) as refusal:
        ChunkWiseModel.from_pretrained(tmp_path, adapter("llama"))
    assert str(tmp_path) in str(refusal.value)
    assert "\n" not in str(refusal.value)
