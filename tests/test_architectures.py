"""On every architecture, the `lossless` preset gives the tokens and logits of unmerged PEFT."""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from architectures import ARCHITECTURES, IMAGES, PAD, VOCABULARY, prompts
from chunkwise_lora import ChunkWiseConfig, ChunkWiseModel, RankLadder, RuntimeScheduler
from chunkwise_lora.calibration.log_probabilities import at_full_rank
from chunkwise_lora.engines.transformers import versions
from chunkwise_lora.engines.transformers.traits import ModelTraits
from chunkwise_lora.errors import EngineError
from chunkwise_lora.ladder.peft_model import plain_adapter
from chunkwise_lora.method.config import (
    ChunkingConfig,
    CompositionConfig,
    KVCacheConfig,
    LevelKVPolicy,
    SelectionConfig,
)
from models import adapter, build, greedy

LOSSLESS = ChunkWiseConfig.preset("lossless")
TOLERANCE = 1e-4
NEW_TOKENS = 6


@dataclass
class Pair:
    """The same model with the same two adapters, `first` and `second`, in this package and in PEFT."""

    architecture: str
    ours: ChunkWiseModel
    peft: PeftModel

    @classmethod
    def of(cls, architecture: str, **options: Any) -> Pair:
        folders = {
            name: adapter(architecture, seed=seed, **options) for seed, name in enumerate(("first", "second"), 1)
        }
        peft = PeftModel.from_pretrained(build(architecture), str(folders["first"]), adapter_name="first")
        peft.load_adapter(str(folders["second"]), "second")
        return cls(architecture, ChunkWiseModel(build(architecture), folders, LOSSLESS), peft.eval())

    def prompts(self, *lengths: int, **options: Any) -> dict[str, Tensor]:
        return prompts(self.architecture, lengths, **options)

    def check(self, inputs: dict[str, Tensor], *adapters: str) -> None:
        """Generate with the adapter of every prompt and compare with PEFT, which runs the batch once per adapter."""
        tokens, logits = greedy(self.ours, inputs, NEW_TOKENS, adapter_names=list(adapters), pad_token_id=PAD)
        assert torch.isfinite(logits).all()
        for row, name in enumerate(adapters):
            self.peft.set_adapter(name)
            expected_tokens, expected_logits = greedy(self.peft, inputs, NEW_TOKENS, pad_token_id=PAD)
            with self.peft.disable_adapter():
                base_logits = greedy(self.peft, inputs, 1)[1]
            difference = (expected_logits[row, 0] - base_logits[row, 0]).abs().max()
            assert difference > 0.3, "the adapter is too weak to prove anything"
            assert (logits[row] - expected_logits[row]).abs().max() < TOLERANCE
            assert torch.equal(tokens[row], expected_tokens[row])


JOINS_SEQUENCES = {
    "jetmoe": "its router sees the batch without its rows",
}
"""Architectures that cannot run two adapters in a batch, and why."""


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair.of(request.param)


def test_a_short_prompt_matches_peft(pair: Pair) -> None:
    pair.check(pair.prompts(12), "first")


def test_a_long_prompt_matches_peft(pair: Pair) -> None:
    pair.check(pair.prompts(700), "first")


def test_a_padded_batch_of_two_adapters_matches_peft(pair: Pair) -> None:
    if pair.architecture in JOINS_SEQUENCES:
        with pytest.raises(EngineError, match="one adapter per batch"):
            pair.check(pair.prompts(7, 12), "first", "second")
    else:
        pair.check(pair.prompts(7, 12), "first", "second")


@torch.no_grad()
def test_the_head_sees_only_the_tokens_whose_predictions_are_scored(pair: Pair) -> None:
    ids = pair.prompts(12, 12, images=False)["input_ids"]
    scored = torch.zeros_like(ids, dtype=torch.bool)
    scored[0, 3:5] = scored[1, -1] = True
    expected = at_full_rank(pair.ours, ids, "first")[scored]
    seen: list[Tensor] = []
    head = pair.ours.base.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    found = at_full_rank(pair.ours, ids, "first", scored)
    hook.remove()
    assert [len(x.flatten(0, -2)) for x in seen] == [3]
    assert (found - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("architecture", IMAGES)
def test_an_image_text_model_without_images_matches_peft(architecture: str) -> None:
    pair = Pair.of(architecture)
    pair.check(pair.prompts(12, images=False), "first")
    pair.check(pair.prompts(700, images=False), "first")


@pytest.mark.parametrize("architecture", IMAGES)
def test_an_adapter_of_language_model_and_vision_tower_matches_peft(architecture: str) -> None:
    pair = Pair.of(architecture, targets="all-linear")
    pair.check(pair.prompts(12), "first")


@pytest.mark.parametrize("architecture", IMAGES)
def test_adapters_of_the_vision_tower_in_one_batch_are_right_or_refused(architecture: str) -> None:
    pair = Pair.of(architecture, targets="all-linear")
    with suppress(EngineError):
        pair.check(pair.prompts(7, 12), "first", "second")


# KV policies


DROPS = ChunkWiseConfig(
    chunking=ChunkingConfig(min_length=2, max_length=4, thresholds=()),
    selection=SelectionConfig(rank_shares=(1.0,), scales=(1.0,)),
    composition=CompositionConfig(window=0),
    kv_cache=KVCacheConfig(levels=(LevelKVPolicy(max_age=6),), sinks=2),
)
"""Full rank, so that PEFT is the reference, and short chunks that are dropped soon."""


def plain_layers(cache: Cache) -> list[DynamicLayer]:
    return [layer for layer in cache.layers if type(layer) is DynamicLayer]


def masked_generation(pair: Pair, ids: Tensor, new_tokens: int) -> Tensor:
    """Logits (new, vocabulary) of greedy generation by PEFT, whose cache keeps all tokens, under a mask of the kept."""
    model = pair.peft.get_base_model()
    ladder = RankLadder.of_adapter(plain_adapter(pair.ours.model, "first"))
    scheduler = RuntimeScheduler(DROPS, ladder.rung_ranks, VOCABULARY)
    cache = DynamicCache(config=model.config)
    kept, new, logits = torch.zeros(0, dtype=torch.bool), ids, []
    for _ in range(new_tokens):
        decisions = scheduler.step(new.tolist(), [None] * len(new)).decisions
        positions = torch.arange(len(kept), len(kept) + len(new))[None]
        kept = torch.cat([kept, torch.ones(len(new), dtype=torch.bool)])
        mask: Any = None
        if not kept.all():
            mask = torch.where(kept, 0.0, torch.finfo(torch.float32).min)[None, None, None]
            mask = {"full_attention": mask, "sliding_attention": None} if any(cache.is_sliding) else mask
        output = model(input_ids=new[None], attention_mask=mask, position_ids=positions, **{versions.CACHE: cache})
        for decision in decisions:
            kept[decision.start : decision.end] &= decision.action != "drop"
        logits.append(output.logits[0, -1])
        new = logits[-1].argmax()[None]
    assert not kept.all(), "nothing was dropped, so nothing was tested"
    return torch.stack(logits)


def test_a_kv_policy_has_the_effect_of_a_mask_or_none_and_says_so(pair: Pair) -> None:
    inputs = pair.prompts(12, images=False)
    _, logits = greedy(pair.ours, inputs, 20, chunkwise_config=DROPS, adapter_names="first", pad_token_id=PAD)
    assert pair.ours.trace is not None
    notes = pair.ours.trace.kv_notes
    windows_only = not plain_layers(DynamicCache(config=pair.peft.config))
    pair.peft.set_adapter("first")
    if (notes and windows_only) or any("not carried out" in note for note in notes):
        expected = greedy(pair.peft, inputs, 20, pad_token_id=PAD)[1][0]
    else:
        with torch.no_grad():
            expected = masked_generation(pair, inputs["input_ids"][0], 20)
    assert (logits[0] - expected).abs().max() < TOLERANCE


def test_slots_may_be_reordered_where_the_traits_say_so(pair: Pair) -> None:
    model = pair.peft.get_base_model()
    if not ModelTraits.of(model).carries_out_kv:
        pytest.skip("KV decisions are not carried out in this model")
    length = 40
    ids = pair.prompts(length, images=False)["input_ids"]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, position_ids=torch.arange(length)[None], **{versions.CACHE: cache})
        moved = copy.deepcopy(cache)
        order = torch.randperm(length)
        for layer in plain_layers(moved):
            layer.keys, layer.values = layer.keys[:, :, order], layer.values[:, :, order]
        step = {"input_ids": ids[:, :1], "position_ids": torch.tensor([[length]])}
        step["attention_mask"] = torch.ones(1, length + 1, dtype=torch.long)
        expected, logits = (model(**step, **{versions.CACHE: held}).logits for held in (cache, moved))
    assert (logits - expected).abs().max() < TOLERANCE
