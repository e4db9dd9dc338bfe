"""The examples of the pages that run llama.cpp, or write files for it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from llama_models import text_file

import small
from test_docs import examples_of, run_blocks

NEEDS_LLAMA = re.compile(r"engines\.llama_cpp|ladder\.gguf")


@pytest.mark.parametrize("page", ["docs/start.md", "docs/llama_cpp.md"])
def test_the_examples_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("model.gguf", "base.gguf"):
        (tmp_path / name).symlink_to(text_file())
    (tmp_path / "path/to").mkdir(parents=True)
    for name, place in {"path/to/adapter": small.WIKI, "other": small.E2E}.items():
        (tmp_path / name).symlink_to(place)
    small.calibrated().save_pretrained(tmp_path / "ladder")
    monkeypatch.chdir(tmp_path)
    blocks = [re.sub(r"n_ctx=\d+", "n_ctx=128", one) for one in examples_of(page) if NEEDS_LLAMA.search(one)]
    assert blocks
    run_blocks(page, blocks)
