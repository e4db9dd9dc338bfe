"""Every LoRA adapter that PEFT loads is read, from its files and from a model in memory, and means the same."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor

from chunkwise_lora import LadderError, RankLadder
from chunkwise_lora.ladder.adapter_source import AdapterSource
from chunkwise_lora.ladder.peft_model import ladder_of, other_parts, plain_layers
from models import ADAPTERS, TARGETS, adapter, build, peft_model, prompts

ATTENTION = ["q_proj", "v_proj"]

OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DoRA": ("llama", {"use_dora": True}),
    "DoRA on Conv1D": ("gpt2", {"use_dora": True}),
    "activated": ("llama", {"alora_invocation_tokens": prompts()["input_ids"][1, 3:5].tolist()}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding and head": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "lora_bias": ("qwen2", {"lora_bias": True, "target_modules": ATTENTION}),
    "biases of adapted modules": ("qwen2", {"bias": "lora_only"}),
    "all biases": ("gpt2", {"bias": "all"}),
    "trainable tokens": ("llama", {"trainable_token_indices": [3, 4, 90]}),
    "bare parameters": ("qwen3_moe", {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    "only bare parameters": ("qwen3_moe", {"target_modules": [], "target_parameters": ["experts.down_proj"]}),
}
"""Adapters that are more than plain LoRA: architecture, and changes to a LoRA of rank 8 on all linear layers."""

PLAIN = [("llama", kind) for kind in ADAPTERS] + [("gpt2", "plain"), ("qwen3_moe", "plain"), ("phi3", "plain")]


def peft_with(architecture: str, seed: int = 1, **options: Any) -> PeftModel:
    """A model in memory with a random adapter."""
    config = {
        "r": 8,
        "lora_alpha": 16,
        "init_lora_weights": False,
        "target_modules": TARGETS.get(architecture, "all-linear"),
        **options,
    }
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = get_peft_model(build(architecture), LoraConfig(task_type="CAUSAL_LM", **config))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


@cache
def other(kind: str, folder: Path) -> Path:
    """The folder of an adapter that is more than plain LoRA."""
    architecture, options = OTHERS[kind]
    peft_with(architecture, **options).save_pretrained(str(folder))
    return folder


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**prompts()).logits


def loaded(architecture: str, source: AdapterSource) -> PeftModel:
    """A fresh base with the adapter, loaded as an engine does it, without a key that is not expected or missing."""
    model = get_peft_model(build(architecture), LoraConfig(**source.config))
    found = set_peft_model_state_dict(model, source.tensors)
    assert not found.unexpected_keys
    assert not [key for key in found.missing_keys if ".default." in key or key.endswith(".default")]
    return model.eval()


# From files


@pytest.mark.parametrize(("architecture", "kind"), PLAIN)
def test_a_plain_adapter_loads_as_in_peft(architecture: str, kind: str) -> None:
    source = AdapterSource.load(adapter(architecture, kind))
    assert source.ladder is None
    assert torch.equal(logits(loaded(architecture, source)), logits(peft_model(architecture, kind)))


@pytest.mark.parametrize("kind", OTHERS)
def test_an_adapter_that_is_more_than_plain_lora_loads_as_in_peft(tmp_path: Path, kind: str) -> None:
    architecture, folder = OTHERS[kind][0], other(kind, tmp_path)
    reference = PeftModel.from_pretrained(build(architecture), str(folder)).eval()
    assert torch.equal(logits(loaded(architecture, AdapterSource.load(folder))), logits(reference))
    assert not torch.allclose(logits(reference), logits(build(architecture)), atol=0.01), "the adapter does something"


@pytest.mark.parametrize("kind", OTHERS)
def test_an_adapter_that_a_ladder_cannot_hold_is_refused_with_the_remedy(tmp_path: Path, kind: str) -> None:
    with pytest.raises(LadderError, match=r"adapter_.*ChunkWiseModel, which runs the rest at full rank"):
        RankLadder.load(other(kind, tmp_path))


@pytest.mark.parametrize("kind", ["plain", "patterns", "saved_mlp"])
def test_a_ladders_folder_loads_as_the_adapter(tmp_path: Path, kind: str) -> None:
    ladder = RankLadder.from_peft(adapter("llama", kind))
    ladder.save_pretrained(tmp_path)
    source = AdapterSource.load(tmp_path)
    assert source.ladder is not None
    assert source.ladder.fingerprint == ladder.fingerprint
    assert torch.allclose(logits(loaded("llama", source)), logits(peft_model("llama", kind)), atol=1e-4)


# From a model in memory


@pytest.mark.parametrize(("architecture", "kind"), PLAIN)
def test_a_model_in_memory_gives_the_ladder_of_its_files(architecture: str, kind: str) -> None:
    model, folder = peft_model(architecture, kind), adapter(architecture, kind)
    files, memory = RankLadder.from_peft(folder), RankLadder.from_peft(model)
    assert set(other_parts(model, "default").values()) <= {"replaced module"}
    assert memory.modules.keys() == files.modules.keys() == plain_layers(model, "default").keys()
    for name, module in memory.modules.items():
        assert torch.equal(module.up @ module.down, files.modules[name].up @ files.modules[name].down), name
    assert memory.saved_modules.keys() == files.saved_modules.keys()
    assert all(torch.equal(memory.saved_modules[name], files.saved_modules[name]) for name in memory.saved_modules)
    assert (memory.rung_ranks, memory.base_model) == (files.rung_ranks, files.base_model)


WORDS = {
    "DoRA": "DoRA",
    "DoRA on Conv1D": "DoRA",
    "activated": "activated LoRA",
    "embedding": "LoRA on an embedding",
    "embedding and head": "LoRA on an embedding",
    "lora_bias": "LoRA with a bias",
    "biases of adapted modules": "trained bias",
    "all biases": "trained bias",
    "trainable tokens": "trainable tokens",
    "bare parameters": "LoRA on a bare parameter",
    "only bare parameters": "LoRA on a bare parameter",
}


@pytest.mark.parametrize("kind", OTHERS)
def test_parts_of_a_model_that_are_not_plain_are_told_and_refused(kind: str) -> None:
    model = peft_with(OTHERS[kind][0], **OTHERS[kind][1])
    parts = other_parts(model, "default")
    assert set(parts.values()) == {WORDS[kind]}
    for name in parts:
        module, _, parameter = name.rpartition(".")
        base = build(OTHERS[kind][0])
        assert hasattr(base.get_submodule(module), parameter), "names are those of the base model"
    with pytest.raises(LadderError, match=WORDS[kind]):
        RankLadder.from_peft(model)


def test_the_ladder_of_the_plain_part_of_an_adapter() -> None:
    model = peft_with("llama", target_modules=["embed_tokens", "q_proj"])
    assert ladder_of(model, "default").modules.keys() == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}


def test_an_adapter_without_a_plain_layer_has_no_ladder() -> None:
    model = peft_with("llama", use_dora=True)
    assert not plain_layers(model, "default")
    with pytest.raises(LadderError, match="no plain LoRA"):
        ladder_of(model, "default")


def test_an_adapter_of_a_model_is_chosen_by_name() -> None:
    model = peft_with("llama")
    model.load_adapter(str(adapter("llama", "one_layer")), "other")
    assert len(RankLadder.from_peft(model).modules) > 4
    assert len(RankLadder.from_peft(model, adapter_name="other").modules) == 4
    with pytest.raises(LadderError, match="no adapter 'third'; it has 'default', 'other'"):
        RankLadder.from_peft(model, adapter_name="third")
