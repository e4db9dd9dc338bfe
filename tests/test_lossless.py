"""The `lossless` preset generates the tokens of unmerged PEFT, with every option of `generate`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TextGenerationPipeline
from transformers.generation.streamers import BaseStreamer

from chunkwise_lora import ChunkWiseConfig, ChunkWiseModel, RankLadder
from chunkwise_lora.engines.transformers import FastPaths
from models import ADAPTERS, FAST, PAD, TYPICAL, VOCABULARY, adapter, build, greedy, peft_model, prompts

LOSSLESS = ChunkWiseConfig.preset("lossless")
TOLERANCE = 1e-4
NEW_TOKENS = 64


def attached(
    architecture: str = "llama", kind: str = "plain", fast: FastPaths | None = None, **changes: Any
) -> ChunkWiseModel:
    return ChunkWiseModel(build(architecture, **changes), adapter(architecture, kind), LOSSLESS, fast)


def assert_same_generation(model: ChunkWiseModel, reference: Any, base: Any, inputs: dict[str, Tensor]) -> None:
    tokens, logits = greedy(model, inputs, NEW_TOKENS)
    expected_tokens, expected_logits = greedy(reference, inputs, NEW_TOKENS)
    _, base_logits = greedy(base, inputs, 1)
    assert (base_logits[:, 0] - expected_logits[:, 0]).abs().max() > 0.5, "the adapter is too weak to prove anything"
    assert torch.equal(tokens, expected_tokens)
    assert (logits - expected_logits).abs().max() < TOLERANCE


@pytest.mark.parametrize("fast", FAST)
@pytest.mark.parametrize("architecture", TYPICAL)
def test_lossless_matches_peft(architecture: str, fast: str) -> None:
    assert_same_generation(
        attached(architecture, fast=FAST[fast]), peft_model(architecture), build(architecture), prompts()
    )


@pytest.mark.parametrize("kind", ADAPTERS)
def test_lossless_matches_peft_for_adapter(kind: str) -> None:
    assert_same_generation(attached("llama", kind), peft_model("llama", kind), build("llama"), prompts())


@pytest.mark.parametrize("kind", ["lm_head", "tied_embedding"])
def test_lossless_matches_peft_where_the_head_has_a_bias_and_the_weights_of_the_embedding(kind: str) -> None:
    assert_same_generation(attached("phi", kind), peft_model("phi", kind), build("phi"), prompts())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_forward_pass_matches_peft(architecture: str) -> None:
    inputs = prompts()
    expected = peft_model(architecture)(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert (attached(architecture)(**inputs).logits - expected)[real].abs().max() < TOLERANCE


def test_lossless_bfloat16_is_as_close_to_float32_as_peft_is() -> None:
    inputs = prompts((24,))
    exact = peft_model("llama")(**inputs).logits
    peft = (peft_model("llama").bfloat16()(**inputs).logits.float() - exact).abs().mean()
    model = ChunkWiseModel(build("llama").bfloat16(), adapter("llama"), LOSSLESS)
    ours = (model(**inputs).logits.float() - exact).abs().mean()
    assert 0 < ours < 1.5 * peft


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 4},
        {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5},
        {"use_cache": False},
        {"prefill_chunk_size": 4},
        {"repetition_penalty": 1.3},
        {"eos_token_id": list(range(2, 12)), "pad_token_id": PAD},
        {"min_new_tokens": 8, "eos_token_id": list(range(2, 40)), "pad_token_id": PAD},
    ],
    ids=",".join,
)
def test_generation_option_gives_the_tokens_of_peft(options: dict[str, Any]) -> None:
    inputs = prompts()
    if "prefill_chunk_size" in options:
        inputs = prompts((16, 16))  # some releases of transformers refuse to chunk a prefill with padding
    options = {"max_new_tokens": 24, "do_sample": False, **options}
    outputs = []
    for model in (attached(), peft_model("llama")):
        torch.manual_seed(7)
        outputs.append(model.generate(**inputs, **options))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("masked", [True, False], ids=["with a mask", "without a mask"])
def test_padding_has_the_meaning_it_has_in_transformers(side: str, masked: bool) -> None:
    inputs = {name: tensor if side == "left" else tensor.flip(1) for name, tensor in prompts().items()}
    if not masked:
        inputs.pop("attention_mask")
    tokens, logits = greedy(attached(), inputs, 16)
    expected_tokens, expected_logits = greedy(peft_model("llama"), inputs, 16)
    assert torch.equal(tokens, expected_tokens)
    assert (logits - expected_logits).abs().max() < TOLERANCE


def test_a_streamer_gets_every_token_in_order() -> None:
    class Collector(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    streamer, inputs = Collector(), prompts((6,))
    output = attached().generate(**inputs, max_new_tokens=12, do_sample=False, streamer=streamer)
    assert streamer.tokens == output[0].tolist()
    assert streamer.ended


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("preset", ["lossless", "balanced"])
def test_adapters_of_one_batch_do_not_change_each_other(architecture: str, preset: str) -> None:
    config = ChunkWiseConfig.preset(preset)
    folders = {"first": adapter(architecture), "second": adapter(architecture, seed=2)}
    names = ["second", "__base__", "first", "second"]
    inputs = prompts((6, 6, 6, 6))
    model = ChunkWiseModel(build(architecture), folders, config)
    tokens, logits = greedy(model, inputs, 16, adapter_names=names)
    assert model.trace is not None
    ranks = [sequence.ranks for sequence in model.trace.sequences]
    for row, name in enumerate(names):
        alone = {key: value[row : row + 1] for key, value in inputs.items()}
        expected_tokens, expected_logits = greedy(model, alone, 16, adapter_names=name)
        assert torch.equal(tokens[row : row + 1], expected_tokens)
        assert (logits[row : row + 1] - expected_logits).abs().max() < (TOLERANCE if preset == "lossless" else 0.05)
        assert ranks[row] == pytest.approx(model.trace.sequences[0].ranks)
    assert len({tuple(row) for row in tokens.tolist()}) == len(names)


def test_an_adapter_that_replaces_the_head_does_not_change_other_sequences() -> None:
    folders = {"plain": adapter("llama"), "head": adapter("llama", "saved_head")}
    model = ChunkWiseModel(build("llama"), folders, LOSSLESS)
    inputs = prompts()
    _, logits = greedy(model, inputs, 8, adapter_names=["head", "__base__", "plain"])
    references = peft_model("llama", "saved_head"), build("llama"), peft_model("llama")
    for row, reference in enumerate(references):
        assert (logits[row] - greedy(reference, inputs, 8)[1][row]).abs().max() < TOLERANCE


def test_the_base_name_runs_the_base_model() -> None:
    inputs = prompts()
    tokens, logits = greedy(attached(fast=FAST["no fast path"]), inputs, 16, adapter_names="__base__")
    expected_tokens, expected_logits = greedy(build("llama"), inputs, 16)
    assert torch.equal(tokens, expected_tokens)
    assert (logits - expected_logits).abs().max() < 1e-5


def test_a_ladder_from_disk_is_as_lossless_as_the_adapter(tmp_path: Any) -> None:
    RankLadder.from_peft(adapter("llama")).save_pretrained(tmp_path)
    model = ChunkWiseModel(build("llama"), tmp_path, LOSSLESS)
    assert torch.equal(greedy(model, prompts(), 16)[0], greedy(peft_model("llama"), prompts(), 16)[0])


def test_generate_on_the_attached_model_itself_runs_the_ladder() -> None:
    model = attached()
    expected = greedy(peft_model("llama"), prompts(), 16)[0]
    assert torch.equal(greedy(model.model, prompts(), 16)[0], expected)


def test_a_pipeline_over_the_attached_model_runs_the_ladder() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", padding_side="left")
    ids = prompts((6,))["input_ids"]
    text = " ".join(f"w{i}" for i in ids[0].tolist())
    pipeline = TextGenerationPipeline(model=attached().model, tokenizer=tokenizer)
    answer = pipeline(text, max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"]
    expected = greedy(peft_model("llama"), prompts((6,)), 8)[0][0].tolist()
    assert answer.split() == [f"w{i}" for i in expected]


def test_lossless_keeps_every_direction_and_every_byte() -> None:
    model = attached()
    model.generate(**prompts(), max_new_tokens=8, do_sample=False)
    trace = model.trace
    assert trace is not None
    assert trace.kv_bytes == trace.kv_bytes_full, "so few tokens get no room for more"
    full = model.ladders["default"].rung_ranks[-1]
    assert [len(sequence.ranks) for sequence in trace.sequences] == [5 + 7, 11 + 7, 8 + 7]
    assert [sequence.mean_rank for sequence in trace.sequences] == pytest.approx([full] * 3)
