"""A ladder as a GGUF LoRA adapter: what the file holds, what is refused, and that llama.cpp computes PEFT's logits."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedConfig

pytest.importorskip("gguf", reason="GGUF files need the package gguf: pip install '.[gguf]'")

from gguf import GGUFReader
from gguf.quants import dequantize
from peft import PeftModel

import small
from chunkwise_lora.errors import LadderError
from chunkwise_lora.ladder import LadderModule, RankLadder
from chunkwise_lora.ladder.gguf import DTYPES, GgufBase, write_gguf
from chunkwise_lora.ladder.gguf.architectures import Architecture
from chunkwise_lora.ladder.gguf.header import LIST, GgufHeader
from gguf_bases import ARCHITECTURES as RUNNABLE
from gguf_bases import interleaved, write_base
from models import ARCHITECTURES, VOCABULARY, adapter, build, peft_model

TOKENS = torch.randint(2, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(7))
"""Longer than the sliding window of `gemma3`."""

GGML_F32 = 0
"""llama.cpp's number for float32."""

EXPORTABLE = ["mistral", "gemma2", "phi", "gpt2", "gpt_neox", "falcon", "bloom", "qwen3_moe", *RUNNABLE]


def config_folder(folder: Path, config: PreTrainedConfig) -> Path:
    config.save_pretrained(folder)
    return folder


def base_of(architecture: str, folder: Path) -> Path:
    return config_folder(folder / f"{architecture}-config", ARCHITECTURES[architecture]())


def ragged_rung(ladder: RankLadder) -> RankLadder:
    """A rung of which every module has another rank, some 0."""
    importance = {
        name: module.sigma.square() * 10.0 ** (i % 4) for i, (name, module) in enumerate(ladder.modules.items())
    }
    rung = ladder.sorted_by(importance, 8).truncated(0.5)
    assert len({module.rank for module in rung.modules.values()}) > 2
    return rung


RUNGS: dict[str, Callable[[RankLadder], RankLadder]] = {
    "full rank": lambda ladder: ladder,
    "half rank": lambda ladder: ladder.truncated(0.5),
    "ragged half rank": ragged_rung,
}


def products(path: Path) -> dict[str, Tensor]:
    """What llama.cpp adds to each weight: (alpha / rank) B A by the weight's name."""
    reader = GGUFReader(path)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    factors = {item.name: torch.tensor(dequantize(item.data, item.tensor_type)) for item in reader.tensors}
    names = {name.removesuffix(".lora_a").removesuffix(".lora_b") for name in factors}
    assert len(factors) == 2 * len(names)
    b_and_a = {name: (factors[f"{name}.lora_b"], factors[f"{name}.lora_a"]) for name in names}
    return {name: alpha / b.shape[1] * b @ a for name, (b, a) in b_and_a.items()}


def product(module: LadderModule) -> Tensor:
    return module.up.float() @ module.down.float()


def write(ladder: RankLadder, folder: Path, **options: Any) -> Path:
    write_gguf(ladder, folder / "adapter.gguf", **options)
    return folder / "adapter.gguf"


# What the file holds


@pytest.mark.parametrize("rung", RUNGS)
def test_the_file_adds_the_ladders_products_whatever_the_ranks(tmp_path: Path, rung: str) -> None:
    ladder = RUNGS[rung](RankLadder.load(adapter("qwen2", "patterns")))
    found = products(write(ladder, tmp_path, base=base_of("qwen2", tmp_path)))
    last_parts = {
        "q_proj": "attn_q",
        "k_proj": "attn_k",
        "v_proj": "attn_v",
        "o_proj": "attn_output",
        "gate_proj": "ffn_gate",
        "up_proj": "ffn_up",
        "down_proj": "ffn_down",
    }
    expected = {
        f"blk.{name.split('.')[2]}.{last_parts[name.split('.')[-1]]}.weight": product(module)
        for name, module in ladder.modules.items()
    }
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert torch.allclose(found[name], wanted, atol=1e-5), name


def test_the_file_says_what_llama_cpp_asks_for(tmp_path: Path) -> None:
    ladder = ragged_rung(RankLadder.load(adapter("llama")))
    reader = GGUFReader(write(ladder, tmp_path, base=base_of("llama", tmp_path), dtype="f16"))
    found = {name: value.contents() for name, value in reader.fields.items() if not name.startswith("GGUF.")}
    assert found == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": max(module.rank for module in ladder.modules.values()),
        "general.file_type": 1,
        "general.quantization_version": 2,
    }


def test_query_and_key_rows_of_llama_are_interleaved(tmp_path: Path) -> None:
    ladder = RankLadder.load(adapter("llama"))
    found = products(write(ladder, tmp_path, base=base_of("llama", tmp_path)))
    config = ARCHITECTURES["llama"]()
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    assert heads["q"] != heads["k"]
    for side, count in heads.items():
        trained = product(ladder.modules[f"model.layers.0.self_attn.{side}_proj"])
        assert torch.allclose(found[f"blk.0.attn_{side}.weight"], interleaved(trained, count), atol=1e-5)
    value = product(ladder.modules["model.layers.0.self_attn.v_proj"])
    assert torch.allclose(found["blk.0.attn_v.weight"], value, atol=1e-5)


@pytest.mark.parametrize("architecture", ["gpt_neox", "bloom"])
def test_fused_rows_are_collected_into_queries_keys_and_values(tmp_path: Path, architecture: str) -> None:
    ladder = RankLadder.load(adapter(architecture))
    found = products(write(ladder, tmp_path, base=base_of(architecture, tmp_path)))
    config = ARCHITECTURES[architecture]()
    heads, head_size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    trained = next(product(module) for name, module in ladder.modules.items() if name.endswith("query_key_value"))
    by_head = trained.unflatten(0, (heads, 3, head_size))
    expected = torch.cat([by_head[:, part].flatten(0, 1) for part in range(3)])
    assert torch.allclose(found["blk.0.attn_qkv.weight"], expected, atol=1e-5)


@pytest.mark.parametrize("architecture", EXPORTABLE)
def test_every_known_architecture_has_a_tensor_for_each_linear_module(tmp_path: Path, architecture: str) -> None:
    ladder = RankLadder.load(adapter(architecture))
    assert len(products(write(ladder, tmp_path, base=base_of(architecture, tmp_path)))) == len(ladder.modules)


@pytest.mark.parametrize("architecture", RUNNABLE)
def test_a_gguf_base_and_a_config_give_the_same_file(tmp_path: Path, architecture: str) -> None:
    ladder = RankLadder.load(adapter(architecture))
    by_config = write(ladder, tmp_path, base=base_of(architecture, tmp_path)).read_bytes()
    by_file = write(ladder, tmp_path, base=write_base(build(architecture), architecture, tmp_path / "base.gguf"))
    assert by_file.read_bytes() == by_config


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "model.text_model."])
def test_a_text_model_inside_an_image_model_is_found(tmp_path: Path, prefix: str) -> None:
    plain = RankLadder.load(adapter("llama"))
    nested = replace(plain, modules={prefix + name.removeprefix("model."): m for name, m in plain.modules.items()})
    base = base_of("llama", tmp_path)
    assert write(nested, tmp_path, base=base).read_bytes() == write(plain, tmp_path, base=base).read_bytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_number_formats_keep_the_products(tmp_path: Path, dtype: str) -> None:
    ladder = RankLadder.load(small.WIKI)
    file = write(ladder, tmp_path, base=small.BASE, dtype=dtype)
    found, exact = products(file), products(write(ladder, tmp_path / "f32", base=small.BASE))
    bound = {"f32": 0, "f16": 5e-4, "q8_0": 1e-2}[dtype]
    for name, wanted in exact.items():
        assert (found[name] - wanted).norm() <= bound * wanted.norm(), name
    numbers = sum(module.cost * module.rank for module in ladder.modules.values())
    assert file.stat().st_size / numbers == pytest.approx({"f32": 4, "f16": 2, "q8_0": 1.56}[dtype], rel=0.05)


def test_q8_0_needs_rows_of_whole_blocks(tmp_path: Path) -> None:
    ladder = RankLadder.load(small.WIKI)  # rank 16: the rows of B are too short
    kinds = {
        item.name[-6:]: item.tensor_type.name
        for item in GGUFReader(write(ladder, tmp_path, base=small.BASE, dtype="q8_0")).tensors
    }
    assert kinds == {"lora_a": "Q8_0", "lora_b": "F16"}


@given(st.integers(0, 2**31), st.floats(-12, 12), st.floats(-12, 12))
def test_number_formats_keep_the_products_of_factors_of_any_size(seed: int, up_size: float, down_size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    spread = 10 ** torch.linspace(2, -2, 32)  # directions that are long in one factor are short in the other
    up = 2**up_size * torch.randn(64, 32, generator=generator) * spread
    down = 2**down_size * torch.randn(32, 64, generator=generator) / spread[:, None]
    up[:, 5], down[7] = 0, 0
    ladder = RankLadder({"model.layers.0.mlp.up_proj": LadderModule(up, down, torch.ones(32), (32,))})
    base = GgufBase("a test", Architecture("llama"), blocks=1, heads=4, kv_heads=4, width=64, tied=False)
    with tempfile.TemporaryDirectory() as folder:
        for dtype, bound in (("f32", 1e-6), ("f16", 1e-3), ("q8_0", 2e-2)):
            found = products(write(ladder, Path(folder), base=base, dtype=dtype))["blk.0.ffn_up.weight"]
            assert (found - up @ down).norm() <= bound * (up @ down).norm(), dtype


# What is refused


def _refused(message: str, ladder: RankLadder, folder: Path, **options: Any) -> str:
    target = folder / "adapter.gguf"
    with pytest.raises(LadderError, match=message) as error:
        write_gguf(ladder, target, **options)
    assert not target.exists()
    return str(error.value)


@pytest.mark.parametrize("kind", ["saved_head", "saved_mlp"])
def test_replaced_parameters_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    ladder = RankLadder.load(adapter("llama", kind))
    message = _refused("cannot hold parameters", ladder, tmp_path, base=base_of("llama", tmp_path))
    assert next(iter(ladder.saved_modules)) in message and "merge_and_unload" in message


def test_a_lora_on_an_output_layer_needs_a_tensor_of_its_own(tmp_path: Path) -> None:
    ladder = RankLadder.load(adapter("llama", "lm_head"))
    untied = base_of("llama", tmp_path)
    assert "output.weight" in products(write(ladder, tmp_path / "untied", base=untied))
    tied = ARCHITECTURES["llama"]()
    tied.tie_word_embeddings = True
    message = _refused("embedding matrix", ladder, tmp_path, base=config_folder(tmp_path / "tied", tied))
    assert "lm_head: " in message


def _renamed(ladder: RankLadder, new: str) -> RankLadder:
    """Only the first module, under a new name."""
    return replace(ladder, modules={new: next(iter(ladder.modules.values()))})


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model.layers.2.mlp.down_proj", "llama.cpp has no tensor for this name in a llama model of 2 layers"),
        ("model.layers.0.mlp.gates", "llama.cpp has no tensor for this name"),
        ("model.vision_tower.encoder.layers.0.self_attn.q_proj", "llama.cpp has no tensor for this name"),
        ("model.embed_tokens", "a LoRA on the embeddings"),
        ("model.layers.0.mlp.experts.3.down_proj", "one tensor for all experts"),
    ],
)
def test_modules_without_a_tensor_are_refused_by_name(tmp_path: Path, name: str, reason: str) -> None:
    ladder = _renamed(RankLadder.load(adapter("llama")), name)
    assert f"{name}: " in _refused(reason, ladder, tmp_path, base=base_of("llama", tmp_path))


def test_an_error_names_the_first_modules_of_each_reason(tmp_path: Path) -> None:
    ladder = RankLadder.load(adapter("llama"))
    modules = {name.replace("mlp", "perceptron"): module for name, module in ladder.modules.items()}
    message = _refused("no tensor", replace(ladder, modules=modules), tmp_path, base=base_of("llama", tmp_path))
    assert "and 2 more: " in message and "model.layers.0.perceptron.down_proj" in message


def test_two_modules_of_one_tensor_are_refused(tmp_path: Path) -> None:
    ladder = RankLadder.load(adapter("llama"))
    twice = {
        **ladder.modules,
        "model.language_model.layers.0.mlp.up_proj": ladder.modules["model.layers.0.mlp.up_proj"],
    }
    _refused("another module", replace(ladder, modules=twice), tmp_path, base=base_of("llama", tmp_path))


def test_an_architecture_that_is_not_known_is_refused_with_those_that_are(tmp_path: Path) -> None:
    message = _refused("'opt'", RankLadder.load(adapter("opt")), tmp_path, base=base_of("opt", tmp_path))
    assert "qwen3" in message and "Merge the adapter" in message


def test_a_base_of_another_size_is_refused(tmp_path: Path) -> None:
    ladder, config = RankLadder.load(adapter("llama")), ARCHITECTURES["llama"]()
    config.hidden_size, config.intermediate_size = 64, 96
    _refused("hidden size 64", ladder, tmp_path, base=config_folder(tmp_path / "wide", config))
    larger = build("llama", intermediate_size=64)
    _refused("base model's tensor", ladder, tmp_path, base=write_base(larger, "llama", tmp_path / "base.gguf"))


def test_heads_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    base = replace(GgufBase.load(base_of("llama", tmp_path)), heads=5)
    _refused(
        "self_attn.q_proj: its 32 outputs .* 5 query heads", RankLadder.load(adapter("llama")), tmp_path, base=base
    )


def test_a_tensor_that_the_gguf_base_lacks_is_refused(tmp_path: Path) -> None:
    ladder = RankLadder.load(adapter("llama", "lm_head"))
    tied = write_base(build("llama", tie_word_embeddings=True), "llama", tmp_path / "base.gguf")
    _refused("embedding matrix", ladder, tmp_path, base=tied)
    facts = GgufBase.load(tied)
    shapes = {name: shape for name, shape in (facts.shapes or {}).items() if "blk.1" not in name}
    _refused(r"no tensor blk.1.ffn_down.weight", ladder, tmp_path, base=replace(facts, tied=False, shapes=shapes))


def test_a_base_must_be_named(tmp_path: Path) -> None:
    ladder = RankLadder.load(adapter("llama"))
    _refused("--base", replace(ladder, base_model=None), tmp_path)
    _refused("nowhere.*--base", replace(ladder, base_model="nowhere"), tmp_path)
    _refused("nowhere.gguf.*No such file", ladder, tmp_path, base="nowhere.gguf")
    named = replace(ladder, base_model=str(base_of("llama", tmp_path)))
    assert write(named, tmp_path).exists()


ENDLESS_LIST = struct.pack("<4sIQQQ4sIIQ", b"GGUF", 3, 0, 1, 4, b"list", 9, 5, 2**40) + bytes(100)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"hello" * 100, b"GGUF\3\0\0\0" + bytes([255]) * 100, ENDLESS_LIST])
def test_a_damaged_base_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "base.gguf").write_bytes(content)
    _refused("base.gguf: is not a GGUF file", RankLadder.load(adapter("llama")), tmp_path, base=tmp_path / "base.gguf")


def test_a_base_that_is_cut_off_in_its_header_is_refused(tmp_path: Path) -> None:
    whole = write_base(build("llama"), "llama", tmp_path / "base.gguf").read_bytes()
    header = whole.index(b"output_norm.weight")
    for length in range(0, header, 7):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(LadderError, match=r"cut.gguf: is not a GGUF file"):
            GgufBase.load(tmp_path / "cut.gguf")


@given(st.data())
def test_a_damaged_header_is_read_or_refused(data: st.DataObject) -> None:
    header = bytearray(_base_bytes()[:2000])
    for _ in range(data.draw(st.integers(1, 3))):
        header[data.draw(st.integers(4, len(header) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "base.gguf").write_bytes(header)
        with contextlib.suppress(LadderError):
            GgufBase.load(Path(folder) / "base.gguf")


@cache
def _base_bytes() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return write_base(build("llama"), "llama", Path(folder) / "base.gguf").read_bytes()


def test_the_header_is_what_the_package_gguf_reads(tmp_path: Path) -> None:
    path = write_base(build("gemma3"), "gemma3", tmp_path / "base.gguf")
    found, reader = GgufHeader.read(path), GGUFReader(path)
    fields = {name: value.contents() for name, value in reader.fields.items() if not name.startswith("GGUF.")}
    assert found.fields == {name: LIST if isinstance(value, list) else value for name, value in fields.items()}
    assert LIST in found.fields.values()
    assert found.shapes == {item.name: tuple(item.shape.tolist()[::-1]) for item in reader.tensors}


def test_a_base_in_several_files_is_read_from_its_first(tmp_path: Path) -> None:
    ladder = RankLadder.load(adapter("llama"))
    path = write_base(build("llama"), "llama", tmp_path / "base.gguf", fields={"split.count": 2})
    assert GgufBase.load(path).shapes is None
    assert (
        write(ladder, tmp_path, base=path).read_bytes()
        == write(ladder, tmp_path / "whole", base=base_of("llama", tmp_path)).read_bytes()
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [("llama.block_count", 0), ("llama.attention.head_count", [4, 4]), ("llama.embedding_length", "x")],
)
def test_a_field_that_is_no_number_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    path = write_base(build("llama"), "llama", tmp_path / "base.gguf", fields={key: value})
    _refused(
        f"base.gguf: its {key} is .*, not a positive number", RankLadder.load(adapter("llama")), tmp_path, base=path
    )


def test_an_adapter_is_not_a_base(tmp_path: Path) -> None:
    ladder = RankLadder.load(adapter("llama"))
    lora = write(ladder, tmp_path / "other", base=base_of("llama", tmp_path))
    _refused("general.type is 'adapter'", ladder, tmp_path, base=lora)


def test_numbers_beyond_float16_are_refused(tmp_path: Path) -> None:
    ladder = RankLadder.load(adapter("llama"))
    large = {name: replace(module, up=module.up * 1e12) for name, module in ladder.modules.items()}
    base = base_of("llama", tmp_path)
    _refused("write f32", replace(ladder, modules=large), tmp_path, base=base, dtype="f16")
    assert write(replace(ladder, modules=large), tmp_path, base=base).exists()


def test_an_unknown_number_format_is_refused(tmp_path: Path) -> None:
    _refused("choose one of f32, f16, q8_0", RankLadder.load(adapter("llama")), tmp_path, dtype="q4_0")


# Where it is written


def test_a_folder_and_files_of_other_kinds_are_not_replaced(tmp_path: Path) -> None:
    ladder, base = RankLadder.load(adapter("llama")), base_of("llama", tmp_path)
    with pytest.raises(LadderError, match=r"is a folder; give a file in it, such as .*adapter.gguf"):
        write_gguf(ladder, tmp_path, base=base)
    model = write_base(build("llama"), "llama", tmp_path / "base.gguf")
    (tmp_path / "notes.txt").write_text("notes")
    for file in (model, tmp_path / "notes.txt"):
        before = file.read_bytes()
        with pytest.raises(LadderError, match="is not a GGUF adapter; give another file"):
            write_gguf(ladder, file, base=base)
        assert file.read_bytes() == before
    assert write(ladder, tmp_path, base=base).read_bytes() == write(ladder, tmp_path, base=base).read_bytes()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ladder, base = RankLadder.load(adapter("llama")), base_of("llama", tmp_path)
    target = write(ladder, tmp_path / "out", base=base)
    before = target.read_bytes()

    def full(*paths: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(LadderError, match=r"adapter.gguf: cannot be written"):
        write_gguf(ladder.truncated(0.5), target, base=base)
    assert target.read_bytes() == before and [path.name for path in target.parent.iterdir()] == [target.name]


def test_without_the_package_gguf_the_remedy_is_named() -> None:
    code = (
        "import sys; sys.modules['gguf'] = None\n"
        "from chunkwise_lora.errors import LadderError\n"
        "try:\n"
        "    from chunkwise_lora.ladder.gguf import write_gguf\n"
        "except LadderError as error:\n"
        "    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'chunkwise-lora[gguf]'" in done.stdout


# The command


def test_the_command_exports_a_rung_of_a_calibrated_ladder(run: Any, tmp_path: Path) -> None:
    output, report, ladder = tmp_path / "small adapter.gguf", tmp_path / "report.json", tmp_path / "ladder"
    small.calibrated().save_pretrained(ladder)
    code, out, err = run(
        *("ladder", "export", ladder, "--format", "gguf", "--base", small.BASE, "--mean-rank", "50%"),
        *("-o", output, "--json", report),
    )
    assert code == 0, err
    assert f"llama-cli -m BASE.gguf --lora {shlex.quote(str(output))}" in out
    found, told = products(output), json.loads(report.read_text())
    expected = small.calibrated().truncated(0.5)
    assert len(found) == len(expected.modules) and told["after"]["dtype"] == "f32"
    assert told["after"]["nbytes"] == output.stat().st_size
    trained = product(expected.modules["model.layers.0.mlp.up_proj"])
    assert torch.allclose(found["blk.0.ffn_up.weight"], trained, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--format", "onnx"), "--format onnx: choose one of peft, gguf"),
        (("--base", "x"), "--base is only for --format gguf"),
        (("--format", "gguf", "--dtype", "float16"), "choose one of f32, f16, q8_0"),
        (("--format", "gguf", "--base", "no/such/base"), "give the base model's folder"),
        (("--dtype", "f16"), "choose one of float32"),
    ],
)
def test_the_command_refuses_options_that_do_not_fit(
    run: Any, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    code, _, err = run("ladder", "export", "wiki", "-o", tmp_path / "out", *options)
    assert code == 1 and message in " ".join(err.split()) and not (tmp_path / "out").exists()


# In llama.cpp


@pytest.fixture(scope="module")
def llama_class() -> Any:
    llama_cpp = pytest.importorskip(
        "llama_cpp", reason="llama-cpp-python is not installed: pip install '.[llama-cpp]' (compiles for minutes)"
    )
    return llama_cpp.Llama


@cache
def gguf_base(architecture: str, folder: Path) -> Path:
    return write_base(build(architecture), architecture, folder / f"{architecture}.gguf")


def in_llama_cpp(llama_class: Any, base: Path, lora: Path | None) -> Tensor:
    """Logits (tokens, vocabulary) of `TOKENS`."""
    model = llama_class(
        str(base),
        lora_path=None if lora is None else str(lora),
        n_ctx=64,
        n_threads=1,
        logits_all=True,
        type_k=GGML_F32,
        type_v=GGML_F32,
        verbose=False,
    )
    try:
        model.eval(TOKENS[0].tolist())
        return torch.tensor(model.scores[: TOKENS.shape[1]])
    finally:
        model.close()


@torch.no_grad()
def in_peft(model: torch.nn.Module) -> Tensor:
    logits: Tensor = model(TOKENS).logits[0]
    return logits


@pytest.mark.llama_cpp
@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("architecture", RUNNABLE)
def test_llama_cpp_computes_the_logits_of_peft(
    llama_class: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, architecture: str, rung: str
) -> None:
    ladder = RUNGS[rung](RankLadder.load(adapter(architecture, "plain" if architecture == "phi3" else "patterns")))
    ladder.save_adapter(tmp_path / "peft")
    expected = in_peft(PeftModel.from_pretrained(build(architecture), str(tmp_path / "peft")).eval())
    without = in_peft(build(architecture))
    assert (expected - without).abs().max() > 0.5
    base = gguf_base(architecture, tmp_path_factory.getbasetemp())
    bound = 3e-3 if architecture == "gemma3" else 1e-4  # llama.cpp looks GELU up in a table of float16 numbers
    assert torch.allclose(in_llama_cpp(llama_class, base, None), without, atol=bound)
    assert torch.allclose(in_llama_cpp(llama_class, base, write(ladder, tmp_path, base=base)), expected, atol=bound)


@pytest.mark.llama_cpp
@pytest.mark.parametrize("dtype", DTYPES)
def test_llama_cpp_runs_every_number_format(
    llama_class: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, dtype: str
) -> None:
    base, lora = gguf_base("llama", tmp_path_factory.getbasetemp()), adapter("llama", "wide")
    found = in_llama_cpp(llama_class, base, write(RankLadder.load(lora), tmp_path, base=base, dtype=dtype))
    expected = in_peft(peft_model("llama", "wide"))
    divergence = torch.nn.functional.kl_div(
        found.log_softmax(-1), expected.log_softmax(-1), reduction="batchmean", log_target=True
    )
    assert divergence < {"f32": 1e-8, "f16": 1e-4, "q8_0": 1e-2}[dtype]


@pytest.mark.llama_cpp
def test_llama_cpp_runs_a_lora_on_the_output_layer(
    llama_class: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base, lora = gguf_base("llama", tmp_path_factory.getbasetemp()), adapter("llama", "lm_head")
    found = in_llama_cpp(llama_class, base, write(RankLadder.load(lora), tmp_path, base=base))
    assert torch.allclose(found, in_peft(peft_model("llama", "lm_head")), atol=1e-4)
