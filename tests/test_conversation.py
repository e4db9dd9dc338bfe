"""A cache is kept from call to call with its plan: chat turns, hand-written loops, and what they do to caches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from chunkwise_lora import ChunkWiseConfig, ChunkWiseModel, EngineError
from chunkwise_lora.engines.transformers.session import Session
from models import adapter, build, greedy, peft_model, prompts

PRESETS = {name: ChunkWiseConfig.preset(name) for name in ("lossless", "balanced", "compact")}


def attached(preset: str = "lossless", architecture: str = "llama") -> ChunkWiseModel:
    return ChunkWiseModel(build(architecture), adapter(architecture), PRESETS[preset])


def by_hand(model: Any, inputs: dict[str, Tensor], new_tokens: int, **first: Any) -> tuple[Tensor, Any]:
    """Greedy decoding as people write it, with the full attention mask; returns logits (batch, new, vocabulary)."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    logits = []
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **first)
    for _ in range(new_tokens - 1):
        logits.append(output.logits[:, -1])
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions[:, -1:] + 1
        output = model(
            input_ids=logits[-1].argmax(-1, keepdim=True),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=output.past_key_values,
        )
    return torch.stack([*logits, output.logits[:, -1]], dim=1), output.past_key_values


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_a_loop_by_hand_gives_what_generate_gives(architecture: str, preset: str) -> None:
    model = attached(preset, architecture)
    expected = greedy(model, prompts((40, 21, 33)), 40)[1]
    for called in (model, model.base, model.model):
        with torch.no_grad():
            logits, _ = by_hand(called, prompts((40, 21, 33)), 40)
        assert (logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize("then", ["trace", "crop", "reorder", "copy", "a mask", "another turn"])
def test_tokens_that_no_plan_needs_are_read_later_and_none_is_lost(then: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[int] = []
    new_plan = Session._new_plan

    def note(self: Session, *given: Any) -> Any:
        planned.append(self.columns)
        return new_plan(self, *given)

    monkeypatch.setattr(Session, "_new_plan", note)
    model, ids = attached("lossless"), prompts((9, 9))["input_ids"]
    with torch.no_grad():
        output = model(input_ids=ids, use_cache=True)
        for step in range(5):
            token = torch.tensor([[10 + step], [20 + step]])
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
            token += 50  # a caller may use its tensor again
        assert planned == [0, 9], "the prompt and the first step"
        cache = output.past_key_values
        expected = [[*ids[row].tolist(), *range(start, start + 5)] for row, start in ((0, 10), (1, 20))]
        if then == "crop":
            cache.crop(12)
            expected = [tokens[:12] for tokens in expected]
        elif then == "reorder":
            cache.reorder_cache(torch.tensor([1, 0]))
            expected.reverse()
        elif then == "copy":
            cache = copy.deepcopy(cache)
        elif then == "a mask":
            mask = torch.ones(2, 15, dtype=torch.long)
            model(input_ids=ids[:, :1], attention_mask=mask, past_key_values=cache, use_cache=True)
            expected = [[*tokens, int(ids[row, 0])] for row, tokens in enumerate(expected)]
        elif then == "another turn":
            text = torch.cat([torch.tensor(expected), ids[:, :2]], dim=1)
            model.generate(text, past_key_values=cache, max_new_tokens=1, do_sample=False)
            expected = text.tolist()
    trace = cache.session.trace(cache)
    assert [list(sequence.tokens) for sequence in trace.sequences] == expected
    assert all(len(sequence.ranks) == len(tokens) for sequence, tokens in zip(trace.sequences, expected, strict=True))


def test_a_loop_without_masks_and_positions_equals_peft() -> None:
    model, reference = attached("lossless"), peft_model("llama")
    logits = []
    with torch.no_grad():
        for one in (model, reference):
            ids, cache = prompts((9, 9))["input_ids"], None
            for _ in range(6):
                output = one(input_ids=ids, past_key_values=cache, use_cache=True)
                ids, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
            logits.append(output.logits[:, -1])
    assert (logits[0] - logits[1]).abs().max() < 1e-4


def test_a_loop_with_a_cache_of_transformers_is_planned_without_a_kv_policy() -> None:
    model, cache = attached("balanced"), DynamicCache(config=build("llama").config)
    with torch.no_grad():
        logits, _ = by_hand(model, prompts((40, 33)), 20, past_key_values=cache)
    without_kv = PRESETS["balanced"].model_copy(
        update={
            "kv_cache": type(PRESETS["balanced"].kv_cache)(
                levels=tuple(type(level)() for level in PRESETS["balanced"].kv_cache.levels)
            )
        }
    )
    expected = greedy(model, prompts((40, 33)), 20, chunkwise_config=without_kv)[1]
    assert (logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize("preset", PRESETS)
def test_a_turn_costs_only_its_new_tokens_and_lossless_turns_equal_one_run(preset: str) -> None:
    model = attached(preset)
    ids, cache = prompts((20,))["input_ids"], None
    for turn in range(3):
        output = model.generate(
            ids, past_key_values=cache, max_new_tokens=8, do_sample=False, return_dict_in_generate=True
        )
        cache = output.past_key_values
        assert model.trace is not None
        assert len(model.trace.sequences[0].tokens) == output.sequences.shape[1] - 1
        assert model.trace.passes == 8 * (turn + 1)
        if preset == "lossless":
            new = greedy(model, {"input_ids": ids}, 8)[0]
            assert torch.equal(output.sequences[:, ids.shape[1] :], new)
        ids = torch.cat([output.sequences, prompts((5,), seed=turn)["input_ids"]], dim=1)


def test_a_cache_may_be_given_to_generate_after_a_plain_pass_and_copied_for_many_questions() -> None:
    model, ids = attached("compact"), prompts((60,))["input_ids"]
    prefix = ids[:, :50]
    with torch.no_grad():
        cache = model(prefix, use_cache=True).past_key_values
    answers = []
    for _ in range(2):
        answers.append(
            model.generate(ids, past_key_values=copy.deepcopy(cache), max_new_tokens=8, do_sample=False)[:, 60:]
        )
    assert torch.equal(*answers)
    assert cache.get_seq_length() == 50


def test_a_cache_is_refused_for_other_tokens_adapters_settings_and_models() -> None:
    model = ChunkWiseModel(build("llama"), {"a": adapter("llama"), "b": adapter("llama", seed=2)})
    ids = prompts((9,))["input_ids"]
    output = model.generate(ids, adapter_names="a", max_new_tokens=3, return_dict_in_generate=True)
    cache, longer = output.past_key_values, torch.cat([output.sequences, ids], dim=1)

    def refused(says: str, given: Tensor = longer, by: ChunkWiseModel = model, **options: Any) -> None:
        with pytest.raises(EngineError, match=says):
            by.generate(given, past_key_values=cache, max_new_tokens=2, **options)

    refused("do not begin with the tokens of the cache", longer.flip(1))
    refused("pass the whole conversation", ids)
    refused("another adapter needs its own cache", adapter_names="b")
    refused("made with other settings", chunkwise_config=PRESETS["compact"])
    refused("a cache that an earlier call of this model returned", by=attached())
    model.load_adapter(adapter("llama", seed=5), "a")
    refused("was replaced or deleted since this cache was made", adapter_names="a")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_cropped_cache_goes_on_as_if_it_had_never_been_longer(preset: str) -> None:
    model, ids = attached(preset), prompts((30,))["input_ids"]
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        model(ids[:, :2], past_key_values=cache)
        cache.crop(30)
        again = model(ids[:, 5:9], past_key_values=cache).logits
        fresh = model(ids, use_cache=True).past_key_values
        expected = model(ids[:, 5:9], past_key_values=fresh).logits
    assert (again - expected).abs().max() < 1e-4


@pytest.mark.parametrize("architecture", ["gpt_neo", "bloom"])
def test_a_cache_that_carries_out_no_decisions_is_cropped_and_repeated_too(architecture: str) -> None:
    model, ids = ChunkWiseModel(build(architecture), adapter(architecture)), prompts((12,))["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits[:, 8:]
        cache = model(ids, use_cache=True).past_key_values
        cache.crop(8)
        cache.batch_repeat_interleave(2)
        logits = model(ids[:, 8:].repeat(2, 1), past_key_values=cache).logits
    assert (logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize("preset", PRESETS)
def test_sequences_of_a_cache_may_be_repeated_and_selected(preset: str) -> None:
    model, inputs = attached(preset), prompts((30, 30))
    ids, new = inputs["input_ids"], prompts((3, 3), seed=7)["input_ids"]

    def filled() -> Any:
        return model(ids, use_cache=True).past_key_values

    with torch.no_grad():
        expected = model(new, past_key_values=filled()).logits
        repeated, selected = filled(), filled()
        repeated.batch_repeat_interleave(2)
        selected.batch_select_indices(torch.tensor([1]))
        twice = model(new.repeat_interleave(2, 0), past_key_values=repeated).logits
        one = model(new[1:], past_key_values=selected).logits
    assert (twice[::2] - expected).abs().max() < 1e-4
    assert (twice[1::2] - expected).abs().max() < 1e-4
    assert (one[0] - expected[1]).abs().max() < 1e-4
