"""Settings and fixtures that all tests share."""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # set before the hub is imported, so that a missing file fails at once

import pytest
import torch

os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"  # set before Triton is imported

from hypothesis import settings

import small
from chunkwise_lora import cli, examples

torch.set_num_threads(1)  # the models are tiny: on a busy machine a second thread only waits
settings.register_profile("shared", deadline=None, max_examples=60, print_blob=True)
settings.load_profile("shared")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _small_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the names of the examples, commands take the small model and its adapters, which need no other package."""
    monkeypatch.setattr(examples, "base_folder", lambda begin=None: small.BASE)
    monkeypatch.setattr(examples, "ladders", lambda: {"wiki": small.WIKI, "e2e": small.E2E})


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """A function that runs `chunkwise ...` and returns exit status, standard output and standard error."""

    def chunkwise(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setattr(sys, "argv", ["chunkwise", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return chunkwise
