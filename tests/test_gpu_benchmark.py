"""The benchmark for GPUs runs to its end in its tiny form, keeps what it has measured, and goes on from it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import gpu

pytest.importorskip("triton", reason="Triton is not installed")

import typer

from gpu_parts import cells, report, timing, vllm_kernels

PARTS = Path(gpu.__file__).parent


def run(out: Path, *options: str) -> str:
    """What `gpu.py --tiny` prints."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(PARTS / "gpu.py"),
        "--out",
        str(out),
        "--tiny",
        "--minutes",
        "60",
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stdout + done.stderr
    return done.stdout


def test_every_part_runs_in_its_tiny_form(tmp_path: Path) -> None:
    said = run(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    failed = {name: cell["failed"] for name, cell in results.items() if "failed" in cell}
    assert not failed
    assert {name.partition(",")[0] for name in results} == set(gpu.PARTS)
    assert "wrong" not in said and "Not measured" not in said
    assert (tmp_path / "gpu.md").read_text().strip() == said[said.index("# On a GPU") :].strip()
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")


def settings(tmp_path: Path) -> cells.Settings:
    return cells.Settings(torch.device("cpu"), True, tmp_path)


def test_a_cell_that_fails_does_not_end_the_others_and_is_tried_again_in_the_next_run(tmp_path: Path) -> None:
    calls: list[str] = []

    def fail() -> dict[str, Any]:
        calls.append("fail")
        raise ValueError("too large")

    def succeed() -> dict[str, Any]:
        calls.append("succeed")
        return {"ms": 1}

    for run_id in ("first", "first", "second"):
        results = cells.Results(tmp_path / "results.json")
        for name, measure in (("bad", fail), ("good", succeed)):
            results.run("part", cells.Cell(name, measure), settings(tmp_path), run_id)
    assert calls == ["fail", "succeed", "fail"]
    assert results.failures == {"part, bad": "ValueError: too large"}
    assert results.of("part") == {"good": {"ms": 1}}
    results.run("part", cells.Cell("good", succeed, {"rounds": 2}), settings(tmp_path), "second")
    assert calls[-1] == "succeed", "other inputs are measured again"


def test_an_error_of_the_gpu_ends_the_process_and_another_one_goes_on(tmp_path: Path) -> None:
    def fail() -> dict[str, Any]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    results = cells.Results(tmp_path / "results.json")
    with pytest.raises(cells.BrokenDevice):
        results.run("part", cells.Cell("bad", fail), settings(tmp_path), "first")
    cells.Results(tmp_path / "results.json").run("part", cells.Cell("bad", fail), settings(tmp_path), "first")


@pytest.mark.parametrize(
    ("statuses", "stopped"), [([gpu.BROKEN, -11, 0], ""), ([1], "the process that measures ended with status 1")]
)
def test_another_process_goes_on_after_an_error_of_the_gpu_or_a_crash(
    statuses: list[int], stopped: str, tmp_path: Path
) -> None:
    seen = tmp_path / "seen"
    exit_in_turn = (
        f"import os, pathlib; seen = pathlib.Path({str(seen)!r}); n = len(seen.read_text()) if seen.exists() else 0; "
        f"seen.write_text('x' * (n + 1)); status = {statuses}[n]; "
        "os.kill(os.getpid(), -status) if status < 0 else os._exit(status)"
    )
    assert gpu.run_to_the_end([sys.executable, "-c", exit_in_turn], {}, time.monotonic() + 60) == stopped
    assert len(seen.read_text()) == len(statuses)


def test_a_run_ends_when_its_time_is_over() -> None:
    assert "again" in gpu.run_to_the_end(["sleep", "60"], {"PATH": "/usr/bin:/bin"}, time.monotonic() + 5.5)


def test_an_unknown_part_is_refused() -> None:
    app = typer.Typer()
    app.command()(gpu.main)
    done = CliRunner().invoke(app, ["--parts", "chess"])
    assert done.exit_code and "correctness" in done.output


def test_targets_are_read_from_the_results(tmp_path: Path) -> None:
    results = cells.Results(tmp_path / "results.json")
    steps = {"ChunkWise lossless": 1.0, "PEFT unmerged": 4.0, "PEFT merged, compiled": 0.5}
    results.cells["engine, 7B, decode, context 1024, batch 1"] = {
        "machine": "a GPU", "measured": {name: {"ms": ms, "memory": 1, "kv_bytes": 2} for name, ms in steps.items()}
    }  # fmt: skip
    results.cells["products, rank 64, 64 tokens, 32 adapters"] = {
        "machine": "a GPU", "measured": {"ms": {"base": 1.0, "ours": 1.5, "vLLM": 2.0}, "errors": {"ours": 1e-3}}
    }  # fmt: skip
    found = {what: (value, most) for what, value, most in report.targets(results)}
    start = "7B, decode, context 1024, batch 1, time, ChunkWise lossless / "
    assert found == {
        f"{start}PEFT merged, compiled": (2.0, 1.05),
        f"{start}PEFT unmerged": (0.25, 0.25),
        "adapters of rank 64, 64 tokens over 32 adapters, ours / vLLM": (0.5, 0.9),
    }


def test_rounds_are_interleaved_and_begin_with_another_function_each(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    ms = timing.interleaved(runs, torch.device("cpu"), rounds=3, warm_up=0)
    assert order == list("abcbcacab")
    assert set(ms) == set("abc") and all(value >= 0 for value in ms.values())


def test_a_folder_without_the_kernels_of_vllm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="give the folder vllm/lora/ops/triton_ops"):
        vllm_kernels.LoraKernels(tmp_path, [(torch.ones(1, 2), torch.ones(2, 1))], torch.zeros(1))
