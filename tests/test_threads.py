"""Calls in several threads, and calls that are broken off, are right and leave nothing behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import StoppingCriteria

from chunkwise_lora import ChunkWiseConfig, ChunkWiseModel, EngineError
from chunkwise_lora.backends import backend_on
from chunkwise_lora.engines.transformers.context import PASS
from chunkwise_lora.engines.transformers.turns import Ends, Turns
from models import adapter, build, greedy, prompts

LOSSLESS = ChunkWiseConfig.preset("lossless")
COMPACT = ChunkWiseConfig.preset("compact")
ROUNDS = 5


def two_adapters() -> ChunkWiseModel:
    return ChunkWiseModel(
        build("llama"), {"a": adapter("llama"), "b": adapter("llama", "saved_head", seed=2)}, LOSSLESS
    )


def together(*works: Callable[[], object]) -> None:
    """Run each work in a thread of its own, all at once, and raise the first error of any."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(works))

    def run(work: Callable[[], object]) -> None:
        try:
            start.wait()
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads), "threads wait for each other"
    if errors:
        raise errors[0]


def repeats(call: Callable[[], torch.Tensor], expected: torch.Tensor) -> Callable[[], None]:
    def work() -> None:
        for _ in range(ROUNDS):
            assert torch.allclose(call().float(), expected.float(), atol=1e-4)

    return work


def test_threads_with_different_adapters_settings_and_plain_calls_are_all_right() -> None:
    model, inputs, other = two_adapters(), prompts((5,)), prompts((7, 9), seed=9)
    calls: list[Callable[[], torch.Tensor]] = [
        lambda: greedy(model, inputs, 20, adapter_names="a")[1],
        lambda: greedy(model, other, 20, adapter_names=["b", "__base__"])[1],
        lambda: greedy(model, inputs, 20, adapter_names="b", chunkwise_config=COMPACT)[1],
        lambda: model.base(**other).logits,
        lambda: model(**inputs, adapter_names="b").logits,
    ]
    with torch.no_grad():
        expected = [call() for call in calls]
        together(*(repeats(torch.no_grad()(call), right) for call, right in zip(calls, expected, strict=True)))


def test_adapters_are_loaded_replaced_and_deleted_while_others_generate() -> None:
    model, inputs = two_adapters(), prompts((5,))
    expected = greedy(model, inputs, 20, adapter_names="a")[1]
    third = ChunkWiseModel(build("llama"), adapter("llama", seed=3), LOSSLESS)
    right = greedy(third, inputs, 4)[1]

    def change() -> None:
        for _ in range(ROUNDS):
            model.load_adapter(adapter("llama", seed=3), "c")
            assert torch.allclose(greedy(model, inputs, 4, adapter_names="c")[1], right, atol=1e-4)
            model.load_adapter(adapter("llama", seed=4), "c")
            model.set_adapter("c")
            model.set_adapter("a")
            model.delete_adapter("c")

    together(change, repeats(lambda: greedy(model, inputs, 20, adapter_names="a")[1], expected))
    assert list(model.ladders) == ["a", "b"]


def test_a_call_ends_with_the_weights_with_which_it_began() -> None:
    model, inputs = two_adapters(), prompts((5,))
    expected = greedy(model, inputs, 12, adapter_names="a")[1]

    class Replace(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            if input_ids.shape[1] == 9:
                model.load_adapter(adapter("llama", seed=3), "a")
            return torch.zeros(len(input_ids), dtype=torch.bool)

    assert torch.equal(greedy(model, inputs, 12, adapter_names="a", stopping_criteria=[Replace()])[1], expected)
    third = ChunkWiseModel(build("llama"), adapter("llama", seed=3), LOSSLESS)
    assert torch.allclose(greedy(model, inputs, 12, adapter_names="a")[1], greedy(third, inputs, 12)[1], atol=1e-4)


def test_detach_waits_for_calls_of_other_threads_and_is_refused_inside_a_call() -> None:
    model, inputs = two_adapters(), prompts((5,))
    expected, steps = greedy(model, inputs, 12)[1], []
    inside, go_on = threading.Event(), threading.Event()

    class Pause(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            with pytest.raises(EngineError, match="not possible inside a generation"):
                model.detach()
            steps.append(input_ids.shape[1])
            inside.set()
            go_on.wait(60)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    def generate() -> None:
        assert torch.equal(greedy(model, inputs, 12, stopping_criteria=[Pause()])[1], expected)

    def detach() -> None:
        inside.wait(60)
        threading.Timer(0.1, go_on.set).start()
        model.detach()
        assert len(steps) == 12, "the generation had not ended"

    together(generate, detach)
    assert torch.equal(greedy(model.base, inputs, 12)[1], greedy(build("llama"), inputs, 12)[1])


class Stop(BaseException):
    """Like KeyboardInterrupt: no handler for `Exception` catches it."""


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, Stop, RuntimeError])
@pytest.mark.parametrize("at", [1, 4])
def test_a_call_that_is_broken_off_inside_a_layer_leaves_nothing_behind(at: int, interrupt: type) -> None:
    model, inputs = two_adapters(), prompts((5,))
    expected, plain = greedy(model, inputs, 12, adapter_names="b")[1], model.base(**inputs).logits
    passes = []

    def break_off(*_: Any) -> None:
        passes.append(1)
        if len(passes) == at:
            raise interrupt

    hook = model.base.model.layers[1].mlp.register_forward_pre_hook(break_off)
    with pytest.raises(interrupt):
        greedy(model, inputs, 12, adapter_names="b")
    hook.remove()
    assert PASS.get() is None and model.planner is None
    assert torch.equal(model.base(**inputs).logits, plain)
    assert torch.equal(greedy(model, inputs, 12, adapter_names="b")[1], expected)
    assert torch.equal(model.detach()(**inputs).logits, build("llama")(**inputs).logits)


def test_a_pass_that_was_broken_off_cannot_be_continued_with_its_cache() -> None:
    model, ids = two_adapters(), prompts((6,))["input_ids"]
    cache = model(ids, use_cache=True).past_key_values

    def break_off(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.base.model.layers[1].register_forward_pre_hook(break_off)
    with pytest.raises(KeyboardInterrupt):
        model(ids[:, :1], past_key_values=cache)
    hook.remove()
    with pytest.raises(EngineError, match="was broken off"):
        model(ids[:, :1], past_key_values=cache)


def test_the_trace_is_that_of_the_threads_own_call() -> None:
    model, tokens = two_adapters(), {}

    def generate(length: int) -> None:
        for _ in range(ROUNDS):
            model.generate(**prompts((length,)), max_new_tokens=6)
            assert model.trace is not None
            tokens.setdefault(length, set()).add(len(model.trace.sequences[0].tokens))

    together(lambda: generate(4), lambda: generate(9))
    assert tokens == {4: {9}, 9: {14}}
    assert model.trace is not None, "a thread without calls sees the last one"


def test_a_change_goes_between_passes_and_waits_for_no_generation() -> None:
    turns, seen = Turns(), []
    with turns.a_call():
        inside = pytest.raises(EngineError, match="load is not possible inside a forward pass")
        with turns.a_pass(), turns.a_pass(), inside, turns.a_change("load"):  # a pass inside a pass waits for nobody
            pass
        with turns.a_change("load"), turns.a_change("load"), turns.a_pass():
            seen.append("changed")
    assert seen == ["changed"]


def test_merging_waits_for_generations_and_switching_for_those_that_peft_runs() -> None:
    turns, ended = Turns(), threading.Event()
    for in_peft, ends in ((False, Ends.CALLS), (True, Ends.CALLS), (True, Ends.CALLS_IN_PEFT)):
        changed: list[bool] = []

        def change(ends: Ends = ends, changed: list[bool] = changed) -> None:
            with turns.a_change("merge", ends):
                changed.append(ended.is_set())

        ended.clear()
        with turns.a_call(in_peft):
            with (
                pytest.raises(EngineError, match="merge is not possible inside a generation"),
                turns.a_change("merge", ends),
            ):
                pass
            thread = threading.Thread(target=change)
            thread.start()
            with turns.a_call(in_peft), turns.a_pass():  # what the call still needs goes on
                pass
            ended.set()
        thread.join(timeout=60)
        assert changed == [True]


def test_a_turn_may_end_in_another_thread() -> None:
    turns = Turns()
    turn = turns.a_call()
    turn.__enter__()
    together(lambda: turn.__exit__(None, None, None))
    with turns.a_change("detach", Ends.CALLS):
        pass


def test_abandoned_and_interleaved_loops_leave_nothing_behind() -> None:
    model, inputs = two_adapters(), prompts((5,))
    expected = greedy(model, inputs, 6)[0][0].tolist()

    def loop() -> Iterator[int]:
        with model.stream(prompt_columns=5) as call, torch.no_grad():
            tokens = inputs["input_ids"]
            while True:
                logits = model(input_ids=tokens, past_key_values=call.cache, use_cache=True).logits
                tokens = logits[:, -1:].argmax(-1)
                yield int(tokens)

    first, second = loop(), loop()
    found = [(next(first), next(second)) for _ in range(3)]
    first.close()
    found += [(next(second),) * 2 for _ in range(3)]
    assert [pair[1] for pair in found] == [pair[0] for pair in found] == expected
    together(second.close)
    assert model.planner is None
    assert torch.equal(greedy(model.attach(), inputs, 6)[0][0], torch.tensor(expected))
    model.detach()


def test_a_thread_that_copies_the_context_of_a_call_makes_calls_of_its_own() -> None:
    model, inputs = two_adapters(), prompts((5,))
    expected = greedy(model, inputs, 4)[0]
    with model.stream(prompt_columns=5) as call:
        for _ in range(2):
            assert torch.equal(asyncio.run(asyncio.to_thread(greedy, model, inputs, 4))[0], expected)
        assert call.session.columns == 0


def test_a_cache_from_before_a_cast_is_refused_and_new_calls_are_right() -> None:
    model, inputs = two_adapters(), prompts((5,))
    with torch.no_grad():
        expected = model(**inputs).logits
        cache = model(**inputs, use_cache=True).past_key_values
        model.to(torch.float64)
        assert torch.allclose(model(**inputs).logits.float(), expected, atol=1e-4)
        with pytest.raises(EngineError, match=r"replaced or deleted|cast or moved"):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)


def test_a_layer_that_got_another_backend_refuses_the_adapters_of_the_former() -> None:
    model, inputs = two_adapters(), prompts((5,))
    with torch.no_grad(), model.stream(prompt_columns=5) as call:
        model(**inputs, past_key_values=call.cache)
        layer = next(iter(model._runner.adapters.layers.values()))
        layer.use(backend_on(torch.device("cpu"), torch.float64), (32, 32))
        with pytest.raises(EngineError, match="cast or moved since this call began"):
            model(input_ids=torch.tensor([[5]]), past_key_values=call.cache)
