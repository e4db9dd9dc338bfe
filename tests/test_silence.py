"""A model that does not use the cache or the layers that it was given is an error, or the trace says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from chunkwise_lora import ChunkWiseConfig, ChunkWiseModel, EngineError
from models import adapter, build, peft_model, prompts

PRESETS = ["lossless", "compact"]

RUNS: dict[str, Callable[[ChunkWiseModel, Tensor], Any]] = {
    "generate": lambda model, ids: model.generate(ids, max_new_tokens=24, do_sample=False),
    "forward": lambda model, ids: model(ids, use_cache=True),
}


class IgnoresItsCache(LlamaForCausalLM):
    def forward(
        self,
        input_ids: Any = None,
        position_ids: Any = None,
        cache: Any = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> Any:
        return super().forward(input_ids, **options | {"use_cache": False, "attention_mask": None})


class RenamesItsCache(LlamaForCausalLM):
    def forward(self, input_ids: Any = None, position_ids: Any = None, states: Any = None, **options: Any) -> Any:
        return super().forward(input_ids, position_ids=position_ids, **options)


class SkipsItsLayers(LlamaForCausalLM):
    def forward(self, input_ids: Any = None, **options: Any) -> Any:
        return CausalLMOutputWithPast(logits=self.model.embed_tokens(input_ids) @ self.lm_head.weight.T)


def attached(kind: type[LlamaForCausalLM], preset: str) -> ChunkWiseModel:
    model = build("llama")
    model.__class__ = kind
    return ChunkWiseModel(model, adapter("llama"), ChunkWiseConfig.preset(preset))


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_model_that_ignores_its_cache_is_an_error(preset: str, run: Callable[..., Any]) -> None:
    with pytest.raises(EngineError, match="the model does not use the cache that it was given"):
        run(attached(IgnoresItsCache, preset), prompts((9,))["input_ids"])


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_model_that_skips_its_layers_is_an_error(preset: str, run: Callable[..., Any]) -> None:
    with pytest.raises(EngineError, match="SkipsItsLayers did not run the adapted layers"):
        run(attached(SkipsItsLayers, preset), prompts((9,))["input_ids"])


def test_a_model_whose_cache_has_another_name_is_lossless_and_the_trace_says_that_no_policy_acts() -> None:
    ids = prompts((9,))["input_ids"]
    expected = peft_model("llama").generate(ids, max_new_tokens=24, do_sample=False)
    assert torch.equal(RUNS["generate"](attached(RenamesItsCache, "lossless"), ids), expected)
    model = attached(RenamesItsCache, "compact")
    RUNS["generate"](model, ids)
    assert model.trace is not None
    assert model.trace.kv_notes == ("not carried out: the call has no cache of this engine",)
