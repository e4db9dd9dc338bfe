"""What chunkwise-lora does on a GPU, in one command: is it right, how fast is it, and what do the alternatives do?

    python benchmarks/gpu.py --out runs/gpu --vllm-kernels vllm/lora/ops/triton_ops

| part | what it measures |
|---|---|
| correctness | every path that a GPU takes, on tiny models, against the gate form and PEFT |
| products | the adapters of one layer: our kernels, PyTorch's products, PEFT, vLLM's kernels |
| tenants | one decode step of 32 sequences with 32 adapters |
| engine | decoding and prefill of models of the 7B and 1B shapes, compared with PEFT, merged, eager and compiled |
| calibration | the seconds that a calibration takes |

A measurement that fails does not end the others: after an error of the GPU, another process goes on. Every result is
kept in `results.json` in the output folder as soon as it is there. The same command goes on from them, and measures
what is missing or failed. `gpu.md` and `gpu.png` there show all results.

`--tiny` runs everything on a CPU in a minute, to test the script. Its times mean nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

PARTS = ["correctness", "products", "tenants", "engine", "calibration"]
BROKEN = 3
"""Exit status of a process that can no longer use its GPU."""


def main(
    out: Annotated[Path, typer.Option(help="The output folder.")] = Path("runs/gpu"),
    parts: Annotated[list[str], typer.Option(metavar="PART", help="The parts to run; may be repeated.")] = PARTS,
    minutes: Annotated[float, typer.Option(help="Stop after this time. What is measured by then is kept.")] = 7.0,
    vllm_kernels: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="The folder vllm/lora/ops/triton_ops of a vLLM wheel.")
    ] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Tiny sizes on a CPU, to test the script.")] = False,
    tried: Annotated[str, typer.Option(hidden=True, help="Measure in this process, for the run of this name.")] = "",
) -> None:
    """Measure what is missing, and write the results."""
    if unknown := set(parts) - set(PARTS):
        raise typer.BadParameter(f"{min(unknown)}: choose from {', '.join(PARTS)}")
    if tried:
        raise typer.Exit(run_parts(parts, out, vllm_kernels, tiny, tried))
    end = time.monotonic() + 60 * minutes
    command = [sys.executable, __file__, "--out", str(out), "--tried", str(time.time())]
    command += [word for part in parts for word in ("--parts", part)]
    command += ["--tiny"] if tiny else []
    command += ["--vllm-kernels", str(vllm_kernels)] if vllm_kernels else []
    environment = os.environ | ({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if tiny else {})
    write_report(out, run_to_the_end(command, environment, end))


def run_to_the_end(command: list[str], environment: dict[str, str], end: float) -> str:
    """Run a command that measures until it has tried everything; returns why it stopped before, if it did.

    A process that an error of the GPU has ended tries nothing twice, so another one goes on behind it.
    """
    while (left := end - time.monotonic()) > 5:
        try:
            status = subprocess.run(command, env=environment, timeout=left, check=False).returncode
        except subprocess.TimeoutExpired:
            break
        if status != BROKEN and status >= 0:
            return f"the process that measures ended with status {status}" if status else ""
    return "the time was over; run the same command again"


def run_parts(parts: list[str], out: Path, vllm_kernels: Path | None, tiny: bool, tried: str) -> int:
    """Measure the cells of these parts in this process; returns the exit status."""
    import torch

    from gpu_parts.cells import BrokenDevice, Results, Settings
    from gpu_parts.report import PARTS as MODULES

    if not tiny and not torch.cuda.is_available():
        print("This benchmark needs a CUDA GPU, and PyTorch finds none; --tiny tests it on a CPU.", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    results = Results(out / "results.json")
    with tempfile.TemporaryDirectory() as scratch:
        settings = Settings(torch.device("cpu" if tiny else "cuda"), tiny, Path(scratch), vllm_kernels)
        try:
            for part in parts:
                for cell in MODULES[part].cells(settings):
                    results.run(part, cell, settings, tried)
        except BrokenDevice:
            return BROKEN
    return 0


def write_report(out: Path, stopped: str) -> None:
    """Write `gpu.md` and `gpu.png` from the results so far.

    Args:
        out: The output folder.
        stopped: Why this run has not measured everything; empty if it has.
    """
    from chunkwise_lora.files import write_atomically
    from gpu_parts.cells import Results
    from gpu_parts.report import page, picture

    results = Results(out / "results.json")
    text = page(results, stopped)
    write_atomically(out / "gpu.md", text.encode())
    write_atomically(out / "gpu.png", picture(results))
    print(text)


if __name__ == "__main__":
    typer.run(main)
