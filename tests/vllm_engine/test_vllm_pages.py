"""The examples of the pages that send requests to a server."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import small
from chunkwise_lora import RankLadder
from chunkwise_lora.engines.vllm import metrics
from test_docs import examples_of, run_blocks


def test_the_examples_of_the_pages_run(example: ModuleType, tmp_path: Path) -> None:
    os.environ.pop(metrics.FOLDER, None)  # the setting of engines in this process
    RankLadder.load(small.WIKI).save_pretrained(tmp_path / "ladder")
    adapters, options = {"support": tmp_path / "ladder", "legal": small.E2E}, ["--dtype", "float32", "--enforce-eager"]
    with example.server(small.BASE, adapters, tmp_path / "server.log", options) as url:
        for page in ("docs/start.md", "docs/vllm.md"):
            blocks = [one.replace("http://localhost:8000", url) for one in examples_of(page) if "openai" in one]
            assert blocks
            run_blocks(page, blocks)
