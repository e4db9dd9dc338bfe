"""Every bad input raises a `ChunkWiseError` that names what is wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PromptTuningConfig,
    TaskType,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StaticCache, T5Config, T5ForConditionalGeneration

from chunkwise_lora import ChunkWiseConfig, ChunkWiseError, ChunkWiseModel, EngineError, LadderError, RankLadder
from chunkwise_lora.ladder import LADDER_NAME
from models import VOCABULARY, adapter, build, peft_model, prompts

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def cut_off(path: Path, keep: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])


# A ladder on disk


@pytest.fixture
def ladder(tmp_path: Path) -> Path:
    RankLadder.from_peft(adapter("llama")).save_pretrained(tmp_path)
    return tmp_path


def tensors_of(folder: Path) -> Path:
    return folder / WEIGHTS


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.9999])
def test_a_ladder_whose_tensors_are_cut_off_is_refused(ladder: Path, keep: float) -> None:
    path = tensors_of(ladder)
    cut_off(path, keep)
    with pytest.raises(LadderError, match=path.name):
        RankLadder.from_pretrained(ladder)


@pytest.mark.parametrize("position", [0, 8, 100, 0.5, -1])
def test_a_ladder_with_one_flipped_byte_is_refused(ladder: Path, position: float) -> None:
    path = tensors_of(ladder)
    content = bytearray(path.read_bytes())
    content[int(position * len(content)) if isinstance(position, float) else position] ^= 1
    path.write_bytes(content)
    with pytest.raises(LadderError, match=path.name):
        RankLadder.from_pretrained(ladder)


def test_a_ladder_without_its_tensors_is_refused(ladder: Path) -> None:
    path = tensors_of(ladder)
    path.unlink()
    with pytest.raises(LadderError, match=path.name):
        RankLadder.from_pretrained(ladder)


def test_a_folder_without_a_ladder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LadderError, match=LADDER_NAME):
        RankLadder.from_pretrained(tmp_path)
    with pytest.raises(LadderError, match="nowhere"):
        RankLadder.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"format_version": 2}'])
def test_invalid_json_in_the_ladders_manifest_is_refused(ladder: Path, text: bytes) -> None:
    (ladder / LADDER_NAME).write_bytes(text)
    with pytest.raises(LadderError, match=LADDER_NAME):
        RankLadder.from_pretrained(ladder)


def first_module(manifest: dict[str, Any]) -> str:
    return next(iter(manifest["ranks"]))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a link to nothing"])
def test_a_manifest_that_is_no_regular_file_is_refused_by_name_at_once(ladder: Path, kind: str) -> None:
    """Without the check, the folder would load as a plain PEFT adapter, without the ladder's policy."""
    path = ladder / LADDER_NAME
    path.unlink()
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    with pytest.raises(LadderError, match=LADDER_NAME):
        RankLadder.load(ladder)


MANIFEST_EDITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no format_version": lambda manifest: manifest.pop("format_version"),
    "no build": lambda manifest: manifest.pop("build"),
    "no base_model": lambda manifest: manifest.pop("base_model"),
    "no files": lambda manifest: manifest.pop("files"),
    "no weights": lambda manifest: manifest["files"].pop(WEIGHTS),
    "no rung_divergence": lambda manifest: manifest.pop("rung_divergence"),
    "no ranks": lambda manifest: manifest.pop("ranks"),
    "a later format": lambda manifest: manifest.update(format_version=3),
    "a format that is no number": lambda manifest: manifest.update(format_version="new"),
    "an unknown build": lambda manifest: manifest.update(build="guess"),
    "an unknown field": lambda manifest: manifest.update(surprise=1),
    "a file outside the folder": lambda manifest: manifest["files"].update({"../../secret": "0" * 64}),
    "a file that is not there": lambda manifest: manifest["files"].update({"chunkwise.safetensors": "0" * 64}),
    "another hash": lambda manifest: manifest["files"].update({WEIGHTS: "0" * 64}),
    "a policy that is no object": lambda manifest: manifest.update(policy=3),
    "an impossible policy": lambda manifest: manifest.update(policy={"chunking": {"min_length": 0}}),
    "a policy for what was not learned": lambda manifest: manifest.update(policy={"complexity": {"learned": True}}),
    "a divergence less": lambda manifest: manifest.update(rung_divergence=[0.0]),
    "an expectation without numbers": lambda manifest: manifest.update(expectation={"mean_rank": 8.0}),
    "no modules": lambda manifest: manifest.update(ranks={}),
    "a module less": lambda manifest: manifest["ranks"].pop(first_module(manifest)),
    "a module more": lambda manifest: manifest["ranks"].update(no_such_module=[0, 8]),
    "a rung less": lambda manifest: manifest["ranks"].update({first_module(manifest): [0, 8]}),
    "a rank too high": lambda manifest: manifest["ranks"].update({first_module(manifest): [0, 9] * 4 + [9]}),
    "falling ranks": lambda manifest: manifest["ranks"].update({first_module(manifest): [8, 7, 6, 5, 4, 3, 2, 1, 8]}),
    "a negative rank": lambda manifest: manifest["ranks"].update({first_module(manifest): [-1, *range(1, 9)]}),
    "ranks that are no list": lambda manifest: manifest["ranks"].update({first_module(manifest): "all"}),
    "another fingerprint": lambda manifest: manifest["base_model"].update(fingerprint="0" * 64),
    "no fingerprint": lambda manifest: manifest["base_model"].pop("fingerprint"),
}


@pytest.mark.parametrize("change", MANIFEST_EDITS.values(), ids=MANIFEST_EDITS)
def test_an_edited_manifest_is_refused(ladder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    edit_json(ladder / LADDER_NAME, change)
    with pytest.raises(ChunkWiseError, match=rf"{LADDER_NAME}|{re.escape(str(ladder))}/\w+\.safetensors"):
        RankLadder.from_pretrained(ladder)


# A PEFT adapter on disk


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter("llama"), tmp_path / "adapter"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_adapter_with_nan_or_infinity_is_refused(folder: Path, value: float) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        next(tensor for name, tensor in tensors.items() if "q_proj.lora_B" in name)[0, 0] = value

    edit_tensors(folder / WEIGHTS, spoil)
    with pytest.raises(LadderError, match=r"q_proj\.lora_B.*NaN or inf"):
        RankLadder.from_peft(folder)


def test_pickled_weights_are_refused_and_never_opened(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(LadderError, match=r"adapter_model\.bin is a pickle"):
        RankLadder.from_peft(folder)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_refused_by_name(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(LadderError, match=name):
        RankLadder.from_peft(folder)


def test_a_missing_folder_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(LadderError, match="nowhere"):
        RankLadder.load(tmp_path / "nowhere")
    with pytest.raises(LadderError, match="no/such-adapter"):
        RankLadder.load("no/such-adapter")
    with pytest.raises(LadderError, match="xxx"):
        RankLadder.load("x" * 300)


def test_a_link_to_itself_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(LadderError, match="loop"):
        RankLadder.load(tmp_path / "loop")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_folder_given_for_a_file_is_refused_by_name(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(LadderError, match=name):
        RankLadder.from_peft(folder)


def test_a_file_given_for_a_folder_is_refused(folder: Path) -> None:
    with pytest.raises(LadderError, match=WEIGHTS):
        RankLadder.load(folder / WEIGHTS)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.9999])
def test_an_adapter_whose_weights_are_cut_off_is_refused(folder: Path, keep: float) -> None:
    cut_off(folder / WEIGHTS, keep)
    with pytest.raises(LadderError, match=WEIGHTS):
        RankLadder.from_peft(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("kind", ["a pipe", "a device", "a link to nothing", "a link to itself"])
def test_a_path_that_is_no_regular_file_is_refused_by_name_at_once(folder: Path, name: str, kind: str) -> None:
    (folder / name).unlink()
    if kind == "a pipe":
        os.mkfifo(folder / name)
    else:
        target = {"a device": "/dev/zero", "a link to nothing": "nowhere", "a link to itself": name}[kind]
        (folder / name).symlink_to(target)
    with pytest.raises(LadderError, match=name):
        RankLadder.from_peft(folder)


def test_an_empty_path_is_not_the_current_folder(ladder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ladder)
    with pytest.raises(LadderError, match="empty"):
        RankLadder.load("")


@pytest.mark.parametrize("path", ["", "\0", "a\0b", "x" * 5000, "x/" * 5000, "~", "http://127.0.0.1:9/x", "\ud800"])
def test_an_impossible_path_is_refused(path: str) -> None:
    with pytest.raises(LadderError):
        RankLadder.from_peft(path)


def test_a_folder_of_folders_of_adapters_is_refused_by_their_names(tmp_path: Path) -> None:
    for name in ("mine", "yours"):
        shutil.copytree(adapter("llama"), tmp_path / name)
    with pytest.raises(LadderError, match=r"its folders mine, yours hold adapters"):
        RankLadder.from_peft(tmp_path)


def test_an_adapter_config_of_many_megabytes_is_refused_unread(folder: Path) -> None:
    with (folder / CONFIG).open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(LadderError, match=rf"{CONFIG}.*bytes"):
        RankLadder.from_peft(folder)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"9" * 5000,
        b'{"r": 8, "r": 4}',
        b'{"r": NaN}',
        b'{"x": [1, {"y": [1e999]}]}',
        b'{"x": "\\ud800"}',
        b'{"\\udfff": 1}',
    ],
)
def test_an_adapter_config_that_is_no_json_is_refused(folder: Path, text: bytes) -> None:
    (folder / CONFIG).write_bytes(text)
    with pytest.raises(LadderError, match=CONFIG):
        RankLadder.from_peft(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "LOHA"),
        ("peft_type", None),
        ("use_dora", True),
        ("use_qalora", True),
        ("lora_bias", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("alora_invocation_tokens", [1, 2]),
        ("layer_replication", [[0, 2]]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("trainable_token_indices", [1]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("r", 0),
        ("r", -1),
        ("r", None),
        ("r", "8"),
        ("r", True),
        ("r", 8.0),
        ("r", 10**400),
        ("lora_alpha", None),
        ("lora_alpha", "16"),
        ("lora_alpha", float("nan")),
        ("lora_alpha", True),
        ("lora_alpha", 1e300),
        ("lora_alpha", 10**400),
        ("use_rslora", "false"),
        ("use_rslora", 1),
        ("modules_to_save", True),
        ("modules_to_save", "lm_head"),
        ("modules_to_save", [1]),
        ("base_model_name_or_path", 5),
        ("base_model_name_or_path", ["a", "b"]),
        ("base_model_name_or_path", "x" * 5000),
        ("base_model_name_or_path", "\ud800"),
        ("modules_to_save", ["lm_head"] * 5000),
        ("rank_pattern", [1]),
        ("rank_pattern", {"q_proj": 8.0}),
        ("rank_pattern", {"q_proj": 10**400}),
        ("alpha_pattern", "q_proj"),
        ("alpha_pattern", {"q_proj": "16"}),
        ("alpha_pattern", {"q_proj": float("nan")}),
        ("alpha_pattern", {"(": 16}),
        ("rank_pattern", {"(": 8}),
        ("rank_pattern", {r"(\w)\1": 8}),
        ("rank_pattern", {"((a{60}){60}){60}": 8}),
    ],
)
def test_an_adapter_that_is_not_plain_lora_is_refused_by_field(folder: Path, field: str, value: Any) -> None:
    edit_json(folder / CONFIG, lambda config: config.update({field: value}))
    with pytest.raises(LadderError, match=rf"{CONFIG}.*{field}"):
        RankLadder.from_peft(folder)


@pytest.mark.parametrize("field", ["r", "lora_alpha", "peft_type"])
def test_an_adapter_config_without_a_needed_field_is_refused(folder: Path, field: str) -> None:
    edit_json(folder / CONFIG, lambda config: config.pop(field))
    with pytest.raises(LadderError, match=rf"{CONFIG}.*{field}"):
        RankLadder.from_peft(folder)


def renamed(tensors: dict[str, Tensor], old: str, new: str) -> None:
    for name in [name for name in tensors if old in name]:
        tensors[name.replace(old, new)] = tensors.pop(name)


def scaled(tensors: dict[str, Tensor], factor: float) -> None:
    for name, tensor in tensors.items():
        tensors[name] = tensor.double() * factor


Q = "base_model.model.model.layers.0.self_attn.q_proj"


TENSOR_EDITS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "no lora_A": lambda tensors: tensors.pop(f"{Q}.lora_A.weight"),
    "no lora_B": lambda tensors: tensors.pop(f"{Q}.lora_B.weight"),
    "another rank in lora_A": lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.ones(4, 32)}),
    "another rank in lora_B": lambda tensors: tensors.update({f"{Q}.lora_B.weight": torch.ones(32, 4)}),
    "a convolution": lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.ones(8, 32, 1)}),
    "integers": lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.ones(8, 32, dtype=torch.int32)}),
    "INT8": lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.ones(8, 32, dtype=torch.int8)}),
    "FP8": lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.ones(8, 32).to(torch.float8_e4m3fn)}),
    "complex numbers": lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.ones(8, 32, dtype=torch.cfloat)}),
    "a DoRA magnitude": lambda tensors: tensors.update({f"{Q}.lora_magnitude_vector": torch.ones(32)}),
    "a bias of lora_B": lambda tensors: tensors.update({f"{Q}.lora_B.bias": torch.ones(32)}),
    "one module twice": lambda tensors: tensors.update({f"{Q}.lora_A.default.weight": torch.ones(8, 32)}),
    "an embedding": lambda tensors: renamed(tensors, "q_proj.lora_A.weight", "q_proj.lora_embedding_A"),
    "huge numbers": lambda tensors: tensors[f"{Q}.lora_A.weight"].mul_(1e30),
    "numbers whose product is huge": lambda tensors: [tensors[f"{Q}.lora_{side}.weight"].mul_(1e12) for side in "AB"],
    "huge numbers in float64": lambda tensors: scaled(tensors, 1e300),
    "no inputs": lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.ones(8, 0)}),
    "no outputs": lambda tensors: tensors.update({f"{Q}.lora_B.weight": torch.ones(0, 8)}),
    "no name": lambda tensors: tensors.update({"": torch.ones(8)}),
    "no module": lambda tensors: tensors.update({"lora_A.weight": torch.ones(8, 32)}),
    "a long name": lambda tensors: renamed(tensors, "q_proj", "q" * 1000),
    "a deep name": lambda tensors: renamed(tensors, "q_proj", "q." * 100 + "q"),
    "a terminal sequence in a name": lambda tensors: renamed(tensors, "q_proj", "\x1b[31m"),
    "two adapters": lambda tensors: tensors.update(
        {f"{Q}.lora_A.one.weight": torch.ones(8, 32), f"{Q}.lora_A.two.weight": torch.ones(8, 32)}
    ),
    "another method": lambda tensors: renamed(tensors, "lora_", "hada_"),
    "a stray tensor": lambda tensors: tensors.update({"base_model.model.score.weight": torch.ones(2, 32)}),
    "nothing": lambda tensors: tensors.clear(),
}


@pytest.mark.parametrize("change", TENSOR_EDITS.values(), ids=TENSOR_EDITS)
def test_adapter_tensors_that_are_not_plain_lora_are_refused(
    folder: Path, change: Callable[[dict[str, Tensor]], Any]
) -> None:
    edit_tensors(folder / WEIGHTS, change)
    with pytest.raises(LadderError, match=WEIGHTS):
        RankLadder.from_peft(folder)


def test_empty_tensors_of_sharded_training_are_refused_with_the_remedy(folder: Path) -> None:
    edit_tensors(folder / WEIGHTS, lambda tensors: tensors.update(dict.fromkeys(tensors, torch.zeros(0))))
    with pytest.raises(LadderError, match=rf"{WEIGHTS}.*ZeRO-3.*stage3_gather_16bit_weights_on_model_save"):
        RankLadder.from_peft(folder)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("base_model.model.", "base_model.model._orig_mod."),
        ("base_model.model.", "_orig_mod.base_model.model."),
        ("base_model.model.", "module.base_model.model."),
        ("layers.", "layers._fsdp_wrapped_module."),
        ("mlp.", "mlp._checkpoint_wrapped_module."),
        (".weight", ".mine.weight"),
        (".weight", ".default.weight"),
    ],
)
def test_prefixes_that_wrappers_add_to_module_names_are_understood(folder: Path, old: str, new: str) -> None:
    plain = RankLadder.from_peft(folder)
    edit_tensors(folder / WEIGHTS, lambda tensors: renamed(tensors, old, new))
    assert RankLadder.from_peft(folder).modules.keys() == plain.modules.keys()


def test_strings_of_files_are_shown_escaped(folder: Path) -> None:
    name = "\x1b]0;gone\x07[red]\u202e\n" + "x" * 1000
    edit_json(folder / CONFIG, lambda config: config.update(peft_type=name))
    with pytest.raises(LadderError) as refusal:
        RankLadder.from_peft(folder)
    assert str(refusal.value).isprintable() and len(str(refusal.value)) < 500
    assert str(ChunkWiseError("\x1b[31m\ud800\nb")) == "\\x1b[31m\\ud800\nb"


ATTENTION = ["q_proj", "v_proj"]
CAUSAL = TaskType.CAUSAL_LM


OTHER_METHODS = {
    "DoRA": LoraConfig(task_type=CAUSAL, target_modules=ATTENTION, use_dora=True),
    "bias": LoraConfig(task_type=CAUSAL, target_modules=ATTENTION, bias="all"),
    "bias of adapted modules": LoraConfig(task_type=CAUSAL, target_modules=ATTENTION, bias="lora_only"),
    "bias on lora_B": LoraConfig(task_type=CAUSAL, target_modules=ATTENTION, lora_bias=True),
    "embedding": LoraConfig(task_type=CAUSAL, target_modules=["embed_tokens", "q_proj"]),
    "PiSSA": LoraConfig(task_type=CAUSAL, target_modules=ATTENTION, init_lora_weights="pissa"),
    "trainable tokens": LoraConfig(task_type=CAUSAL, target_modules=ATTENTION, trainable_token_indices=[1, 2]),
    "AdaLoRA": AdaLoraConfig(task_type=CAUSAL, target_modules=ATTENTION, total_step=10, tinit=1, tfinal=2),
    "IA3": IA3Config(task_type=CAUSAL, target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "VeRA": VeraConfig(task_type=CAUSAL, target_modules=["q_proj"]),
    "VB-LoRA": VBLoRAConfig(task_type=CAUSAL, target_modules=["q_proj"], vector_length=16, topk=2, num_vectors=8),
    "prompt tuning": PromptTuningConfig(task_type=CAUSAL, num_virtual_tokens=4),
}


@pytest.mark.parametrize("config", OTHER_METHODS.values(), ids=OTHER_METHODS)
def test_an_adapter_that_peft_saved_for_another_method_is_refused(tmp_path: Path, config: Any) -> None:
    get_peft_model(build("llama"), config).save_pretrained(str(tmp_path))
    with pytest.raises(LadderError, match=str(tmp_path)):
        RankLadder.from_peft(tmp_path)


# Models that do not fit


def test_an_adapter_for_another_architecture_is_refused_by_module() -> None:
    with pytest.raises(EngineError, match=r"layers\.0.*GPT2LMHeadModel"):
        ChunkWiseModel(build("gpt2"), adapter("llama"))


def test_an_adapter_for_another_width_is_refused_by_module_and_shape() -> None:
    base = build("llama", intermediate_size=64)
    with pytest.raises(EngineError, match=r"mlp\.\w+: .*48.*64"):
        ChunkWiseModel(base, adapter("llama"))


def test_an_adapter_for_a_deeper_model_is_refused_by_module() -> None:
    with pytest.raises(EngineError, match=r"layers\.1"):
        ChunkWiseModel(build("llama", num_hidden_layers=1, layer_types=None), adapter("llama"))


def test_a_replaced_head_for_another_vocabulary_is_refused() -> None:
    with pytest.raises(EngineError, match=r"lm_head.*97.*101"):
        ChunkWiseModel(build("llama", vocab_size=101), adapter("llama", "saved_head"))


def test_a_ladder_on_something_that_is_not_linear_is_refused() -> None:
    ladder = RankLadder.from_peft(adapter("llama"))
    wrong = RankLadder({"model.layers.0.mlp.act_fn": next(iter(ladder.modules.values()))})
    with pytest.raises(EngineError, match="act_fn"):
        ChunkWiseModel(build("llama"), wrong)


def test_no_ladder_at_all_is_refused() -> None:
    with pytest.raises(EngineError, match="ladder"):
        ChunkWiseModel(build("llama"), {})


def test_a_refused_ladder_leaves_the_base_untouched() -> None:
    base = build("llama")
    before = set(vars(base))
    with pytest.raises(EngineError):
        ChunkWiseModel(base, {"good": adapter("llama"), "bad": adapter("gpt2")})
    assert set(vars(base)) == before
    assert not any("forward" in vars(module) for module in base.modules())


@pytest.mark.parametrize("model", [None, "llama", torch.nn.Linear(2, 2)], ids=["None", "a name", "a module"])
def test_an_object_that_is_no_transformers_model_is_refused(model: Any) -> None:
    with pytest.raises(EngineError, match=type(model).__name__):
        ChunkWiseModel(model, adapter("llama"))


def test_a_second_adapter_under_the_name_of_a_loaded_one_is_refused_with_the_remedy() -> None:
    with pytest.raises(EngineError, match="'default' is loaded already; give a ladder"):
        ChunkWiseModel(peft_model("llama"), adapter("llama"))


def test_an_encoder_decoder_is_refused() -> None:
    config = T5Config(vocab_size=VOCABULARY, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    with pytest.raises(EngineError, match="T5ForConditionalGeneration"):
        ChunkWiseModel(T5ForConditionalGeneration(config), adapter("llama"))


def test_a_headless_model_is_refused() -> None:
    with pytest.raises(EngineError, match="LlamaModel"):
        ChunkWiseModel(build("llama").model, adapter("llama"))


def test_a_missing_base_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="nowhere"):
        ChunkWiseModel.from_pretrained(tmp_path / "nowhere", adapter("llama"))


# Calls that cannot run


@pytest.fixture(scope="module")
def model() -> ChunkWiseModel:
    return ChunkWiseModel(build("llama"), adapter("llama"))


IDS = torch.tensor([[5, 6, 7]])


IMPOSSIBLE_PROMPTS: dict[str, tuple[dict[str, Any], str]] = {
    "no columns": ({"input_ids": torch.empty(1, 0, dtype=torch.long)}, "empty"),
    "no rows": ({"input_ids": torch.empty(0, 3, dtype=torch.long)}, "empty"),
    "all padding": ({"input_ids": IDS, "attention_mask": torch.zeros(1, 3, dtype=torch.long)}, "empty"),
    "one row all padding": (
        {"input_ids": IDS.repeat(2, 1), "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])},
        "empty",
    ),
    "id too high": ({"input_ids": torch.tensor([[5, VOCABULARY]])}, f"{VOCABULARY}.*vocabulary"),
    "negative id": ({"input_ids": torch.tensor([[5, -1]])}, "-1.*vocabulary"),
    "floats": ({"input_ids": IDS.float()}, "token ids"),
    "booleans": ({"input_ids": IDS.bool()}, "token ids"),
    "one dimension": ({"input_ids": IDS[0]}, "batch, tokens"),
    "three dimensions": ({"input_ids": IDS[None]}, "batch, tokens"),
    "a list": ({"input_ids": IDS.tolist()}, "batch, tokens"),
    "None": ({"input_ids": None}, "input_ids"),
    "mask too wide": ({"input_ids": IDS, "attention_mask": torch.ones(1, 4, dtype=torch.long)}, "attention_mask"),
    "mask of four dimensions": ({"input_ids": IDS, "attention_mask": torch.ones(1, 1, 3, 3)}, "attention_mask"),
}


@pytest.mark.parametrize(("inputs", "message"), IMPOSSIBLE_PROMPTS.values(), ids=IMPOSSIBLE_PROMPTS)
@pytest.mark.parametrize("call", ["generate", "__call__"])
def test_an_impossible_prompt_is_refused(model: ChunkWiseModel, call: str, inputs: Any, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        getattr(model, call)(**inputs)


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_a_prompt_longer_than_the_models_table_of_positions_is_refused(architecture: str) -> None:
    base = build(architecture)
    positions = base.config.max_position_embeddings
    model = ChunkWiseModel(base, adapter(architecture))
    with pytest.raises(EngineError, match=f"{positions + 1}.*{positions} positions"):
        model.generate(torch.full((1, positions + 1), 5))


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_generating_past_learned_positions_is_refused(architecture: str) -> None:
    base = build(architecture)
    model = ChunkWiseModel(base, adapter(architecture))
    prompt = torch.full((1, base.config.max_position_embeddings - 2), 5)
    assert model.generate(prompt, max_new_tokens=2).shape[1] == prompt.shape[1] + 2
    with pytest.raises(EngineError, match="positions"):
        model.generate(prompt, max_new_tokens=20)


@pytest.mark.parametrize("names", ["other", ["other"], ["default", "default"], []])
def test_adapter_names_that_do_not_fit_are_refused(model: ChunkWiseModel, names: Any) -> None:
    with pytest.raises(EngineError, match=r"other.*default.*__base__|adapter_names"):
        model.generate(IDS, adapter_names=names)


def own_cache(model: ChunkWiseModel, kind: type = DynamicCache) -> Any:
    return StaticCache(model.config, max_cache_len=32) if kind is StaticCache else DynamicCache(config=model.config)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("assistant_model", lambda model: build("llama")),
        ("prompt_lookup_num_tokens", lambda model: 3),
        ("assistant_early_exit", lambda model: 1),
        ("inputs_embeds", lambda model: torch.zeros(1, 3, 32)),
        ("past_key_values", own_cache),
        ("past_key_values", lambda model: own_cache(model, StaticCache)),
        ("cache_implementation", lambda model: "static"),
        ("cache_implementation", lambda model: "quantized"),
        ("custom_generate", lambda model: "some/repository"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_an_option_that_cannot_work_is_refused_by_name(model: ChunkWiseModel, option: str, value: Any) -> None:
    with pytest.raises(EngineError, match=option):
        model.generate(IDS, **{option: value(model)})


@pytest.mark.parametrize(("option", "value"), [("cache_implementation", "static"), ("prompt_lookup_num_tokens", 3)])
def test_the_same_option_in_a_generation_config_is_refused_by_name(
    model: ChunkWiseModel, option: str, value: Any
) -> None:
    with pytest.raises(EngineError, match=option):
        model.generate(IDS, generation_config=GenerationConfig(**{option: value}))


def test_a_generation_config_without_such_options_is_obeyed(model: ChunkWiseModel) -> None:
    assert model.generate(IDS, generation_config=GenerationConfig(max_new_tokens=3, eos_token_id=None)).shape == (1, 6)


def test_the_same_option_in_the_models_own_generation_config_is_refused_by_name() -> None:
    base = build("llama")
    base.generation_config.cache_implementation = "static"
    with pytest.raises(EngineError, match="cache_implementation"):
        ChunkWiseModel(base, adapter("llama")).generate(IDS, max_new_tokens=4)


def test_a_hybrid_cache_in_the_models_own_generation_config_is_ignored_as_transformers_does() -> None:
    base = build("llama")
    base.generation_config.cache_implementation = "hybrid"
    assert ChunkWiseModel(base, adapter("llama")).generate(IDS, max_new_tokens=2).shape == (1, 5)


def test_beams_without_a_cache_are_refused(model: ChunkWiseModel) -> None:
    with pytest.raises(EngineError, match=r"num_beams.*use_cache"):
        model.generate(IDS, num_beams=2, use_cache=False)


def test_an_unknown_option_is_refused_as_transformers_does(model: ChunkWiseModel) -> None:
    with pytest.raises(ValueError, match="no_such_option"):
        model.generate(IDS, no_such_option=1)


@pytest.mark.parametrize("preset", ["lossless", "balanced"])
def test_embeddings_in_a_forward_pass_run_at_full_rank_as_in_peft(model: ChunkWiseModel, preset: str) -> None:
    embeddings = torch.randn(1, 3, 32)
    found = model(inputs_embeds=embeddings, chunkwise_config=ChunkWiseConfig.preset(preset)).logits
    assert torch.allclose(found, peft_model("llama")(inputs_embeds=embeddings).logits, atol=1e-4)


def test_after_every_refusal_the_model_still_runs(model: ChunkWiseModel) -> None:
    assert model.attached
    assert model.generate(**prompts(), max_new_tokens=4).shape == (3, 15)


def test_every_error_is_a_chunkwise_error() -> None:
    assert issubclass(LadderError, ChunkWiseError) and issubclass(EngineError, ChunkWiseError)
