"""Every LoRA adapter that PEFT loads is read, from its files and from a model in memory, and means the same."""

from __future__ import annotations

import atexit
import itertools
import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import errors
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils.save_and_load import get_base_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from chunkwise_lora import ChunkWiseConfig, LadderError, RankLadder
from chunkwise_lora.ladder.adapter_source import AdapterSource
from chunkwise_lora.ladder.peft_files import CONFIG_NAME, WEIGHTS_NAME
from chunkwise_lora.ladder.peft_model import base_parameters, other_parts, plain_adapter, plain_layers
from models import ADAPTERS, TARGETS, VOCABULARY, adapter, build, peft_model, prompts

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


def test_a_ladder_with_a_dangerous_name_is_refused() -> None:
    ladder = replace(RankLadder.from_peft(adapter("llama")), saved_modules={"(.*)*x.weight": torch.ones(3)})
    with pytest.raises(LadderError, match=r"modules_to_save has .* hours"):
        AdapterSource.of(ladder)


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


def test_the_plain_part_of_an_adapter_holds_its_plain_layers_only() -> None:
    model = peft_with("llama", target_modules=["embed_tokens", "q_proj"])
    assert plain_adapter(model, "default").factors.keys() == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}


def test_an_adapter_without_a_plain_layer_has_no_ladder() -> None:
    model = peft_with("llama", use_dora=True)
    assert not plain_layers(model, "default")
    with pytest.raises(LadderError, match="no plain LoRA"):
        plain_adapter(model, "default")


def test_a_model_without_adapters_is_refused() -> None:
    with pytest.raises(LadderError, match=r"LlamaForCausalLM is no adapter; give .* peft\.PeftModel"):
        RankLadder.from_peft(build("llama"))  # type: ignore[arg-type]


def test_an_adapter_of_a_model_is_chosen_by_name() -> None:
    model = peft_with("llama")
    model.load_adapter(str(adapter("llama", "one_layer")), "other")
    assert len(RankLadder.from_peft(model).modules) > 4
    assert len(RankLadder.from_peft(model, adapter_name="other").modules) == 4
    with pytest.raises(LadderError, match="no adapter 'third'; it has 'default', 'other'"):
        RankLadder.from_peft(model, adapter_name="third")


def test_a_variant_that_only_trains_differently_is_plain(tmp_path: Path) -> None:
    for options in ({"init_lora_weights": "mica", "r": 4}, {"velora_config": {"num_groups": 4}}):
        model = peft_with("llama", **options)
        for layer in plain_layers(model, "default").values():
            torch.nn.init.normal_(layer.lora_A["default"].weight)
        assert not other_parts(model, "default")
        model.save_pretrained(str(tmp_path))
        assert torch.equal(logits(loaded("llama", AdapterSource.load(tmp_path))), logits(model))
        assert RankLadder.load(tmp_path).modules.keys() == RankLadder.from_peft(model).modules.keys()


BASE_CHANGES: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "kasa": {"kasa_config": {}},
    "layers": {"layer_replication": [[0, 2], [1, 2]]},
}


@pytest.mark.parametrize("options", BASE_CHANGES.values(), ids=BASE_CHANGES)
def test_an_adapter_for_a_changed_base_is_refused_with_the_remedy(tmp_path: Path, options: dict[str, Any]) -> None:
    if not options.keys() <= {field.name for field in fields(LoraConfig)}:
        pytest.skip("this version of PEFT does not have it")
    model = peft_with("llama", **options)
    model.save_pretrained(str(tmp_path))
    remedy = r"PeftModel\.from_pretrained, and give that model to ChunkWiseModel"
    for refused in (
        lambda: AdapterSource.load(tmp_path),
        lambda: RankLadder.load(tmp_path),
        lambda: RankLadder.from_peft(model),
    ):
        with pytest.raises(LadderError, match=remedy):
            refused()


# Resized vocabularies


@cache
def small_base(tied: bool) -> Path:
    """A saved base: PEFT compares the vocabulary of an adapter's model with the one that is stored."""
    folder = Path(tempfile.mkdtemp(prefix="chunkwise-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    build("llama", tie_word_embeddings=tied).save_pretrained(folder)
    return folder


def resized(tied: bool, seed: int) -> PreTrainedModel:
    """The saved base with four more tokens, whose embeddings are random."""
    base = AutoModelForCausalLM.from_pretrained(small_base(tied))
    torch.manual_seed(seed)
    base.resize_token_embeddings(VOCABULARY + 4)
    return base.eval()


RESIZED: dict[str, dict[str, Any]] = {
    "plain": {},
    "replaced head": {"modules_to_save": ["lm_head"]},
    "replaced embedding and head": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "adapted embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "adapted head": {"target_modules": ["lm_head", "q_proj"]},
    "trained tokens": {"trainable_token_indices": [VOCABULARY, VOCABULARY + 1]},
}


@pytest.mark.parametrize("options", RESIZED.values(), ids=RESIZED)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_an_adapter_of_a_resized_vocabulary_loads_as_in_peft(
    tmp_path: Path, tied: bool, options: dict[str, Any]
) -> None:
    config = {"r": 4, "init_lora_weights": False, "target_modules": ATTENTION, **options}
    get_peft_model(resized(tied, 1), LoraConfig(task_type="CAUSAL_LM", **config)).save_pretrained(str(tmp_path))
    source, base = AdapterSource.load(tmp_path), resized(tied, 2)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    mine = get_peft_model(base, LoraConfig(**source.config)).eval()
    overwritten = base_parameters(mine, source.tensors)
    set_peft_model_state_dict(mine, source.tensors)
    theirs = PeftModel.from_pretrained(resized(tied, 2), str(tmp_path)).eval()
    new = {"input_ids": torch.tensor([[5, VOCABULARY, 7, VOCABULARY + 1, VOCABULARY + 3]])}
    with torch.no_grad():
        assert torch.equal(mine(**new).logits, theirs(**new).logits)
    assert all("base_layer" in name for name in overwritten), "what PEFT stores whole becomes the adapter's own"
    if not overwritten:
        assert all(torch.equal(tensor, before[name]) for name, tensor in get_base_model_state_dict(mine).items())
        ladder = AdapterSource.of(RankLadder.load(tmp_path))
        again = get_peft_model(resized(tied, 3), LoraConfig(**ladder.config)).eval()
        set_peft_model_state_dict(again, ladder.tensors)
        with torch.no_grad():
            assert torch.allclose(again(**new).logits, theirs(**new).logits, atol=1e-4)


# Other tools' files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter("llama"), tmp_path / "adapter"))


def edit(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], **fields: Any) -> None:
    tensors, path = load_file(folder / WEIGHTS_NAME), folder / CONFIG_NAME
    save_file({name: tensor.contiguous() for name, tensor in change(tensors).items()}, folder / WEIGHTS_NAME)
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def renamed(*pairs: tuple[str, str]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for old, new in pairs:
            tensors = {re.sub(old, new, name): tensor for name, tensor in tensors.items()}
        return tensors

    return change


NAMES = {
    "compiled": [("^base_model.model.", "base_model.model._orig_mod.")],
    "compiled whole": [("^", "_orig_mod.")],
    "in DDP": [("^", "module.")],
    "in FSDP": [(r"layers\.(\d)", r"layers.\1._fsdp_wrapped_module")],
    "checkpointed": [("self_attn", "self_attn._checkpoint_wrapped_module")],
    "with the adapter's name": [(r"(lora_[AB])\.", r"\1.mine.")],
    "without PEFT's prefix": [("^base_model.model.", "")],
    "with down and up": [("lora_A", "lora_down"), ("lora_B", "lora_up")],
}


@pytest.mark.parametrize("pairs", NAMES.values(), ids=NAMES)
def test_names_that_tools_give_to_the_same_tensors_are_understood(folder: Path, pairs: Any) -> None:
    edit(folder, renamed(*pairs))
    assert AdapterSource.load(folder).tensors.keys() == AdapterSource.load(adapter("llama")).tensors.keys()
    assert RankLadder.load(folder).modules.keys() == RankLadder.load(adapter("llama")).modules.keys()


OTHER_NAMES = {
    "DoRA": [(r"(lora_[AB])\.", r"\1.mine."), ("(lora_magnitude_vector)", r"\1.mine.weight")],
    "trainable tokens": [(r"(lora_[AB])\.", r"\1.mine."), ("(trainable_tokens_delta)", r"\1.mine")],
    "embedding": [(r"(lora_[AB])\.", r"\1.mine."), (r"(lora_embedding_[AB])", r"\1.mine")],
    "lora_bias": [(r"(lora_[AB])\.", r"\1.mine.")],
}


@pytest.mark.parametrize("kind", OTHER_NAMES)
def test_the_adapters_name_in_keys_of_other_kinds_is_understood(tmp_path: Path, kind: str) -> None:
    folder = other(kind, tmp_path)
    plain = AdapterSource.load(folder)
    edit(folder, renamed(*OTHER_NAMES[kind]))
    assert AdapterSource.load(folder).tensors.keys() == plain.tensors.keys()


def test_a_replaced_module_with_the_adapters_name_is_understood(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter("llama", "saved_mlp"), tmp_path / "adapter"))
    edit(folder, renamed((r"\.mlp\.", ".mlp.modules_to_save.mine."), (r"(lora_[AB])\.", r"\1.mine.")))
    assert AdapterSource.load(folder).tensors.keys() == AdapterSource.load(adapter("llama", "saved_mlp")).tensors.keys()


def test_experts_of_transformers_4_load_as_in_peft(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter("qwen3_moe"), tmp_path / "adapter"))

    def with_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for layer, expert, (name, into, out) in itertools.product(
            range(2), range(4), (("gate_proj", 32, 16), ("up_proj", 32, 16), ("down_proj", 16, 32))
        ):
            key = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}.lora_"
            tensors |= {f"{key}A.weight": torch.randn(8, into) / 4, f"{key}B.weight": torch.randn(out, 8) / 4}
        return tensors

    edit(folder, with_experts, target_modules=[*TARGETS["qwen3_moe"], "gate_proj", "up_proj", "down_proj"])
    reference = PeftModel.from_pretrained(build("qwen3_moe"), str(folder)).eval()
    model = loaded("qwen3_moe", AdapterSource.load(folder))
    assert torch.equal(logits(model), logits(reference))
    assert not torch.allclose(logits(model), logits(peft_model("qwen3_moe")), atol=0.01)
    assert set(other_parts(model, "default").values()) == {"LoRA on a bare parameter"}


def mlx(tmp_path: Path, change: Callable[[dict[str, Tensor]], Any] = lambda _: None, **config: Any) -> Path:
    """The same adapter as mlx-lm stores it: y = W x + scale * (x lora_a) lora_b."""
    tensors = {
        name.removeprefix("base_model.model.")
        .replace(".lora_A.weight", ".lora_a")
        .replace(".lora_B.weight", ".lora_b"): tensor.T.contiguous()
        for name, tensor in load_file(adapter("llama") / WEIGHTS_NAME).items()
    }
    change(tensors)
    save_file(tensors, tmp_path / "adapters.safetensors")
    fields = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 8, "scale": 2.0, "dropout": 0.0}}
    (tmp_path / CONFIG_NAME).write_text(json.dumps({**fields, **config}))
    return tmp_path


def test_an_adapter_of_mlx_loads_as_the_same_adapter_of_peft(tmp_path: Path) -> None:
    model = loaded("llama", AdapterSource.load(mlx(tmp_path)))
    assert torch.allclose(logits(model), logits(peft_model("llama")), atol=1e-5)
    assert RankLadder.load(tmp_path).modules.keys() == RankLadder.load(adapter("llama")).modules.keys()


Q = "base_model.model.model.layers.0.self_attn.q_proj"

REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "MLX with alpha": (
        lambda path: mlx(path, lora_parameters={"rank": 8, "scale": 2.0, "alpha": 16}),
        r"lora_parameters with rank and scale.*mlx_lm\.fuse",
    ),
    "MLX without a scale": (lambda path: mlx(path, lora_parameters={"rank": 8}), r"rank and scale"),
    "MLX with words": (lambda path: mlx(path, lora_parameters={"rank": "8", "scale": 2.0}), r"not numbers"),
    "MLX's DoRA": (lambda path: mlx(path, fine_tune_type="dora"), r"not LoRA.*mlx_lm\.fuse"),
    "MLX's experts": (
        lambda path: mlx(path, lambda tensors: tensors.update({"mlp.switch_mlp.up_proj.lora_a": torch.ones(4, 8, 9)})),
        r"switch_mlp.*mlx_lm\.fuse",
    ),
    "MLX's names in a file of PEFT": (
        lambda path: edit(path, renamed((".lora_A.weight", ".lora_a"), (".lora_B.weight", ".lora_b"))),
        r"mlx-lm needs lora_parameters",
    ),
    "kohya's names": (
        lambda path: edit(path, renamed((r"^base_model.*layers\.(\d)\.(\w+)\.", r"lora_te_text_model_\1_\2_"))),
        r"underscores stand for dots.*PEFT's format",
    ),
    "another alpha": (
        lambda path: edit(path, lambda tensors: tensors | {f"{Q}.alpha": torch.tensor(4.0)}),
        r"q_proj\.alpha is 4.*lora_alpha = 16",
    ),
    "two adapters": (
        lambda path: edit(
            path, lambda tensors: tensors | {f"{Q}.lora_A.{name}.weight": torch.ones(8, 32) for name in "ab"}
        ),
        r"holds the adapters a, b.*selected_adapters",
    ),
    "empty tensors": (
        lambda path: edit(path, lambda tensors: dict.fromkeys(tensors, torch.zeros(0))),
        r"ZeRO-3.*stage3_gather_16bit_weights_on_model_save.*zero_to_fp32",
    ),
    "flat tensors": (
        lambda path: edit(path, lambda tensors: {name: tensor.flatten() for name, tensor in tensors.items()}),
        r"shape \[384\].*ZeRO-3",
    ),
    "a dangerous pattern": (
        lambda path: edit(path, dict, target_modules=r"(.*)*\.q_proj"),
        r"target_modules has .* hours",
    ),
    "a dangerous name of a replaced module": (
        lambda path: edit(path, dict, modules_to_save=["(.*)*x"]),
        r"modules_to_save has .* hours",
    ),
    "a module named by the file": (
        lambda path: edit(path, dict, megatron_config={"x": 1}, megatron_core="antigravity"),
        r"megatron_config is set.*PeftModel\.from_pretrained",
    ),
    "a rank for terabytes": (lambda path: edit(path, dict, r=10**9), r"rank 1000000000 is not that of any tensor"),
    "tokens without tensors": (
        lambda path: edit(path, dict, trainable_token_indices=list(range(1000))),
        r"trainable_token_indices does not name the 0 tokens",
    ),
    "a config that PEFT refuses": (
        lambda path: edit(path, dict, layers_pattern="layers", target_modules=["q_proj"]),
        r"PEFT refuses the config.*layers_to_transform",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_files_whose_meaning_is_not_certain_are_refused_with_cause_and_remedy(tmp_path: Path, kind: str) -> None:
    change, message = REFUSED[kind]
    if not kind.startswith("MLX") or "PEFT" in kind:
        shutil.copytree(adapter("llama"), tmp_path, dirs_exist_ok=True)
    change(tmp_path)
    with pytest.raises(LadderError, match=message):
        AdapterSource.load(tmp_path)


def test_the_alpha_of_the_first_tools_is_understood(folder: Path) -> None:
    edit(folder, lambda tensors: tensors | {f"{Q}.alpha": torch.tensor(16.0)})
    assert AdapterSource.load(folder).tensors.keys() == AdapterSource.load(adapter("llama")).tensors.keys()


def test_unknown_fields_are_ignored_with_a_warning(folder: Path) -> None:
    edit(folder, dict, use_warp_drive=True, use_nothing=False, runtime_config={"x": 1})
    with pytest.warns(UserWarning, match="use_warp_drive, which is ignored") as caught:
        source = AdapterSource.load(folder)
    assert len(caught) == 1 and "use_nothing" not in str(caught[0].message)
    assert torch.equal(logits(loaded("llama", source)), logits(peft_model("llama")))


# Places


def test_an_adapter_in_a_subfolder_is_found(tmp_path: Path) -> None:
    peft_with("llama").save_pretrained(str(tmp_path / "one"))
    model = get_peft_model(build("llama"), LoraConfig(target_modules=ATTENTION), adapter_name="mine")
    model.save_pretrained(str(tmp_path / "two"))
    assert (tmp_path / "two" / "mine").is_dir()
    for source in (
        AdapterSource.load(tmp_path / "two"),
        AdapterSource.load(tmp_path / "two", subfolder="mine"),
        AdapterSource.load(tmp_path, subfolder="two/mine"),
    ):
        assert len(source.tensors) == 8
    assert len(RankLadder.from_peft(tmp_path, subfolder="two/mine").modules) == 4
    assert len(RankLadder.load(tmp_path, subfolder="two").modules) == 4
    with pytest.raises(LadderError, match=r"three: there is no such folder; give a subfolder of"):
        AdapterSource.load(tmp_path, subfolder="three")


def test_a_ladder_in_a_subfolder_is_found(tmp_path: Path) -> None:
    ladder = RankLadder.from_peft(adapter("llama"))
    ladder.save_pretrained(tmp_path / "mine")
    assert RankLadder.load(tmp_path).fingerprint == ladder.fingerprint
    source = AdapterSource.load(tmp_path)
    assert source.ladder is not None and source.ladder.fingerprint == ladder.fingerprint


@pytest.mark.parametrize(
    "path", ["/no/such/folder", "./no/such", "../nothing", "a/b/c", "~/adapter", r"C:\adapter", "wiki"]
)
def test_a_path_that_no_repository_can_have_is_a_missing_folder(path: str) -> None:
    with pytest.raises(LadderError, match=re.escape(path) + ": there is no such folder; give"):
        AdapterSource.load(path)


HUB_ERRORS = {
    "LocalEntryNotFoundError": "cannot be reached",
    "RepositoryNotFoundError": "no such public repository",
    "RevisionNotFoundError": "has no revision v2",
    "GatedRepoError": "request access",
    "EntryNotFoundError": "has no adapter_config.json",
    "HfHubHTTPError": "answers with an error",
    "HFValidationError": "cannot be the name",
}


@pytest.mark.parametrize("kind", HUB_ERRORS)
def test_errors_of_the_hub_tell_one_cause(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    def fail(*_: Any, **__: Any) -> str:
        error = getattr(errors, kind)
        raise error.__new__(error, "500 Server Error")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(LadderError, match=HUB_ERRORS[kind]) as refusal:
        AdapterSource.load("some/adapter", revision="v2")
    others = [text for text in HUB_ERRORS.values() if text != HUB_ERRORS[kind]]
    assert not [text for text in others if text in str(refusal.value)]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder that a stand-in for the hub serves as the folder `deep` of `some/adapter`."""

    def download(name: str, file: str, revision: str | None, subfolder: str | None) -> str:
        assert (name, revision, subfolder) == ("some/adapter", "v2", "deep")
        if not (tmp_path / file).exists():
            raise errors.EntryNotFoundError(file)
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return tmp_path


def test_an_adapter_on_the_hub_is_read(hub: Path) -> None:
    shutil.copytree(adapter("llama"), hub, dirs_exist_ok=True)
    source = AdapterSource.load("some/adapter", "v2", "deep")
    assert source.tensors.keys() == AdapterSource.load(adapter("llama")).tensors.keys()
    (hub / WEIGHTS_NAME).unlink()
    with pytest.raises(LadderError, match=r"has no adapter_model\.safetensors in deep"):
        AdapterSource.load("some/adapter", "v2", "deep")


def test_a_ladder_on_the_hub_keeps_its_policy(hub: Path) -> None:
    ladder = replace(RankLadder.from_peft(adapter("llama")), policy=ChunkWiseConfig.preset("compact"))
    ladder.save_pretrained(hub)
    source = AdapterSource.load("some/adapter", "v2", "deep")
    assert source.ladder is not None and source.ladder.policy == source.policy == ladder.policy


def test_an_adapter_in_the_hubs_cache_is_read_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, file: str, **_: Any) -> str:
        if not (adapter("llama") / file).exists():
            raise errors.LocalEntryNotFoundError(file)
        return str(adapter("llama") / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert AdapterSource.load("some/adapter").ladder is None


def test_whole_numbers_of_a_replaced_module_are_read_for_peft_only(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter("llama", "saved_mlp"), tmp_path / "adapter"))
    buffer = "base_model.model.model.layers.0.mlp.order"
    edit(folder, lambda tensors: tensors | {buffer: torch.arange(4)})
    assert AdapterSource.load(folder).tensors[buffer].dtype == torch.int64
    with pytest.raises(LadderError, match=r"mlp\.order has dtype torch\.int64"):
        RankLadder.load(folder)
