"""Decode steps by tables, as CUDA graphs run them, equal the steps of the usual way.

Without a GPU a graph is stood for by the call that would be captured: it always runs on the cache, the plan and the
inputs of the step that was captured, and must nevertheless compute what the tables say.
"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import local
from typing import Any

import pytest
import torch
from torch import Tensor

from chunkwise_lora import ChunkWiseConfig, ChunkWiseModel

pytest.importorskip("triton", reason="Triton is not installed")

import gpu_stand_in
from chunkwise_lora.engines.transformers import FastPaths, steps
from chunkwise_lora.method.config import KVCacheConfig, LevelKVPolicy
from models import adapter, build, greedy, prompts

GPU = torch.cuda.is_available()
SLOW = FastPaths(kernels=False, products=False)
NEW_TOKENS = 12
KV = ChunkWiseConfig.preset("balanced").model_copy(
    update={
        "kv_cache": KVCacheConfig(
            levels=(
                LevelKVPolicy(precision="int8", max_age=12),
                LevelKVPolicy(precision="int8", duplicate_similarity=0.9),
                LevelKVPolicy(precision="int8"),
            ),
            int8_head_share=0.5,
            sinks=1,
        )
    }
)
"""Moves and drops slots, and keeps some heads of the cold pool in full precision."""
CONFIGS = {"lossless": ChunkWiseConfig.preset("lossless"), "balanced": ChunkWiseConfig.preset("balanced"), "KV": KV}


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> dict[str, int]:
    """Let a CPU stand for a GPU; counts the steps that were computed and those that were replayed."""
    found = {"computed": 0, "replayed": 0}
    compute = steps.Step.compute

    def count(self: steps.Step, *given: Any) -> Any:
        found["computed"] += 1
        return compute(self, *given)

    def record(run: Any, device: torch.device) -> Any:
        def replay() -> None:
            found["replayed"] += 1
            run()

        return replay

    monkeypatch.setattr(steps.Step, "compute", count)
    if not GPU:
        gpu_stand_in.install(monkeypatch, kernels=request.param if hasattr(request, "param") else True)
        monkeypatch.setattr(steps, "record", record)
    return found


def on_device(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("cuda" if GPU else "cpu") for name, tensor in inputs.items()}


def attached(config: ChunkWiseConfig, fast: FastPaths | None = None, architecture: str = "llama") -> ChunkWiseModel:
    base = build(architecture).to("cuda" if GPU else "cpu")
    folders = {"a": adapter(architecture), "b": adapter(architecture, "wide", seed=2)}
    return ChunkWiseModel(base, folders, config, fast)


def expected(config: ChunkWiseConfig, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    return greedy(attached(config, SLOW), inputs, NEW_TOKENS, **options)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("lengths", [(5,), (30, 11, 8)], ids=["one sequence", "padding"])
def test_steps_compute_what_pytorch_computes(config: str, lengths: tuple[int, ...], counts: dict[str, int]) -> None:
    inputs = on_device(prompts(lengths))
    names = {"adapter_names": ["b", "__base__", "a"][: len(lengths)]}
    tokens, logits = expected(CONFIGS[config], inputs, **names)
    assert not counts["computed"]
    model = attached(CONFIGS[config])
    for _ in range(2):  # the second call replays the steps of the first one
        ours, our_logits = greedy(model, inputs, NEW_TOKENS, **names)
        assert torch.equal(ours, tokens)
        assert (our_logits - logits).abs().max() < 2e-3
    steps_of_both = 2 * (NEW_TOKENS - 1)
    assert counts["computed"] >= 2 and (GPU or counts["replayed"] >= steps_of_both - 2)


@pytest.mark.parametrize("counts", [False], indirect=True, ids=["Triton"])
def test_the_kernels_themselves_run_a_step(counts: dict[str, int]) -> None:
    config = CONFIGS["KV"]
    inputs = on_device(prompts((40,)))
    follow = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    logits = [
        torch.stack(attached(config, fast).generate(**inputs, adapter_names="a", **follow).logits)
        for fast in (SLOW, None)
    ]
    assert (logits[0] - logits[1]).abs().max() < 2e-3
    assert counts["computed"] >= 2


def test_a_graph_serves_another_adapter_another_plan_and_another_cache(counts: dict[str, int]) -> None:
    model = attached(CONFIGS["lossless"])
    inputs = on_device(prompts((9,)))
    greedy(model, inputs, 6, adapter_names="a")
    replayed = counts["replayed"]
    for name, config in (("b", "lossless"), ("a", "KV")):
        options = {"adapter_names": name, "chunkwise_config": CONFIGS[config]}
        tokens, logits = expected(CONFIGS[config], inputs, adapter_names=name)
        ours, our_logits = greedy(model, inputs, NEW_TOKENS, **options)
        assert torch.equal(ours, tokens) and (our_logits - logits).abs().max() < 2e-3
    assert GPU or counts["replayed"] >= replayed + NEW_TOKENS - 1


def test_a_loaded_adapter_that_needs_larger_tables_gets_new_graphs(counts: dict[str, int]) -> None:
    model = attached(CONFIGS["lossless"])
    inputs = on_device(prompts((9,)))
    greedy(model, inputs, 6, adapter_names="a")
    model.load_adapter(str(adapter("llama", "wide", seed=5)), "c")
    model.load_adapter(str(adapter("llama", "patterns")), "d")
    for name in ("c", "d", "a"):
        with ChunkWiseModel(build("llama").to(inputs["input_ids"].device), model.ladders[name], fast=SLOW) as slow:
            tokens, _ = greedy(slow, inputs, NEW_TOKENS)
        assert torch.equal(greedy(model, inputs, NEW_TOKENS, adapter_names=name)[0], tokens)


def test_a_loop_by_hand_continues_copies_and_crops_its_cache(counts: dict[str, int]) -> None:
    inputs = on_device(prompts((7, 7)))["input_ids"]
    texts = []
    for fast in (SLOW, None):
        model = attached(CONFIGS["lossless"], fast)
        with torch.inference_mode():
            output, text = model(inputs, use_cache=True), []
            for turn in range(8):
                token = output.logits[:, -1].argmax(-1, keepdim=True)
                text.append(token)
                output = model(token, past_key_values=output.past_key_values, use_cache=True)
                if turn == 5:
                    other = copy.deepcopy(output.past_key_values)
                    output.past_key_values.crop(-3)
        fork = model(token, past_key_values=other, use_cache=True).logits
        texts.append((torch.cat(text, 1), fork))
    assert torch.equal(texts[0][0], texts[1][0])
    assert (texts[0][1] - texts[1][1]).abs().max() < 1e-3
    assert counts["computed"] and (GPU or counts["replayed"])


def test_calls_in_and_outside_of_inference_mode_share_what_lies_on_the_device(counts: dict[str, int]) -> None:
    inputs, config = on_device(prompts((9,))), CONFIGS["balanced"]
    with torch.inference_mode():
        model = attached(config)
        tokens, _ = greedy(model, inputs, NEW_TOKENS, adapter_names="a")
    for number in range(9):
        model.load_adapter(str(adapter("llama", seed=7)), f"another{number}")
    assert torch.equal(greedy(model, inputs, NEW_TOKENS, adapter_names="a")[0], tokens)
    assert counts["computed"]
    ours = greedy(model, inputs, NEW_TOKENS, adapter_names="another8")[0]
    slow = ChunkWiseModel(build("llama").to(ours.device), adapter("llama", seed=7), config, SLOW)
    assert torch.equal(ours, greedy(slow, inputs, NEW_TOKENS)[0])


def test_threads_do_not_share_a_step(counts: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    running, results = local(), steps.DecodeSteps._results

    def note(self: steps.DecodeSteps, step: steps.Step, compute: Any) -> Any:
        running.step, running.compute = step, compute
        return results(self, step, compute)

    def replay() -> None:  # a graph does not touch the cache of another thread, as `record` of `counts` would
        running.step.captured = running.compute()

    if not GPU:
        monkeypatch.setattr(steps.DecodeSteps, "_results", note)
        monkeypatch.setattr(steps, "record", lambda run, device: replay)
    inputs, names = on_device(prompts((9,))), ["a", "b", "__base__"]
    wanted = {name: expected(CONFIGS["balanced"], inputs, adapter_names=name)[0] for name in set(names)}
    model = attached(CONFIGS["balanced"])
    with ThreadPoolExecutor(len(names)) as threads:
        run = partial(greedy, model, inputs, NEW_TOKENS)
        found = [threads.submit(run, adapter_names=name) for name in names for _ in range(2)]
    for name, one in zip([name for name in names for _ in range(2)], found, strict=True):
        assert torch.equal(one.result()[0], wanted[name])
    assert counts["computed"]


def test_logits_of_a_step_do_not_change_with_later_steps(counts: dict[str, int]) -> None:
    model = attached(CONFIGS["lossless"])
    output = model(on_device(prompts((7,)))["input_ids"], use_cache=True)
    kept = []
    for _ in range(6):
        token = output.logits[:, -1].argmax(-1, keepdim=True)
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
        kept.append((output.logits, output.logits.clone()))
    assert all(torch.equal(logits, before) for logits, before in kept)


@pytest.mark.parametrize(
    "change", ["weights in place", "another parameter", "another module", "a merge", "float64 and back", "a forward"]
)
def test_a_model_that_has_changed_gets_new_graphs(change: str, counts: dict[str, int]) -> None:
    inputs, models = on_device(prompts((9,))), [attached(CONFIGS["lossless"], fast) for fast in (SLOW, None)]
    for model in models:
        greedy(model, inputs, 6, adapter_names="a")
    computed = counts["computed"]
    for model in models:
        layer = model.base.model.layers[0].mlp
        weight = layer.gate_proj.base_layer.weight
        torch.manual_seed(1)
        other = weight.detach() + 0.3 * torch.randn_like(weight)
        if change == "weights in place":
            weight.data = other
        elif change == "another parameter":
            layer.gate_proj.base_layer.weight = torch.nn.Parameter(other, requires_grad=False)
        elif change == "another module":
            layer.act_fn = torch.nn.ReLU()
        elif change == "a merge":
            model.merge_adapter(["b"])
            model.unmerge_adapter()
        elif change == "a forward":
            layer.act_fn.forward = torch.relu
        else:
            model.double()
            model.float()
    (slow, _), (ours, _) = (greedy(model, inputs, NEW_TOKENS, adapter_names="a") for model in models)
    assert torch.equal(slow, ours)
    assert counts["computed"] >= computed + 2, "computed, then captured"


def test_hooks_inside_of_the_model_run_in_every_step(counts: dict[str, int]) -> None:
    model, inputs, seen = attached(CONFIGS["lossless"]), on_device(prompts((9,))), list[int]()
    greedy(model, inputs, 6)
    computed = counts["computed"]
    handle = model.base.model.layers[0].mlp.register_forward_hook(lambda *given: seen.append(1))
    greedy(model, inputs, 6)
    assert len(seen) == 6 and counts["computed"] == computed
    handle.remove()
    greedy(model, inputs, 6)
    assert len(seen) == 6 and (GPU or counts["computed"] > computed)


@pytest.mark.parametrize(
    "refusal", ["hidden states", "gradients", "several tokens", "switched off", "a replaced head", "autocast"]
)
def test_other_passes_run_as_usual(refusal: str, counts: dict[str, int]) -> None:
    kind = FastPaths(graphs=False) if refusal == "switched off" else None
    inputs = on_device(prompts((9,)))
    if refusal == "a replaced head":
        model = ChunkWiseModel(build("llama").to(inputs["input_ids"].device), adapter("llama", "saved_head"))
    else:
        model = attached(CONFIGS["lossless"], kind)
    options = {"output_hidden_states": True} if refusal == "hidden states" else {}
    if refusal == "several tokens":
        cache = model(inputs["input_ids"], use_cache=True).past_key_values
        model(inputs["input_ids"][:, :2], past_key_values=cache, use_cache=True)
    elif refusal == "gradients":
        model(inputs["input_ids"], use_cache=False)
    else:
        with torch.autocast(inputs["input_ids"].device.type, enabled=refusal == "autocast", dtype=torch.bfloat16):
            greedy(model, inputs, 5, **options)
    assert not counts["computed"]


def test_a_step_that_the_model_refuses_runs_as_usual_with_nothing_lost(
    counts: dict[str, int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = on_device(prompts((9, 4)))
    tokens, logits = expected(CONFIGS["KV"], inputs, adapter_names="a")
    model = attached(CONFIGS["KV"])
    layer = model.base.model.layers[1].self_attn
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda **given: forward(**given | {"attention_mask": _copy(given)}))
    ours, our_logits = greedy(model, inputs, NEW_TOKENS, adapter_names="a")
    assert torch.equal(ours, tokens) and (our_logits - logits).abs().max() < 2e-3
    assert counts["computed"] == 1 and "mask of its own" in caplog.text


def _copy(given: dict[str, Any]) -> Tensor | None:
    mask = given["attention_mask"]
    return None if mask is None else mask.clone()


@pytest.mark.skipif(GPU, reason="it stands for a graph")
def test_a_model_that_hides_a_number_of_the_step_gets_no_graph(
    counts: dict[str, int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def record(run: Any, device: torch.device) -> Any:
        calls = []

        def replay() -> None:
            run()
            captured = steps_taken[-1].captured
            steps_taken[-1].captured = (captured[0] + len(calls) + 1, captured[1])
            calls.append(1)

        return replay

    steps_taken: list[steps.Step] = []
    take = steps.DecodeSteps._take

    def remember(self: steps.DecodeSteps, *given: Any) -> steps.Step:
        steps_taken.append(take(self, *given))
        return steps_taken[-1]

    monkeypatch.setattr(steps, "record", record)
    monkeypatch.setattr(steps.DecodeSteps, "_take", remember)
    inputs = on_device(prompts((9,)))
    tokens, logits = expected(CONFIGS["lossless"], inputs, adapter_names="a")
    ours, our_logits = greedy(attached(CONFIGS["lossless"]), inputs, NEW_TOKENS, adapter_names="a")
    assert torch.equal(ours, tokens) and (our_logits - logits).abs().max() < 2e-3
    assert "a replay differs" in caplog.text


def test_a_model_that_cannot_be_captured_runs_without_graphs(
    counts: dict[str, int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def record(run: Any, device: torch.device) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(steps, "record", record)
    inputs = on_device(prompts((9,)))
    tokens, _ = expected(CONFIGS["lossless"], inputs, adapter_names="a")
    assert torch.equal(greedy(attached(CONFIGS["lossless"]), inputs, NEW_TOKENS, adapter_names="a")[0], tokens)
    assert "cannot be captured" in caplog.text
