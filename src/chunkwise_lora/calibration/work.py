"""The work of a calibration: counted before it begins, and again while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

Report = Callable[[str, float, float], None]
"""Takes the name of the running stage, the seconds of work that are done, and the seconds of all work. Both are
estimates, so their ratio is the share that is done."""


@dataclass(frozen=True)
class Work:
    """What takes time: passes of the model, and fits of the cost model."""

    read: int = 0
    """Tokens in forward passes."""
    learned: int = 0
    """Tokens in forward and backward passes."""
    steps: int = 0
    """Passes of one token per sequence, as in generation."""
    fits: int = 0
    """Steps of fitting a cost model."""

    def __add__(self, other: Work) -> Work:
        return Work(*(one + more for one, more in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: Work) -> Work:
        return self + other * -1

    def __mul__(self, times: int) -> Work:
        return Work(*(times * one for one in astuple(self)))


@dataclass(frozen=True)
class Speed:
    """How fast the model runs on this machine."""

    read: float = 0.0
    """Seconds per token of a forward pass."""
    learned: float = 0.0
    """Seconds per token of a forward and a backward pass."""
    steps: float = 0.0
    """Seconds per step of generation."""
    fits: float = 0.0
    """Seconds per step of fitting a cost model."""

    def seconds(self, work: Work) -> float:
        """How long some work takes."""
        return sum(rate * amount for rate, amount in zip(astuple(self), astuple(work), strict=True))


class Progress:
    """Counts the passes of a model while it calibrates, and reports them.

    Args:
        report: Called at the beginning of every stage and after every pass.
    """

    def __init__(self, report: Report) -> None:
        self.done = Work()
        self._report = report
        self._speed = Speed()
        self._total = 0.0
        self._stage = ""

    def expect(self, work: Work, speed: Speed) -> None:
        """Take `work` for all work from now on, at this speed."""
        self.done, self._speed, self._total = Work(), speed, speed.seconds(work)

    def begin(self, stage: str) -> None:
        """Begin a stage. Passes before the first stage are not reported."""
        self._stage = stage
        self.add(Work())

    def add(self, work: Work) -> None:
        """Add finished work, and report."""
        self.done += work
        if self._stage:
            self._report(self._stage, min(self._speed.seconds(self.done), self._total), self._total)

    @contextmanager
    def counting(self, base: PreTrainedModel) -> Iterator[None]:
        """Count the passes of `base` inside the block."""

        def count(module: nn.Module, args: Any, inputs: dict[str, Any], output: Any) -> None:
            tokens = inputs["input_ids"]
            if tokens.shape[1] == 1:
                self.add(Work(steps=1))
            elif torch.is_grad_enabled():
                self.add(Work(learned=tokens.numel()))
            else:
                self.add(Work(read=tokens.numel()))

        handle = base.register_forward_hook(count, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def now(device: torch.device) -> float:
    """Seconds on a clock, after all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_of(run: Callable[[], object], device: torch.device, warm_up: bool = True) -> float:
    """How long a call of `run`, which uses a device, takes; with `warm_up`, the second call."""
    if warm_up:
        run()
    begin = now(device)
    run()
    return now(device) - begin
