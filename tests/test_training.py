"""Nested training starts from the ladder, gates its rungs and removes its hooks; growing keeps the smaller adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from chunkwise_lora import ChunkWiseConfig, ConfigError, LadderError, RankLadder, RuntimeScheduler
from chunkwise_lora.calibration import CalibrationConfig
from chunkwise_lora.calibration.calibrate import calibrate
from chunkwise_lora.calibration.text import MIN_BLOCKS
from chunkwise_lora.method.config import (
    ChunkingConfig,
    ComplexityConfig,
    CompositionConfig,
    SelectionConfig,
)
from chunkwise_lora.training import GrowRank, NestedRank
from models import VOCABULARY, adapter, build, peft_model

POLICY = ChunkWiseConfig(
    chunking=ChunkingConfig(thresholds=(0.5, 0.7), min_length=1, hysteresis=0.0, memory=1.0),
    selection=SelectionConfig(rank_shares=(0.25, 0.5, 0.75)),
    composition=CompositionConfig(window=0),
)


class Texts(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(2, VOCABULARY, (40,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def new_model(rank: int = 8) -> PeftModel:
    model: PeftModel = get_peft_model(build("llama"), LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear"))
    return model


def train(
    model: PeftModel,
    callback: NestedRank | GrowRank | None,
    folder: Path,
    steps: int,
    rate: float = 1e-2,
    weight_decay: float = 0.0,
) -> None:
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=rate,
        weight_decay=weight_decay,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        seed=0,
        disable_tqdm=True,
    )
    options: dict[str, Any] = {"callbacks": [callback]} if callback else {}
    if isinstance(callback, NestedRank):
        options["compute_loss_func"] = callback.loss
    Trainer(model, arguments, train_dataset=Texts(), **options).train()


def begin(nested: NestedRank, model: PeftModel) -> None:
    model.train()
    nested.on_train_begin(None, type("State", (), {"global_step": 0})(), None, model=model)  # type: ignore[arg-type]


def test_training_starts_from_the_ladder_and_leaves_no_hooks(tmp_path: Path) -> None:
    model, ids = new_model(), torch.arange(2, 30)[None]
    train(model, NestedRank(RankLadder.from_peft(adapter("llama"))), tmp_path, 1, rate=0.0)
    with torch.no_grad():
        assert torch.allclose(model.eval()(ids).logits, peft_model("llama")(ids).logits, atol=1e-4)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_trained_adapter_is_its_own_teacher_and_needs_no_labels(tmp_path: Path) -> None:
    model, nested = new_model(), NestedRank(RankLadder.from_peft(adapter("llama")), full=1.0)
    begin(nested, model)
    ids = torch.randint(2, VOCABULARY, (3, 24))
    losses = [nested.loss(model(input_ids=ids), labels).item() for labels in (ids, ids.flip(1))]
    assert losses == pytest.approx([0, 0], abs=1e-5)  # full rank still equals the given ladder
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1.5)
    changed = model(input_ids=ids)
    now, before = changed["logits"].log_softmax(-1), peft_model("llama")(ids).logits.log_softmax(-1)
    divergence = (before.exp() * (before - now)).sum(-1)[:, :-1].mean()
    assert nested.loss(changed, ids).item() == pytest.approx(divergence.item(), rel=1e-3)
    summed_up = nested.loss(changed, ids, num_items_in_batch=2 * ids[:, 1:].numel()).item()
    assert summed_up == pytest.approx(divergence.item() / 2, rel=1e-3)


@pytest.mark.parametrize("ladder", [True, False])
def test_all_rungs_learn_the_mean_distribution_of_the_teachers(ladder: bool) -> None:
    teachers = [PeftModel.from_pretrained(build("llama"), str(adapter("llama", seed=seed))) for seed in (2, 3)]
    nested = NestedRank(RankLadder.from_peft(adapter("llama")) if ladder else None, teachers=teachers, full=0.5)
    model = new_model()
    begin(nested, model)
    ids = torch.randint(2, VOCABULARY, (6, 24))
    outputs = model(input_ids=ids)
    with torch.no_grad():
        said = sum(teacher(ids).logits.softmax(-1) for teacher in teachers)[:, :-1] / 2
        expected = (said * (said.log() - outputs["logits"][:, :-1].log_softmax(-1))).sum(-1).mean()
    for labels in (ids, ids.flip(1)):
        assert nested.loss(outputs, labels).item() == pytest.approx(expected.item(), rel=1e-3)


def test_sequences_run_on_the_policys_rungs_shifted_by_at_most_one() -> None:
    ladder, ids = RankLadder.from_peft(adapter("llama")), torch.randint(2, VOCABULARY, (16, 24))
    nested, model = NestedRank(ladder, policy=POLICY, lowest=0.0, full=0.25), new_model()
    begin(nested, model)
    model(input_ids=ids)
    planned = [RuntimeScheduler(POLICY, ladder.rung_ranks, VOCABULARY).step(row).weights for row in ids.tolist()]
    rungs = torch.from_numpy(np.stack(planned).argmax(2))
    moved = {step: (nested._rungs == (rungs + step).clamp(0, 7)).all(1) for step in (-1, 0, 1)}
    assert all(rows.any() for rows in moved.values())
    assert torch.stack([*moved.values()]).any(0)[nested._nested].all()
    assert (nested._rungs[~nested._nested] == 8).all() and 0 < nested._nested.sum() < 16
    learned = POLICY.model_copy(update={"complexity": ComplexityConfig(learned=True)})
    for impossible in ({"policy": POLICY}, {"policy": learned, "ladder": ladder}):
        with pytest.raises(ConfigError, match="fitted to"):
            NestedRank(**impossible)


@pytest.mark.parametrize("impossible", [{"lowest": 0.8, "highest": 0.5}, {"chunk": 0}, {"full": 1.5}])
def test_an_impossible_argument_is_refused(impossible: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"NestedRank needs"):
        NestedRank(**impossible)


def test_layers_are_gated_by_their_rung_and_only_in_training(tmp_path: Path) -> None:
    model, nested, seen = peft_model("llama"), NestedRank(chunk=8), []
    begin(nested, model)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    layer.lora_A["default"].register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    ids = torch.randint(2, VOCABULARY, (16, 24))
    model(input_ids=ids)
    open_gates = (seen[0] != 0).sum(-1)
    assert open_gates[~nested._nested].eq(8).all() and 0 < nested._nested.sum() < 16
    assert (open_gates[nested._nested] < 8).all() and (open_gates[nested._nested] >= 2).all()
    assert (open_gates.view(16, 3, 8) == open_gates.view(16, 3, 8)[..., :1]).all()
    model.eval()(input_ids=ids)
    assert (seen[1] != 0).all()


def test_nested_training_keeps_low_rungs_closer_to_full_rank_than_ordinary_training_does(tmp_path: Path) -> None:
    ladder, ids = RankLadder.from_peft(adapter("llama")), torch.stack([Texts()[i]["input_ids"] for i in range(8)])

    def distance(model: PeftModel) -> float:
        """KL divergence, in nats per token, of the first 4 directions of every layer from all 8."""
        logs = []
        for rank in (8, 4):
            hooks = [
                module.register_forward_hook(lambda m, a, out, rank=rank: out * (torch.arange(8) < rank))
                for name, module in model.named_modules()
                if name.endswith("lora_A.default")
            ]
            with torch.no_grad():
                logs.append(model.eval()(ids).logits.log_softmax(-1))
            for hook in hooks:
                hook.remove()
        return float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())

    ordinary, nested = new_model(), new_model()
    train(ordinary, NestedRank(ladder), tmp_path, 1, rate=0.0)  # copies the ladder's directions
    train(ordinary, None, tmp_path, 40)
    train(nested, NestedRank(ladder), tmp_path, 40)
    assert distance(nested) < 0.8 * distance(ordinary)


def test_the_trained_ladder_equals_the_trained_adapter_and_keeps_its_directions(tmp_path: Path) -> None:
    ladder = RankLadder.from_peft(adapter("llama"))
    model, nested = new_model(), NestedRank(ladder)
    train(model, nested, tmp_path / "run", 3)
    model.save_pretrained(tmp_path / "adapter")
    trained, again = nested.trained_ladder(), RankLadder.from_peft(tmp_path / "adapter")
    tokens = torch.randint(2, VOCABULARY, (MIN_BLOCKS * 24,)).tolist()
    config = CalibrationConfig(mean_rank=0.5, block=24, explorations=1, keep_directions=True)
    kept = calibrate(build("llama"), trained, tokens, config).ladder
    for name, module in trained.modules.items():
        theirs = again.modules[name]
        assert torch.allclose(module.up @ module.down, theirs.up @ theirs.down, atol=1e-5)
        assert not torch.allclose(module.down, ladder.modules[name].down, atol=1e-4)
        assert torch.equal(module.down, kept.modules[name].down) and module.ranks == kept.modules[name].ranks


def test_a_ladder_of_another_adapter_is_refused(tmp_path: Path) -> None:
    for kind in ("one_layer", "patterns"):
        with pytest.raises(LadderError):
            train(new_model(), NestedRank(RankLadder.from_peft(adapter("llama", kind))), tmp_path, 1)


def test_growing_keeps_the_smaller_adapter_unchanged(tmp_path: Path) -> None:
    model, smaller = new_model(rank=16), RankLadder.from_peft(adapter("llama"), as_trained=True)
    train(model, GrowRank(adapter("llama")), tmp_path / "run", 6, weight_decay=0.1)
    assert not any(parameter._backward_hooks for parameter in model.parameters())
    model.save_pretrained(tmp_path / "adapter")
    grown = RankLadder.from_peft(tmp_path / "adapter", as_trained=True)
    assert grown.rung_ranks[4] == 8
    for name, module in grown.modules.items():
        before = smaller.modules[name]
        assert torch.allclose(module.up[:, :8] @ module.down[:8], before.up @ before.down, atol=1e-6)
        assert module.up[:, 8:].norm() > 0  # the other directions have learned


@pytest.mark.parametrize(
    ("rank", "kind", "message"), [(8, "plain", "adapter of a lower rank"), (16, "one_layer", "LoRA layers")]
)
def test_an_adapter_that_does_not_fit_the_model_cannot_grow(tmp_path: Path, rank: int, kind: str, message: str) -> None:
    with pytest.raises(LadderError, match=message):
        train(new_model(rank), GrowRank(adapter("llama", kind)), tmp_path, 1)
