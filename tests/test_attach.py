"""Attaching changes a model reversibly: detaching leaves nothing behind, even after an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from chunkwise_lora import ChunkWiseConfig, ChunkWiseModel, EngineError, LadderError, RankLadder
from chunkwise_lora.engines.transformers.replacements import ReplacedForwards
from models import adapter, build, greedy, prompts

LOSSLESS = ChunkWiseConfig.preset("lossless")
BALANCED = ChunkWiseConfig.preset("balanced")


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything that attaching could leave behind: attributes, hooks, tensors."""
    attributes = {name: list(vars(module)) for name, module in model.named_modules()}
    hooks = {
        (name, key): len(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if "hooks" in key and isinstance(value, dict)
    }
    return {"attributes": attributes, "hooks": hooks, "tensors": {k: v.clone() for k, v in model.state_dict().items()}}


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = fingerprint(model)
    assert after["attributes"] == before["attributes"]
    assert after["hooks"] == before["hooks"]
    assert after["tensors"].keys() == before["tensors"].keys()
    assert all(torch.equal(tensor, before["tensors"][name]) for name, tensor in after["tensors"].items())


@pytest.mark.parametrize("kind", ["plain", "saved_head", "saved_embedding"])
@pytest.mark.parametrize("preset", ["lossless", "compact"])
def test_detach_leaves_the_model_as_it_was(kind: str, preset: str) -> None:
    base = build("llama")
    before, outputs = fingerprint(base), greedy(base, prompts(), 8)[1]
    with ChunkWiseModel(base, adapter("llama", kind), ChunkWiseConfig.preset(preset)) as model:
        model.generate(**prompts(), max_new_tokens=8)
    assert_unchanged(base, before)
    assert torch.equal(greedy(base, prompts(), 8)[1], outputs)


def test_an_exception_inside_the_context_leaves_the_model_as_it_was() -> None:
    base = build("llama")
    before = fingerprint(base)
    with pytest.raises(KeyboardInterrupt), ChunkWiseModel(base, adapter("llama")):
        raise KeyboardInterrupt
    assert_unchanged(base, before)


def test_an_exception_inside_generate_leaves_the_model_usable() -> None:
    class Stop(Exception):
        pass

    def stop(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise Stop

    model = ChunkWiseModel(build("llama"), adapter("llama"), LOSSLESS)
    expected = greedy(model, prompts(), 8)[0]
    with pytest.raises(Stop):
        model.generate(**prompts(), max_new_tokens=8, logits_processor=[stop])
    assert torch.equal(greedy(model, prompts(), 8)[0], expected)


def test_calls_inside_a_generation_are_right_and_change_nothing() -> None:
    model = ChunkWiseModel(build("llama"), adapter("llama"), LOSSLESS)
    expected, other = greedy(model, prompts(), 8)[0], prompts((4,), seed=9)
    expected_inside, logits = greedy(model, other, 4)[0], model(**other).logits

    def nested(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert torch.equal(greedy(model, other, 4)[0], expected_inside)
        assert torch.equal(model(**other).logits, logits)
        assert torch.equal(model(**other, use_cache=False).logits, logits)
        return scores

    assert torch.equal(greedy(model, prompts(), 8, logits_processor=[nested])[0], expected)


def test_attaching_again_works() -> None:
    model = ChunkWiseModel(build("llama"), adapter("llama"), LOSSLESS)
    expected = greedy(model, prompts(), 8)[0]
    base = model.detach()
    assert not torch.equal(greedy(base, prompts(), 8)[0], expected)
    with pytest.raises(EngineError, match="attach"):
        model.generate(**prompts())
    assert torch.equal(greedy(model.attach(), prompts(), 8)[0], expected)
    assert model.attach() is model


def test_a_second_chunkwise_model_on_one_base_is_refused_until_the_first_detaches() -> None:
    first = ChunkWiseModel(build("llama"), adapter("llama"), LOSSLESS)
    expected = greedy(first, prompts(), 8)[0]
    with pytest.raises(EngineError, match="detach"):
        ChunkWiseModel(first.model)
    with pytest.raises(EngineError, match="already carries"):
        ChunkWiseModel(first.base, adapter("llama", seed=2))
    assert torch.equal(greedy(first, prompts(), 8)[0], expected)
    second = ChunkWiseModel(first.detach(), adapter("llama", seed=2), LOSSLESS)
    assert not torch.equal(greedy(second, prompts(), 8)[0], expected)


def test_a_ladder_loaded_later_runs_beside_the_first() -> None:
    model = ChunkWiseModel(build("llama"), adapter("llama"), LOSSLESS)
    first = greedy(model, prompts(), 8)[0]
    model.load_adapter(adapter("llama", seed=2), "second")
    alone = ChunkWiseModel(build("llama"), adapter("llama", seed=2), LOSSLESS)
    assert torch.equal(greedy(model, prompts(), 8)[0], first)
    assert torch.equal(greedy(model, prompts(), 8, adapter_names="second")[0], greedy(alone, prompts(), 8)[0])


def test_a_ladder_that_fails_to_load_leaves_the_attached_model_as_it_was() -> None:
    model = ChunkWiseModel(build("llama"), adapter("llama"), LOSSLESS)
    expected = greedy(model, prompts(), 8)[0]
    broken = RankLadder.from_peft(adapter("llama", seed=2))
    list(broken.modules.values())[-1].up[0, 0] = float("nan")
    with pytest.raises(LadderError, match="NaN"):
        model.load_adapter(broken, "second")
    assert model.attached
    assert list(model.ladders) == ["default"]
    assert torch.equal(greedy(model, prompts(), 8)[0], expected)
    model.load_adapter(adapter("llama", seed=2), "second")


@pytest.mark.parametrize("name", ["", "__base__", "v1.0", "weight", "keys", 5])
def test_an_impossible_adapter_name_is_refused(name: Any) -> None:
    model = ChunkWiseModel(build("llama"), adapter("llama"))
    with pytest.raises(EngineError, match=f"adapter name {name!r}"):
        model.load_adapter(adapter("llama", seed=2), name)


def test_attributes_that_the_wrapper_lacks_are_those_of_the_model() -> None:
    model = ChunkWiseModel(build("llama"), adapter("llama"))
    assert model.config is model.model.config
    with pytest.raises(AttributeError):
        _ = model.no_such_attribute


def test_a_base_loaded_by_name_runs_the_ladder(tmp_path: Any) -> None:
    build("llama").save_pretrained(tmp_path)
    model = ChunkWiseModel.from_pretrained(tmp_path, adapter("llama"), LOSSLESS)
    model.generation_config.eos_token_id = None
    expected = ChunkWiseModel(build("llama"), adapter("llama"), LOSSLESS)
    assert torch.equal(greedy(model, prompts(), 8)[0], greedy(expected, prompts(), 8)[0])


def test_positional_arguments_have_the_order_of_the_model() -> None:
    base, inputs = build("gpt2"), prompts((6, 9))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with ChunkWiseModel(base, adapter("gpt2"), LOSSLESS) as model:
        expected = model(ids, attention_mask=mask).logits
        assert torch.allclose(base(ids, None, mask).logits, expected, atol=1e-5)
        assert not torch.allclose(base(ids).logits, expected)


def test_a_plain_loop_over_an_unknown_cache_is_refused() -> None:
    base = build("llama")
    cache = base(prompts((6,))["input_ids"], use_cache=True).past_key_values
    with ChunkWiseModel(base, adapter("llama"), BALANCED), pytest.raises(EngineError, match="cache are unknown"):
        base(torch.tensor([[5]]), past_key_values=cache)


def test_attaching_that_is_interrupted_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    base = build("llama")
    before, attention = fingerprint(base), base.config._attn_implementation

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ReplacedForwards, "refresh", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ChunkWiseModel(base, adapter("llama"), LOSSLESS)
    assert_unchanged(base, before)
    assert base.config._attn_implementation == attention
    assert all(parameter.requires_grad for parameter in base.parameters())
