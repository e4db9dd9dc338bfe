"""How long the calibration of an adapter of the 1B shape takes.

It runs until it ends or until a limit. The measured share of the work then gives an estimate of the whole.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from chunkwise_lora.benchmark.shapes import SHAPES, random_adapter, random_model
from chunkwise_lora.calibration.calibrate import calibrate
from chunkwise_lora.calibration.config import QUICK, CalibrationConfig
from chunkwise_lora.ladder import RankLadder
from gpu_parts import engine
from gpu_parts.cells import Cell, Settings

LIMIT = 60.0
"""Seconds after which the calibration is stopped."""


class Stopped(Exception):
    """The calibration has taken longer than the limit."""


def cells(settings: Settings) -> Iterator[Cell]:
    """Yield the only cell."""
    yield Cell("tiny" if settings.tiny else "1B, quick", partial(measure, settings))


def measure(settings: Settings, limit: float = LIMIT) -> dict[str, Any]:
    """Return the seconds that the calibration took, or the estimate, and those until each stage began."""
    config = engine.TINY if settings.tiny else SHAPES["1B"]
    model = random_model(config, settings.dtype, settings.device)
    ladder = RankLadder.load(
        random_adapter(config, 4 if settings.tiny else engine.RANK, settings.scratch / "calibrate")
    )
    amounts = {"tokens": 256, "block": 32, "rungs": 4, "refinements": 1} if settings.tiny else QUICK
    chosen = CalibrationConfig(mean_rank=0.5, **{"rounds": 0, "explorations": 1} | amounts)
    count = 4 * chosen.tokens
    tokens = torch.randint(config.vocab_size, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    begin, stages, share = time.perf_counter(), dict[str, float](), [0.0]

    def report(stage: str, done: float, total: float) -> None:
        seconds = time.perf_counter() - begin
        stages.setdefault(stage, seconds)
        share[0] = done / max(total, 1e-9)
        if seconds > limit:
            raise Stopped

    try:
        calibrate(model, ladder, tokens, chosen, report)
    except Stopped:
        elapsed = time.perf_counter() - begin
        return {"seconds": elapsed / max(share[0], 1e-3), "ended": False, "stages": stages}
    return {"seconds": time.perf_counter() - begin, "ended": True, "stages": stages}


def table(measured: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the lines of a Markdown list."""
    return [
        f"- {cell}: {result['seconds']:.0f} seconds" + ("" if result["ended"] else ", estimated from its beginning")
        for cell, result in measured.items()
    ]
