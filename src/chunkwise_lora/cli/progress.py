"""Progress of long work on standard error: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from operator import length_hint
from typing import Any, Self, TypeVar

from rich import progress as rich_progress
from rich.console import Console

T = TypeVar("T")
Update = Callable[[int, int | None], None]
"""Takes the number of finished pieces of work, and the number of all pieces (None if it is not known yet)."""

SECONDS_BETWEEN_LINES = 30.0
"""Least time between two lines of one stage."""
LEAST_SHARE = 0.02
"""Share of the work after which its speed is known well enough to say how long the rest takes."""


class Progress(ABC):
    """Reports stages of work. Use it in a `with` statement."""

    @abstractmethod
    def begin(self, description: str, total: int | None = None) -> Update:
        """Begin a stage of `total` pieces of work; returns the function that reports how many are done."""

    def track(self, work: Iterable[T], *, description: str) -> Iterator[T]:
        """Yield the pieces of `work` one by one and report each when it is done."""
        total = length_hint(work) or None
        update = self.begin(description, total)
        done = 0
        update(done, total)
        for piece in work:
            yield piece
            done += 1
            update(done, total)
        if total is None:
            update(done, done)

    def steps(self, description: str, total: int) -> Callable[[], None]:
        """Begin a stage of `total` pieces of work; returns the function that reports one more of them as done."""
        update, done = self.begin(description, total), count(1)
        return lambda: update(next(done), total)

    @abstractmethod
    def overall(self) -> Callable[[str, float, float], None]:
        """Begin work of several stages.

        The returned function takes the name of the running stage, the estimated seconds of the finished work, and those
        of all work.
        """

    def __enter__(self) -> Self:
        return self

    @abstractmethod
    def __exit__(self, *exception: object) -> None:
        """End the report."""


class Bars(Progress):
    """One bar per stage, which disappears at the end."""

    def __init__(self, console: Console) -> None:
        self._bars = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}", markup=False),
            rich_progress.BarColumn(),
            rich_progress.TimeElapsedColumn(),
            rich_progress.TimeRemainingColumn(),
            console=console,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # otherwise redirected output would go to the terminal
        )

    def begin(self, description: str, total: int | None = None) -> Update:
        """A new bar."""
        task = self._bars.add_task(description, total=total)
        return lambda done, of: self._bars.update(task, completed=done, total=of)

    def overall(self) -> Callable[[str, float, float], None]:
        """A new bar, which names the running stage."""
        task = self._bars.add_task("", total=None)
        return lambda stage, done, of: self._bars.update(task, description=stage, completed=done, total=of)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()


class Lines(Progress):
    """A line at the first report of a stage, then at most one every 30 seconds, and one when all pieces are done."""

    def __init__(self, write: Callable[[str], Any], clock: Callable[[], float] = time.monotonic) -> None:
        self._write, self._clock = write, clock

    def begin(self, description: str, total: int | None = None) -> Update:
        """A new stage. It prints nothing before its first report, so that an error message is the only line."""
        start = self._clock()
        last: float | None = None

        def update(done: int, of: int | None) -> None:
            nonlocal last
            now = self._clock()
            if done == of or last is None or now - last >= SECONDS_BETWEEN_LINES:
                last = now
                pieces = f"{done:,}" if of is None else f"{done:,} of {of:,}"
                self._write(
                    f"{description}: {pieces} after {_duration(now - start)}\n" if done else f"{description} ...\n"
                )

        return update

    def overall(self) -> Callable[[str, float, float], None]:
        """A line at the beginning of every stage, then at most one every 30 seconds."""
        start = last = math.nan
        last_stage, first_done = "", 0.0

        def update(stage: str, done: float, of: float) -> None:
            nonlocal start, last, last_stage, first_done
            now = self._clock()
            if math.isnan(start):
                start, first_done = now, done
            if stage != last_stage or now - last >= SECONDS_BETWEEN_LINES:
                last_stage, last = stage, now
                line = f"{stage}: {done / of if of else 1:.0%} of all work is done"
                if done - first_done > LEAST_SHARE * of:
                    line += f", {in_words((now - start) * (of - done) / (done - first_done))} left"
                self._write(f"{line}\n")

        return update

    def __exit__(self, *exception: object) -> None:
        pass


def progress(shown: bool = True) -> Progress:
    """Bars if standard error is a terminal, otherwise lines; nothing unless `shown`."""
    if not shown:
        return Lines(lambda line: None)
    console = Console(stderr=True)
    if sys.stderr.isatty() and console.is_interactive:
        return Bars(console)
    return Lines(_write_line)


def _write_line(line: str) -> None:
    sys.stderr.write(line)
    sys.stderr.flush()


def in_words(seconds: float) -> str:
    """A length of time in plain words."""
    for unit, length in (("hour", 3600), ("minute", 60)):
        if seconds >= 1.5 * length:
            return f"about {round(seconds / length)} {unit}s"
    return "about a minute" if seconds > 30 else "less than a minute"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
