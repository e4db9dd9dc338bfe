"""The budget for adapters: what it promises, whatever is asked in whatever order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from chunkwise_lora.engines.vllm.budget import ABSENT, WHOLE, AdapterBudget, Ask
from chunkwise_lora.method.config import ChunkWiseConfig
from chunkwise_lora.method.segments import limited
from chunkwise_lora.method.sequence import AdapterInfo, SequencePlanner

SIZES = (0, 10, 20, 30, 40)
TOP = len(SIZES) - 1


def ask(adapter: int, highest: int = TOP, insists: bool = False) -> Ask:
    return Ask(adapter, SIZES, highest, insists)


class Budget(AdapterBudget):
    """A budget whose requests have numbers."""

    requests = 0

    def ask(self, adapter: int, highest: int = TOP, insists: bool = False) -> int | None:
        """Start a request that never ends; returns its highest rung."""
        self.requests += 1
        return self.start(self.requests, ask(adapter, highest, insists))

    def ask_and_end(self, adapter: int, highest: int = TOP, insists: bool = False) -> int | None:
        rung = self.ask(adapter, highest, insists)
        self.end([self.requests])
        return rung


def test_adapters_that_fit_are_whole() -> None:
    budget = Budget(120)
    assert [budget.ask_and_end(adapter) for adapter in (1, 2, 3)] == [TOP] * 3
    assert budget.changes() == {1: WHOLE, 2: WHOLE, 3: WHOLE}
    assert budget.changes() == {}


def test_an_adapter_that_nobody_asks_for_gives_up_rungs_first() -> None:
    budget = Budget(80)
    budget.ask_and_end(1)
    for _ in range(20):
        budget.ask_and_end(2)
    budget.ask_and_end(3)
    assert [budget.rung(adapter) for adapter in (1, 2, 3)] == [2, TOP, 2]


def test_an_adapter_that_is_asked_often_gets_its_rungs_back() -> None:
    budget = Budget(80)
    for adapter in (1, 2, 3, 3, 3, 3, 3, 3):
        budget.ask_and_end(adapter)
    assert budget.rung(3) == TOP > budget.rung(1)
    got = [budget.ask_and_end(1) for _ in range(30)]
    assert got == sorted(got)
    assert got[-1] == TOP > budget.rung(3)


def test_a_plan_of_low_rungs_holds_no_higher_ones() -> None:
    budget = Budget(80)
    assert budget.ask_and_end(1, highest=2) == 2 == budget.rung(1)
    assert budget.ask_and_end(2, highest=0) == 0
    assert budget.nbytes == 20


def test_a_request_that_insists_gets_the_rungs_of_adapters_that_no_request_runs_with() -> None:
    budget = Budget(80)
    for _ in range(30):
        budget.ask_and_end(1)
        budget.ask_and_end(2)
    assert budget.ask(3) < TOP
    assert budget.ask(3, insists=True) == TOP
    assert min(budget.rung(1), budget.rung(2)) > 0


def test_a_request_that_insists_waits_for_running_ones() -> None:
    budget = Budget(60)
    assert budget.ask(1, highest=3) == 3
    assert budget.ask(2, insists=True) is None
    assert budget.rung(2) == ABSENT
    budget.end([1])
    assert budget.ask(2, insists=True) == TOP
    small = Budget(35)
    assert small.ask(1, insists=True) == 3, "more can never fit"


def test_a_running_request_keeps_its_rungs() -> None:
    budget = Budget(50)
    assert budget.ask(1, highest=3) == 3
    assert budget.ask(2) == 2
    assert budget.ask(3) is None
    budget.end([1])
    assert budget.ask(3) is not None
    assert budget.rung(2) == 2
    assert budget.running == {2, 3}


def test_no_adapter_leaves_while_another_has_a_rung_to_give() -> None:
    budget = Budget(80)
    for adapter in range(1, 9):
        budget.ask_and_end(adapter)
    assert [budget.rung(adapter) for adapter in range(1, 9)] == [1] * 8
    budget.ask_and_end(1)
    budget.ask_and_end(9)
    assert [adapter for adapter in range(1, 10) if budget.rung(adapter) == ABSENT] == [2]


def test_an_adapter_that_was_replaced_by_one_of_another_size_starts_anew() -> None:
    budget = Budget(80)
    budget.ask_and_end(1)
    budget.changes()
    assert budget.start("new", Ask(1, (0, 7, 14), 2, False)) == 2
    assert budget.changes() == {1: WHOLE}
    assert budget.nbytes == 14
    assert budget.start("old", ask(1)) == 2, "while a request runs, its adapter stays as it is"


def test_an_unloaded_adapter_makes_room() -> None:
    budget = Budget(40)
    budget.ask_and_end(1)
    budget.remove(1)
    budget.remove(2)
    assert budget.nbytes == 0
    assert budget.changes() == {1: ABSENT}


LADDERS = st.lists(st.integers(0, 30), min_size=1, max_size=6).map(lambda steps: tuple(np.cumsum([0, *steps]).tolist()))


class Anything(RuleBasedStateMachine):
    """Requests of random adapters start and end in random order."""

    @initialize(limit=st.integers(30, 500), ladders=st.lists(LADDERS, min_size=8, max_size=8))
    def begin(self, limit: int, ladders: list[tuple[int, ...]]) -> None:
        self.budget = AdapterBudget(limit)
        self.ladders = ladders
        self.running: dict[int, tuple[int, int]] = {}
        self.on_device: dict[int, int] = {}
        self.number = 0

    def holds(self) -> dict[int, int]:
        return {adapter: self.budget.rung(adapter) for adapter in range(8)}

    def needs(self, adapter: int) -> int:
        """The lowest rung that an adapter has to keep now."""
        limits = [rung for of, rung in self.running.values() if of == adapter]
        first = next((rung for rung, size in enumerate(self.ladders[adapter]) if size), 0)
        return max(limits, default=min(self.budget.rung(adapter), first))

    def size(self, adapter: int, rung: int) -> int:
        return 0 if rung == ABSENT else self.ladders[adapter][rung]

    @rule(adapter=st.integers(0, 7), highest=st.integers(0, 6), insists=st.booleans())
    def starts(self, adapter: int, highest: int, insists: bool) -> None:
        sizes, before = self.ladders[adapter], self.holds()
        highest = min(highest, len(sizes) - 1)
        others = {of for of, _ in self.running.values()} - {adapter}
        rung = self.budget.start(self.number, Ask(adapter, sizes, highest, insists))
        if rung is None:
            assert others
            assert self.holds() == before
            return
        self.running[self.number] = adapter, rung
        self.number += 1
        assert rung <= highest
        if insists:
            assert rung == highest or sizes[rung + 1] > self.budget.limit
        gone = [other for other, old in before.items() if old != ABSENT == self.budget.rung(other)]
        if gone:
            left = [other for other in range(8) if other not in (adapter, *gone)]
            assert all(self.size(one, self.budget.rung(one)) == self.size(one, self.needs(one)) for one in left)

    @rule(pick=st.integers(0, 100))
    def ends(self, pick: int) -> None:
        if self.running:
            request = sorted(self.running)[pick % len(self.running)]
            del self.running[request]
            self.budget.end([request, "unknown"])

    @rule(adapter=st.integers(0, 7))
    def is_removed(self, adapter: int) -> None:
        self.budget.remove(adapter)

    @rule()
    def is_told(self) -> None:
        self.on_device |= self.budget.changes()
        for adapter, rung in self.holds().items():
            told = self.on_device.get(adapter, ABSENT)
            assert rung == (len(self.ladders[adapter]) - 1 if told == WHOLE else told)

    @invariant()
    def keeps_within_the_limit(self) -> None:
        if hasattr(self, "budget"):
            assert self.budget.nbytes <= self.budget.limit

    @invariant()
    def keeps_the_rungs_of_running_requests(self) -> None:
        for adapter, rung in getattr(self, "running", {}).values():
            assert rung <= self.budget.rung(adapter)


Anything.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestAnything = Anything.TestCase


# Plans with a highest rung


@given(st.integers(1, 9), st.integers(0, 12), st.data())
def test_a_limited_plan_has_the_same_weight_on_lower_rungs(rungs: int, highest: int, data: Any) -> None:
    weights = np.array(
        data.draw(st.lists(st.lists(st.floats(0, 1, width=32), min_size=rungs, max_size=rungs), max_size=5))
    )
    weights = weights.reshape(-1, rungs)
    low = limited(weights, highest)
    assert np.allclose(low.sum(1), weights.sum(1))
    assert not low[:, highest + 1 :].any()
    assert np.array_equal(low[:, :highest], weights[:, :highest])
    assert limited(weights, None) is weights


@pytest.mark.parametrize("preset", ["lossless", "balanced"])
def test_a_limited_sequence_follows_its_plan_up_to_the_highest_rung(preset: str) -> None:
    adapter = AdapterInfo("a", "a", np.arange(9.0), np.arange(9))
    config, tokens = ChunkWiseConfig.preset(preset), list(range(40))
    free, bound = (SequencePlanner(adapter, config, 100, tokens, highest_rung=rung) for rung in (None, 5))
    assert np.array_equal(bound.plan(0, tokens), limited(free.plan(0, tokens), 5))
    assert (free.available_rank, bound.available_rank, bound.full_rank) == (8, 5, 8)
    assert bound.mean_rank <= 5 < free.mean_rank
    bound.rewind(10)
    assert bound.weights.argmax(1).max() <= 5
