"""Times of functions on a device, in interleaved rounds."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch

Run = Callable[[], object]


def interleaved(
    runs: Mapping[str, Run], device: torch.device, *, rounds: int, calls: int = 1, warm_up: int = 3
) -> dict[str, float]:
    """Return the median over rounds of the time of each function, in ms per call.

    Every round runs all functions, and begins with another function than the round before. On a GPU the times are those
    between two events, so that they include waiting for Python only where the GPU has to wait for it.

    Args:
        runs: The functions by name.
        device: The device that they run on.
        rounds: Number of timed rounds.
        calls: Calls of a function that are timed together.
        warm_up: Calls of each function before the first round.
    """
    for run in runs.values():
        for _ in range(warm_up):
            run()
    names, times = [*runs], {name: list[Callable[[], float]]() for name in runs}
    for number in range(rounds):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            times[name].append(timed(runs[name], device, calls))
    return {name: statistics.median(read() for read in of_run) for name, of_run in times.items()}


def timed(run: Run, device: torch.device, calls: int = 1) -> Callable[[], float]:
    """Call a function `calls` times; returns a function that waits for the end and returns the ms per call."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            run()
        ms = (time.perf_counter() - start) * 1e3 / calls
        return lambda: ms
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        run()
    end.record()

    def read() -> float:
        end.synchronize()
        return float(begin.elapsed_time(end)) / calls

    return read


def captured(run: Run, device: torch.device) -> Run:
    """Return a function that replays what `run` launches, as a CUDA graph; on a CPU, `run` itself.

    A replay shows the time of the GPU alone, without launches from Python.
    """
    if device.type != "cuda":
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()  # compiles kernels and creates handles, which cannot be captured
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def relative_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the norm of the difference, relative to the norm of `exact`. It is infinite for NaN."""
    error = float((result.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-300))
    return float("inf") if math.isnan(error) else error
