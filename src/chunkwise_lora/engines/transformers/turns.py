"""A readers-writer lock for a model: forward passes run side by side, a change of its adapters runs alone."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

from chunkwise_lora.errors import EngineError


class Ends(Enum):
    """What must have ended before a change."""

    PASSES = "forward passes"
    """Enough for what running calls do not read."""
    CALLS_IN_PEFT = "generations that PEFT runs"
    """They read the state of PEFT in every pass."""
    CALLS = "all generations"


class Turns:
    """Lets forward passes of all threads run at the same time, and changes one by one, between passes.

    A *call* is a whole generation. It holds no turn between its passes, so adapters can be loaded meanwhile.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._passes: Counter[int] = Counter()
        """Running passes by thread. A turn may end in another thread than it began, as a generator may be closed."""
        self._calls: Counter[int] = Counter()
        """Running calls by thread."""
        self._calls_in_peft: Counter[int] = Counter()
        """Running generations that PEFT runs, by thread."""
        self._closing: list[Ends] = []
        """What the changes wait for that wait for calls."""
        self._waiting = 0
        """Changes that wait until no pass runs."""
        self._changing: int | None = None
        """The thread that changes the model."""

    @contextmanager
    def a_pass(self) -> Iterator[None]:
        """Run a forward pass. A pass inside a pass or a change of the same thread waits for nobody."""
        thread = threading.get_ident()
        if thread in self._passes or self._changing == thread:
            yield
            return
        with self._condition:
            # A change that waits goes first, so that a stream of passes cannot hold it up.
            self._condition.wait_for(lambda: self._changing is None and not self._waiting)
            self._passes[thread] += 1
        try:
            yield
        finally:
            self._end(self._passes, thread)

    @contextmanager
    def a_call(self, in_peft: bool = False) -> Iterator[None]:
        """Run a generation, for which changes may wait. `in_peft` tells that PEFT runs it, by its own state."""
        thread = threading.get_ident()
        waits_for = {Ends.CALLS, Ends.CALLS_IN_PEFT} if in_peft else {Ends.CALLS}
        counts = self._calls_in_peft if in_peft else self._calls
        with self._condition:
            turns = (self._passes, self._calls, self._calls_in_peft)
            is_nested = self._changing == thread or any(thread in turn for turn in turns)
            self._condition.wait_for(lambda: is_nested or waits_for.isdisjoint(self._closing))
            counts[thread] += 1
        try:
            yield
        finally:
            self._end(counts, thread)

    @contextmanager
    def a_change(self, what: str, ends: Ends = Ends.PASSES) -> Iterator[None]:
        """Change the model while no pass runs.

        Args:
            what: Names the change in errors.
            ends: What to wait for.

        Raises:
            EngineError: The thread is inside a pass, or inside a generation that the change would wait for.
        """
        thread = threading.get_ident()
        if self._changing == thread:
            yield
            return
        waits_for = {Ends.PASSES: (), Ends.CALLS_IN_PEFT: (self._calls_in_peft,)}.get(
            ends, (self._calls, self._calls_in_peft)
        )
        if thread in self._passes or any(thread in calls for calls in waits_for):
            where = "a forward pass" if thread in self._passes else "a generation"
            raise EngineError(f"{what} is not possible inside {where} of the same model; do it when that has ended")
        with self._condition:
            self._closing.append(ends)  # new calls wait
            try:
                self._condition.wait_for(lambda: not any(waits_for))
                self._begin_change(thread)
            finally:
                self._closing.remove(ends)
                self._condition.notify_all()
        try:
            yield
        finally:
            with self._condition:
                self._changing = None
                self._condition.notify_all()

    def _begin_change(self, thread: int) -> None:
        self._waiting += 1  # new passes wait
        try:
            self._condition.wait_for(lambda: self._changing is None and not self._passes)
        finally:
            self._waiting -= 1
        self._changing = thread

    def _end(self, counts: Counter[int], thread: int) -> None:
        with self._condition:
            counts[thread] -= 1
            if not counts[thread]:
                del counts[thread]
            self._condition.notify_all()
