"""A readers-writer lock for a model: forward passes run side by side, a change of its adapters runs alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from chunkwise_lora.errors import EngineError


class Turns:
    """Lets forward passes of all threads run at the same time, and changes one by one, between passes.

    A *call* is a whole generation. It holds no turn between its passes, so adapters can be loaded meanwhile.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._mine = _Depths()
        self._passes = 0
        """Running passes of all threads."""
        self._calls = 0
        """Running calls of all threads."""
        self._closing = 0
        """Changes that wait until no call runs."""
        self._waiting = 0
        """Changes that wait until no pass runs."""
        self._changing = False
        """Whether a change runs."""

    @contextmanager
    def a_pass(self) -> Iterator[None]:
        """Run a forward pass. A pass inside a pass or a change of the same thread waits for nobody."""
        if self._mine.passes or self._mine.changes:
            yield
            return
        with self._condition:
            # A change that waits goes first, so that a stream of passes cannot hold it up.
            self._condition.wait_for(lambda: not self._changing and not self._waiting)
            self._passes += 1
        self._mine.passes += 1
        try:
            yield
        finally:
            self._mine.passes -= 1
            with self._condition:
                self._passes -= 1
                self._condition.notify_all()

    @contextmanager
    def a_call(self) -> Iterator[None]:
        """Run a generation, for which `a_change(ends_calls=True)` waits."""
        with self._condition:
            self._condition.wait_for(lambda: self._mine.calls or not self._closing)
            self._calls += 1
        self._mine.calls += 1
        try:
            yield
        finally:
            self._mine.calls -= 1
            with self._condition:
                self._calls -= 1
                self._condition.notify_all()

    @contextmanager
    def a_change(self, what: str, ends_calls: bool = False) -> Iterator[None]:
        """Change the model while no pass runs.

        Args:
            what: Names the change in errors.
            ends_calls: Also wait until no generation runs.

        Raises:
            EngineError: The thread is inside a pass, or inside a generation that the change would wait for.
        """
        if self._mine.changes:
            yield
            return
        if self._mine.passes or (ends_calls and self._mine.calls):
            where = "a forward pass" if self._mine.passes else "a generation"
            raise EngineError(f"{what} is not possible inside {where} of the same model; do it when that has ended")
        with self._condition:
            if ends_calls:
                with self._counted("_closing"):  # new generations wait
                    self._condition.wait_for(lambda: not self._calls)
                    self._begin_change()
            else:
                self._begin_change()
        self._mine.changes += 1
        try:
            yield
        finally:
            self._mine.changes -= 1
            with self._condition:
                self._changing = False
                self._condition.notify_all()

    def _begin_change(self) -> None:
        with self._counted("_waiting"):  # new passes wait
            self._condition.wait_for(lambda: not self._changing and not self._passes)
        self._changing = True

    @contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        setattr(self, name, getattr(self, name) + 1)
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) - 1)
            self._condition.notify_all()


class _Depths(threading.local):
    """How many turns of each kind the current thread is in."""

    passes = 0
    calls = 0
    changes = 0
