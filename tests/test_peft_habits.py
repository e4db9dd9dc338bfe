"""A `PeftModel` keeps its habits while it runs by plan, and adapters that are more than plain LoRA run in PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from chunkwise_lora import ChunkWiseConfig, ChunkWiseModel, EngineError, RankLadder
from models import adapter, build, greedy, peft_model, prompts

LOSSLESS = ChunkWiseConfig.preset("lossless")
BALANCED = ChunkWiseConfig.preset("balanced")


def two_in_peft() -> PeftModel:
    model = PeftModel.from_pretrained(build("llama"), str(adapter("llama")), adapter_name="a")
    model.load_adapter(str(adapter("llama", seed=2)), "b")
    return model.eval()


def other_kind(**options: Any) -> Callable[[], PeftModel]:
    """Makes a model with an adapter that is more than plain LoRA."""

    def make(seed: int = 1) -> PeftModel:
        architecture = options.get("architecture", "llama")
        settings = {key: value for key, value in options.items() if key != "architecture"}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = LoraConfig(r=8, lora_alpha=16, init_lora_weights=False, **settings)
            model = get_peft_model(build(architecture), config)
            for name, parameter in model.named_parameters():
                if (
                    "modules_to_save" in name
                    or "trainable_tokens" in name
                    or (parameter.requires_grad and "bias" in name)
                ):
                    parameter.data += 0.1 * torch.randn_like(parameter)
        return model.eval()

    return make


LINEAR = ["q_proj", "v_proj", "down_proj"]
OTHER_KINDS = {
    "dora": other_kind(target_modules=LINEAR, use_dora=True),
    "embedding": other_kind(target_modules=[*LINEAR, "embed_tokens"]),
    "embedding only": other_kind(target_modules=["embed_tokens"]),
    "tokens": other_kind(target_modules=LINEAR, trainable_token_indices=[3, 5, 8]),
    "bias on lora_B": other_kind(architecture="gpt2", target_modules=["c_attn", "c_fc"], lora_bias=True),
    "all biases": other_kind(architecture="gpt2", target_modules=["c_attn", "c_fc"], bias="all"),
    "experts": other_kind(
        architecture="qwen3_moe",
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    ),
    "router": other_kind(architecture="qwen3_moe", target_modules=["q_proj"], modules_to_save=["gate"]),
    "positions": other_kind(architecture="gpt2", target_modules=["c_attn"], modules_to_save=["wpe"]),
    "saved mlp": other_kind(target_modules=["q_proj"], modules_to_save=["mlp"]),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_what_is_not_plain_lora_runs_as_in_peft(kind: str) -> None:
    expected = greedy(OTHER_KINDS[kind](), prompts(), 12)
    model = OTHER_KINDS[kind]()
    chunkwise = ChunkWiseModel(model, config=LOSSLESS)
    tokens, logits = greedy(model, prompts(), 12)
    assert torch.equal(tokens, expected[0])
    assert (logits - expected[1]).abs().max() < 1e-4
    assert chunkwise.trace is not None and chunkwise.trace.passes == 12
    assert chunkwise.trace.notes and "runs in PEFT at full rank" in chunkwise.trace.notes[0]


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_what_is_not_plain_lora_may_share_a_batch(kind: str, tmp_path: Path) -> None:
    if kind in ("experts", "saved mlp", "all biases"):
        pytest.skip("PEFT cannot hold this adapter beside LoRA on the same modules")
    make = OTHER_KINDS[kind]
    architecture = make().config.model_type
    make().save_pretrained(str(tmp_path))
    model = PeftModel.from_pretrained(build(architecture), str(adapter(architecture)), adapter_name="plain").eval()
    chunkwise = ChunkWiseModel(model, config=LOSSLESS)
    chunkwise.load_adapter(tmp_path, "other")
    names = ["other", "plain", "__base__"]
    logits = greedy(chunkwise, prompts(), 8, adapter_names=names)[1]
    references = [make(), peft_model(architecture), build(architecture)]
    for row, reference in enumerate(references):
        assert (logits[row] - greedy(reference, prompts(), 8)[1][row]).abs().max() < 1e-4


def test_trained_biases_leave_the_base_with_the_adapter(tmp_path: Path) -> None:
    OTHER_KINDS["all biases"]().save_pretrained(str(tmp_path))
    base = build("gpt2")
    tensors = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    chunkwise = ChunkWiseModel(base, tmp_path, LOSSLESS)
    expected = greedy(chunkwise, prompts(), 4)[1]
    assert (expected - greedy(OTHER_KINDS["all biases"](), prompts(), 4)[1]).abs().max() < 1e-4
    chunkwise.detach()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in base.state_dict().items())
    assert torch.equal(greedy(chunkwise.attach(), prompts(), 4)[1], expected)


def test_the_adapter_of_a_call_is_that_of_peft() -> None:
    model = two_in_peft()
    expected = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        expected[name] = greedy(model, prompts(), 8)[1]
    with model.disable_adapter():
        expected["base"] = greedy(model, prompts(), 8)[1]
    with ChunkWiseModel(model, config=LOSSLESS) as chunkwise:
        for name in ("a", "b"):
            model.set_adapter(name)
            assert (greedy(model, prompts(), 8)[1] - expected[name]).abs().max() < 1e-4
            assert chunkwise.trace is not None and chunkwise.trace.sequences[0].adapter == name
        with model.disable_adapter():
            assert (greedy(model, prompts(), 8)[1] - expected["base"]).abs().max() < 1e-4
        mixed = greedy(model, prompts(), 8, adapter_names=["b", "__base__", "a"])[1]
        for row, name in enumerate(["b", "base", "a"]):
            assert (mixed[row] - expected[name][row]).abs().max() < 1e-4
        found = model(**prompts(), adapter_names=["b", "__base__", "a"]).logits
    forward = model(**prompts(), adapter_names=["b", "__base__", "a"]).logits
    assert (forward - found)[prompts()["attention_mask"].bool()].abs().max() < 1e-4


def test_several_active_adapters_run_in_peft() -> None:
    model = two_in_peft()
    model.base_model.set_adapter(["a", "b"])
    expected = greedy(model, prompts(), 8)[1]
    with ChunkWiseModel(model, config=BALANCED):
        assert (greedy(model, prompts(), 8)[1] - expected).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["plain", "saved_head", "dora", "embedding"])
def test_a_merged_adapter_is_not_added_again(kind: str) -> None:
    model = OTHER_KINDS[kind]() if kind in OTHER_KINDS else peft_model("llama", kind)
    expected = greedy(model, prompts(), 8)[1]
    with model.disable_adapter():
        base = greedy(model, prompts(), 8)[1]
    with ChunkWiseModel(model, config=LOSSLESS) as chunkwise:
        model.merge_adapter()
        assert (greedy(model, prompts(), 8)[1] - expected).abs().max() < 1e-3
        with torch.no_grad():
            last = chunkwise(**prompts()).logits[:, -1]
            assert (last - expected[:, 0]).abs().max() < 1e-3
        for name in ("default", "__base__"):
            with pytest.raises(EngineError, match=r"merged into the model's weights; call unmerge_adapter\(\)"):
                greedy(chunkwise, prompts(), 1, adapter_names=name)
        with model.disable_adapter():  # unmerges, as in PEFT
            assert (greedy(model, prompts(), 8)[1] - base).abs().max() < 1e-3
        model.merge_adapter()
        model.unmerge_adapter()
        assert (greedy(model, prompts(), 8)[1] - expected).abs().max() < 1e-3


def test_layers_with_different_active_adapters_run_in_peft() -> None:
    model = two_in_peft()
    next(module for module in model.modules() if isinstance(module, LoraLayer)).set_adapter("b")
    expected = greedy(model, prompts(), 8)[1]
    with ChunkWiseModel(model, config=BALANCED):
        assert (greedy(model, prompts(), 8)[1] - expected).abs().max() < 1e-4


def test_a_model_without_adapters_left_is_the_base_and_can_get_new_ones() -> None:
    chunkwise = ChunkWiseModel(two_in_peft(), config=LOSSLESS)
    for name in ("a", "b"):
        chunkwise.delete_adapter(name)
    inputs = prompts()
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        assert torch.equal(chunkwise(**inputs).logits[mask], build("llama")(**inputs).logits[mask])
        chunkwise.load_adapter(adapter("llama"), "a")
        expected = peft_model("llama")(**inputs).logits[mask]
        assert torch.allclose(chunkwise(**inputs, adapter_names="a").logits[mask], expected, atol=1e-4)


def test_replacing_an_adapter_changes_no_other_and_keeps_what_is_active() -> None:
    chunkwise = ChunkWiseModel(two_in_peft(), config=LOSSLESS)
    chunkwise.load_adapter(adapter("llama", seed=3), "b__0")
    expected = greedy(chunkwise, prompts(), 4, adapter_names="b__0")[1]
    chunkwise.model.base_model.set_adapter(["a", "b"])
    chunkwise.load_adapter(adapter("llama", seed=4), "b")
    assert chunkwise.model.base_model.active_adapters == ["a", "b"]
    assert [*chunkwise.ladders] == ["a", "b__0", "b"]
    assert torch.equal(greedy(chunkwise, prompts(), 4, adapter_names="b__0")[1], expected)


def test_adapters_added_by_peft_run_by_plan(tmp_path: Path) -> None:
    model, reference = two_in_peft(), two_in_peft()
    chunkwise = ChunkWiseModel(model, config=LOSSLESS)
    for one in (reference, model):
        one.add_weighted_adapter(["a", "b"], [0.7, 0.3], "sum", combination_type="cat")
        one.load_adapter(str(adapter("llama", "one_layer", seed=5)), "late")
        one.delete_adapter("b")
    assert list(chunkwise.ladders) == list(model.peft_config) == ["a", "sum", "late"]
    for name in ("sum", "late"):
        reference.set_adapter(name)
        expected = greedy(reference, prompts(), 8)[1]
        assert (greedy(chunkwise, prompts(), 8, adapter_names=name)[1] - expected).abs().max() < 1e-4
        model.save_pretrained(str(tmp_path))
        again = PeftModel.from_pretrained(build("llama"), str(tmp_path / name)).eval()
        assert (greedy(again, prompts(), 8)[1] - expected).abs().max() < 1e-4


def test_a_detached_peft_model_is_exactly_as_before() -> None:
    model = two_in_peft()
    before, attributes = greedy(model, prompts(), 8)[1], {id(one): dict(vars(one)) for one in model.modules()}
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with ChunkWiseModel(model, config=BALANCED):
        greedy(model, prompts(), 8)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(greedy(model, prompts(), 8)[1], before)
    for one in model.modules():
        assert set(vars(one)) == set(attributes[id(one)])
        assert vars(one).get("forward") is attributes[id(one)].get("forward")


@pytest.mark.parametrize("move", ["half", "double", "to"])
def test_moving_and_casting_returns_the_object_and_moves_everything(move: str) -> None:
    chunkwise = ChunkWiseModel(build("llama"), adapter("llama", "saved_head"), LOSSLESS)
    expected = chunkwise(**prompts()).logits
    moved = chunkwise.to(torch.bfloat16) if move == "to" else getattr(chunkwise, move)()
    assert moved is chunkwise is chunkwise.eval()
    dtype = {"half": torch.float16, "double": torch.float64, "to": torch.bfloat16}[move]
    assert {parameter.dtype for parameter in chunkwise.parameters()} == {dtype}
    logits = chunkwise(**prompts()).logits
    assert logits.dtype == dtype
    assert (logits - expected)[prompts()["attention_mask"].bool()].abs().max() < (1e-4 if move == "double" else 0.5)


def test_weights_that_were_trained_meanwhile_are_seen(caplog: pytest.LogCaptureFixture) -> None:
    chunkwise = ChunkWiseModel(build("llama"), RankLadder.from_peft(adapter("llama")), LOSSLESS)
    before = greedy(chunkwise, prompts(), 4)[1]
    layer = chunkwise.base.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(3.0)
    after = greedy(chunkwise, prompts(), 4)[1]
    assert (after - before).abs().max() > 0.1
    assert "no longer those of its ladder" in caplog.text
    model = chunkwise.model
    chunkwise.detach()
    chunkwise._runner._injection.put_in()
    assert (greedy(model, prompts(), 4)[1] - after).abs().max() < 1e-4


def test_weights_that_were_changed_through_data_are_seen() -> None:
    model = two_in_peft()
    chunkwise = ChunkWiseModel(model, config=LOSSLESS)
    before = greedy(model, prompts(), 2)[1]
    for name, parameter in model.named_parameters():
        if "lora_B.a" in name:
            parameter.data.mul_(2)  # which PyTorch does not count
    after = greedy(model, prompts(), 2)[1]
    chunkwise.detach()
    assert (after - before).abs().max() > 0.1
    assert (after - greedy(model, prompts(), 2)[1]).abs().max() < 1e-4


def test_gradients_are_never_recorded_without_the_adapters() -> None:
    chunkwise = ChunkWiseModel(two_in_peft(), config=BALANCED)
    with torch.no_grad():
        cache = chunkwise(**prompts((5,)), use_cache=True).past_key_values
    chunkwise.model.set_adapter("a")
    for name, parameter in chunkwise.model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    assert not chunkwise(**prompts(), adapter_names="b").logits.requires_grad
    with pytest.raises(EngineError, match="records no gradients"):
        chunkwise(input_ids=torch.tensor([[5]]), past_key_values=cache)
    chunkwise.train()
    with pytest.raises(EngineError, match="adapter_names cannot be given in training"):
        chunkwise.model(**prompts(), adapter_names=["a", "b", "a"])


@pytest.mark.parametrize("config", [LOSSLESS, BALANCED], ids=["lossless", "balanced"])
def test_gradients_of_inputs_are_those_of_peft_or_refused(config: ChunkWiseConfig) -> None:
    def gradient(model: Any, called: Any) -> Tensor:
        found: list[Tensor] = []

        def begin(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            found.append(output.detach().requires_grad_())
            return found[0]

        model.requires_grad_(False).get_input_embeddings().register_forward_hook(begin)
        called(**prompts((5,))).logits.sum().backward()
        assert found[0].grad is not None
        return found[0].grad

    plain, model = two_in_peft(), two_in_peft()
    chunkwise = ChunkWiseModel(model, config=config)
    if config is LOSSLESS:
        assert torch.allclose(gradient(model, chunkwise), gradient(plain, plain), rtol=1e-3, atol=1e-3)
    else:
        with pytest.raises(EngineError, match="gradients are recorded through a pass whose ranks depend"):
            gradient(model, chunkwise)


def test_training_runs_in_peft_with_its_gradients() -> None:
    def gradients(model: Any, called: Any) -> dict[str, Tensor]:
        model.train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        ids = prompts((9, 9))["input_ids"]
        called(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    reference = two_in_peft()
    expected = gradients(reference, reference)
    for checkpointing in (False, True):
        model = two_in_peft()
        chunkwise = ChunkWiseModel(model, config=BALANCED)
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        found = gradients(model, chunkwise)
        assert found.keys() == expected.keys()
        assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in found)


@pytest.mark.parametrize("trains_wrapper", [False, True])
def test_trainer_trains_and_peft_saves(tmp_path: Path, trains_wrapper: bool) -> None:
    class Texts(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 4

        def __getitem__(self, item: int) -> dict[str, Tensor]:
            ids = prompts((8,), seed=item)["input_ids"][0]
            return {"input_ids": ids, "labels": ids}

    pytest.importorskip("accelerate")
    model = get_peft_model(build("llama"), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with ChunkWiseModel(model, config=LOSSLESS) as chunkwise:
        before = chunkwise(**prompts()).logits
        options = t.TrainingArguments(
            str(tmp_path),
            save_strategy="no",
            max_steps=2,
            per_device_train_batch_size=2,
            report_to=[],
            learning_rate=0.1,
            use_cpu=True,
        )
        t.Trainer(chunkwise if trains_wrapper else model, options, train_dataset=Texts()).train()
        model.eval()
        with torch.no_grad():
            after = chunkwise(**prompts()).logits
        assert (after - before).abs().max() > 1e-3
        model.save_pretrained(str(tmp_path / "saved"))
    again = PeftModel.from_pretrained(build("llama"), str(tmp_path / "saved")).eval()
    assert (again(**prompts()).logits - after)[prompts()["attention_mask"].bool()].abs().max() < 1e-4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ChunkWiseModel(two_in_peft().get_base_model(), adapter("llama")),
            "already carries the LoRA adapters a, b",
        ),
        (
            lambda: ChunkWiseModel(_loaded_by_transformers(), adapter("llama")),
            "already carries the LoRA adapters default",
        ),
        (lambda: ChunkWiseModel(build("llama")), "has no adapters; give a ladder"),
        (
            lambda: ChunkWiseModel(nn.Linear(2, 2), adapter("llama")),
            "the model is a Linear; load one with AutoModelForCausalLM",
        ),
        (
            lambda: ChunkWiseModel(two_in_peft(), {"a": RankLadder.from_peft(adapter("llama", seed=3))}),
            "not that of the weights",
        ),
        (lambda: ChunkWiseModel(build("gpt2"), adapter("llama")), "GPT2LMHeadModel does not have; load the base model"),
        (lambda: ChunkWiseModel(build("llama", hidden_size=64), adapter("llama")), r"the model has \(64"),
    ],
)
def test_a_base_with_other_adapters_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        make()


def test_adapters_that_peft_cannot_hold_together_are_refused_by_name() -> None:
    with pytest.raises(
        EngineError, match=r"adapter .saved. does not fit.*it is the adapters lora that it conflicts with"
    ):
        ChunkWiseModel(build("llama"), {"lora": adapter("llama", "lm_head"), "saved": adapter("llama", "saved_head")})


def _loaded_by_transformers() -> Any:
    model = build("llama")
    model.load_adapter(str(adapter("llama")))
    return model


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda m: m.model.merge_and_unload(), r"merge_and_unload\(\) is not possible.*detach"),
        (lambda m: m.model.unload(), r"unload\(\) is not possible"),
        (lambda m: m.base.load_adapter("x"), "use ChunkWiseModel.load_adapter"),
    ],
)
def test_what_would_break_an_attached_model_is_refused(act: Callable[[ChunkWiseModel], Any], message: str) -> None:
    chunkwise = ChunkWiseModel(build("llama"), adapter("llama"), LOSSLESS)
    expected = greedy(chunkwise, prompts(), 4)[1]
    with pytest.raises(EngineError, match=message):
        act(chunkwise)
    assert torch.equal(greedy(chunkwise, prompts(), 4)[1], expected)


def test_an_adapter_applied_by_peft_over_an_attached_base_is_applied_once() -> None:
    base = build("llama")
    ChunkWiseModel(base, adapter("llama"), LOSSLESS)
    again = PeftModel.from_pretrained(base, str(adapter("llama"))).eval()
    assert torch.equal(greedy(again, prompts(), 8)[0], greedy(peft_model("llama"), prompts(), 8)[0])


def test_torch_compile_gives_the_same_answer() -> None:
    chunkwise = ChunkWiseModel(build("llama"), adapter("llama"), LOSSLESS)
    with torch.no_grad():
        expected = chunkwise(**prompts()).logits
        assert torch.allclose(torch.compile(chunkwise.base, backend="eager")(**prompts()).logits, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_model_runs_under_autocast(dtype: torch.dtype) -> None:
    model, plain = ChunkWiseModel(build("llama").half(), adapter("llama"), LOSSLESS), peft_model("llama").half()
    with torch.no_grad(), torch.autocast("cpu", dtype):
        found, expected = (one(**prompts((5,))).logits.float() for one in (model, plain))
    assert found.isfinite().all()
    assert (found - expected).norm() / expected.norm() < 0.05
