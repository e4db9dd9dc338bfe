"""Several processes evaluate as one process does, and only one of them prints and writes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import small
from chunkwise_lora import ChunkWiseError
from chunkwise_lora.evaluation.processes import Processes

SAMPLE = small.HELD_TEXT.parent
TASKS = {
    "wikitext": ["--data", SAMPLE / "wiki.txt", "--limit", 5, "--baselines", "alike", "random"],
    "e2e": ["--data", SAMPLE / "e2e.csv", "--limit", 5, "--new-tokens", 8, "--baselines", "svd"],
}


def result(folder: Path) -> Any:
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("task", TASKS)
def test_two_processes_give_the_report_of_one(task: str, run: Any, tmp_path: Path) -> None:
    adapter = {"wikitext": small.WIKI, "e2e": small.E2E}[task]
    small.calibrated(adapter).save_pretrained(tmp_path / "calibrated")
    base = shutil.copytree(small.BASE, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 128}))  # several windows
    options = ["eval", "--task", task, *TASKS[task], "--model", base, "--adapter", adapter, "--batch", 2]
    options += ["--calibrated", tmp_path / "calibrated"]
    status, alone, _ = run(*options, "--json", tmp_path / "result.json", "--report", tmp_path / "alone")
    assert not status
    expected = result(tmp_path)
    (tmp_path / "result.json").unlink()
    options += ["--json", tmp_path / "result.json", "--report", tmp_path / "together"]
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "chunkwise_lora.cli"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *launcher, *map(str, options)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr
    assert result(tmp_path) == expected
    assert done.stdout == alone
    assert {path.name for path in (tmp_path / "together").iterdir()} == {"quality.png", "report.html", "report.md"}
    assert done.stderr.count(f"evaluating {task}: 1 of") == 1


def test_pieces_are_spread_evenly_over_the_processes() -> None:
    shares = [Processes(index, 3).share_of(range(7)) for index in range(3)]
    assert [list(share) for share in shares] == [[0, 3, 6], [1, 4], [2, 5]]


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert Processes(5, 8).device(gpu) == torch.device("cuda", 1) and chosen == [1]
    assert Processes(5, 8).device(cpu) == cpu and Processes().device(gpu) == gpu
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ChunkWiseError, match="start one process per GPU"):
        Processes(6, 8).device(gpu)
