"""Training a LoRA adapter for truncation, with PEFT and transformers' Trainer.

    nested = NestedRank(ladder)
    Trainer(model=peft_model, callbacks=[nested], compute_loss_func=nested.loss, ...).train()

Ordinary training leaves every direction as it came to be; nested training lets low rungs do well on their own (nested
dropout, Rippel et al., arXiv 1402.0915; DyLoRA, arXiv 2210.07558). Here sequences run chunk by chunk at random rungs,
as plans will, and learn from full rank: given the ladder of a trained adapter, from that adapter as it was, which needs
no labels and learns no text by heart; from scratch, from full rank as it is, which itself learns from the labels. With
a plan, they run at the rungs that it gives them; with teachers, all learn from these.

`GrowRank` gets there one rank after the other: an adapter of a low rank, trained to the end, becomes the first
directions of a larger one and stays as it is while the others learn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from chunkwise_lora.calibration.rung_sampler import PlannedRungs, RandomRungs, RungSampler
from chunkwise_lora.errors import ConfigError, LadderError
from chunkwise_lora.ladder import RankLadder, even_ranks
from chunkwise_lora.ladder.peft_adapter import PeftAdapter
from chunkwise_lora.method.config import ChunkWiseConfig
from chunkwise_lora.method.scheduler import RuntimeScheduler

PREFIX = "base_model.model."
"""What PEFT puts before the names of a model's modules."""


class _Hooked(TrainerCallback):
    """Has hooks in the model while it trains."""

    def __init__(self) -> None:
        self._hooks: list[Any] = []

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave nothing behind in the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


class NestedRank(_Hooked):
    """Runs a PEFT model's LoRA layers at random rungs while it trains.

    Args:
        ladder: A ladder of the adapter, such as `chunkwise calibrate` writes: training begins with its directions,
            draws its rungs and teaches them what the ladder does at full rank. Without one, training begins with the
            adapter as it is, rungs are equal ranks, and full rank learns from the labels.
        teachers: Other models to learn from instead, at all rungs: the mean of what they say of the same tokens. They
            are put into evaluation mode and moved to the model's device.
        plan: A policy that was fitted to the ladder. Sequences run at the rungs that it gives their tokens, all moved
            by at most one and kept between the lowest and the highest, instead of at random ones. Its scales and
            `chunk` have no part in it.
        lowest: The lowest rung, as a share of the full rank.
        highest: The highest rung below full rank that is drawn, likewise.
        full: Share of the sequences that run at full rank.
        chunk: Tokens that share a rung.
        seed: Of the rungs.

    Raises:
        ConfigError: An argument is impossible.
        LadderError: The ladder and the model's LoRA layers do not fit together.
    """

    def __init__(
        self,
        ladder: RankLadder | None = None,
        *,
        teachers: Sequence[nn.Module] = (),
        plan: ChunkWiseConfig | None = None,
        lowest: float = 0.25,
        highest: float = 1.0,
        full: float = 0.25,
        chunk: int = 16,
        seed: int = 0,
    ) -> None:
        if not (0 <= lowest <= highest <= 1 and 0 <= full <= 1 and chunk >= 1):
            raise ConfigError(
                f"NestedRank needs 0 <= lowest <= highest <= 1, full from 0 to 1 and chunk of at least 1, not "
                f"{lowest=}, {highest=}, {full=}, {chunk=}"
            )
        if plan is not None and ladder is None:
            raise ConfigError("a plan gives rungs of the ladder that it was fitted to; give that ladder, too")
        if plan is not None and plan.complexity.learned and ladder is not None and ladder.learned is None:
            raise ConfigError(
                "the plan reads what calibration learned, which the ladder does not hold; give that ladder"
            )
        super().__init__()
        self.ladder = ladder
        self.teachers = [teacher.eval() for teacher in teachers]
        self.plan = plan
        self.lowest = lowest
        self.highest = highest
        self.full = full
        self.chunk = chunk
        self._generator = torch.Generator().manual_seed(seed)
        self._tables: dict[str, Tensor] = {}
        self._gated = self._teaching = False
        self._top = 0
        self._choose_rungs: RungSampler = RandomRungs(0, 1)
        self._rungs = self._nested = torch.empty(0)
        self._model: Any = None
        self._inputs: dict[str, Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the ladder's directions, unless a checkpoint goes on, and gate the layers."""
        self._model = model = kwargs["model"]
        layers = _layers(model)
        if self.ladder is not None and self.ladder.modules.keys() != layers.keys():
            raise LadderError("the ladder's modules are not the model's LoRA layers; build it from this adapter")
        for name, layer in layers.items():
            adapter = layer.active_adapters[0]
            factor = layer.lora_A[adapter]
            if self.ladder is None:
                ranks: tuple[int, ...] = even_ranks(factor.out_features, factor.out_features)
                self._tables[name] = (torch.arange(ranks[-1]) < torch.tensor(ranks)[:, None]).float()
            else:
                module = self.ladder.modules[name]
                self._tables[name] = module.gate_table()
                if state.global_step == 0:
                    _write(self.ladder, name, layer)
                if not self.teachers:
                    self._hooks.append(factor.register_forward_hook(self._teach(module.down)))
                    up = module.up / layer.scaling[adapter]
                    self._hooks.append(layer.lora_B[adapter].register_forward_hook(self._teach(up)))
            self._hooks.append(factor.register_forward_hook(self._gate(name)))
        for teacher in self.teachers:
            teacher.to(next(model.parameters()).device)
        self._hooks.append(model.register_forward_pre_hook(self._draw, with_kwargs=True))
        self._top = len(next(iter(self._tables.values()))) - 1
        low, high = round(self.lowest * self._top), min(round(self.highest * self._top), self._top - 1)
        self._choose_rungs = RandomRungs(low, high + 1, self.chunk)
        if self.plan is not None and self.ladder is not None:
            vocab_size = model.config.get_text_config().vocab_size
            options = (self.plan, self.ladder.rung_ranks, vocab_size, self.ladder.learned)
            self._choose_rungs = PlannedRungs(partial(RuntimeScheduler, *options), low, high + 1)

    def trained_ladder(self) -> RankLadder:
        """The ladder of what was trained, its directions and rungs as training left them; see --keep-directions.

        Raises:
            LadderError: Training went on from no ladder; build one from the adapter.
        """
        if self.ladder is None:
            raise LadderError(
                "training went on from no ladder; save the adapter, then RankLadder.from_peft(folder, as_trained=True)"
            )
        modules = {}
        for name, layer in _layers(self._model).items():
            adapter = layer.active_adapters[0]
            up = layer.lora_B[adapter].weight.detach().float() * layer.scaling[adapter]
            down = layer.lora_A[adapter].weight.detach().float().clone()
            modules[name] = replace(self.ladder.modules[name], up=up.cpu(), down=down.cpu())
        return self.ladder.with_modules(modules)

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """For the Trainer's `compute_loss_func`: the mean over the tokens that have labels.

        `num_items_in_batch` counts those of all the passes whose gradients are summed up; by default, of this one.
        """
        log_p = outputs["logits"][:, :-1].float().log_softmax(-1)
        targets = labels[:, 1:]
        learned = (targets != -100).float()
        losses = -log_p.gather(2, targets.clamp_min(0)[..., None]).squeeze(2)
        if self._gated:
            learns = self.ladder is None and not self.teachers  # full rank, from the labels
            taught = (self._nested if learns else torch.ones_like(self._nested)).to(log_p.device)
            if taught.any():
                said = self._taught(taught)
                losses = losses.masked_scatter(taught[:, None], (said.exp() * (said - log_p[taught])).sum(-1))
        count = learned.sum().clamp_min(1) if num_items_in_batch is None else num_items_in_batch
        return (losses * learned).sum() / count

    @torch.no_grad()
    def _taught(self, rows: Tensor) -> Tensor:
        """(sequences, tokens - 1, vocabulary) what teachers, or full rank, say of the pass's `rows` (batch,) bool."""
        inputs = {name: value[rows] for name, value in self._inputs.items()}

        def log_p(model: nn.Module) -> Tensor:
            logits: Tensor = model(**inputs).logits
            return logits[:, :-1].float().log_softmax(-1)

        if self.teachers:
            said = torch.stack([log_p(teacher) for teacher in self.teachers])
            return said.logsumexp(0) - math.log(len(self.teachers))
        self._gated, self._teaching = False, self.ladder is not None
        full = log_p(self._model.base_model)
        self._gated, self._teaching = True, False  # for layers that are run again on the way back
        return full

    def _draw(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._gated = model.training
        if not self._gated:
            return
        self._inputs = {name: kwargs[name] for name in ("input_ids", "attention_mask") if name in kwargs}
        self._rungs = self._choose_rungs(kwargs["input_ids"].cpu(), self._generator)
        self._nested = torch.rand(len(self._rungs), generator=self._generator) >= self.full
        self._rungs[~self._nested] = self._top

    def _teach(self, factor: Tensor) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            return nn.functional.linear(args[0], factor.to(args[0])) if self._teaching else None

        return hook

    def _gate(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if not self._gated:
                return output
            return output * self._tables[name].to(output)[self._rungs.to(output.device)]

        return hook


class GrowRank(_Hooked):
    """Makes a trained adapter of a lower rank the first directions of the one that trains, and keeps them as they are.

    The ladder of the result, `RankLadder.from_peft(folder, as_trained=True)`, is the smaller adapter itself on the rung
    that has its rank. The other directions begin by adding nothing.

    Args:
        smaller: The trained adapter: a folder, or a name on the hub.

    Raises:
        LadderError: It is damaged, no plain LoRA, replaces whole modules or does not fit into the model's LoRA layers.
    """

    def __init__(self, smaller: str | Path) -> None:
        super().__init__()
        self._smaller = smaller
        adapter = PeftAdapter.load(smaller)
        if adapter.saved_modules:
            raise LadderError(f"{smaller}: replaces {min(adapter.saved_modules)} (modules_to_save), which cannot grow")
        self._factors = adapter.factors
        self._kept: list[tuple[Tensor, Tensor]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the places of the smaller adapter's directions, and put them there."""
        layers = _layers(kwargs["model"])
        if self._factors.keys() != layers.keys():
            raise LadderError(
                f"{self._smaller}: its modules are not the model's LoRA layers; train it on the same ones"
            )
        self._kept.clear()
        for name, (down, up, scale) in self._factors.items():
            layer = layers[name]
            adapter = layer.active_adapters[0]
            a, b, rank = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, len(down)
            if (a.shape[1], b.shape[0]) != (down.shape[1], up.shape[0]) or rank >= len(a):
                raise LadderError(
                    f"{self._smaller}: {name} has rank {rank} from {down.shape[1]} to {up.shape[0]}, which is no lower "
                    f"rank of a layer of rank {len(a)} from {a.shape[1]} to {b.shape[0]}"
                )
            if state.global_step == 0:
                b.detach()[:, rank:].zero_()
            self._keep(a, (slice(rank), slice(None)), down)
            self._keep(b, (slice(None), slice(rank)), up.float() * (scale / layer.scaling[adapter]))
        self._restore()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take back what the optimizer did to them, such as weight decay."""
        self._restore()

    def _keep(self, parameter: Tensor, place: tuple[slice, slice], value: Tensor) -> None:
        """Hold a part of a parameter at `value`, and its gradient at 0, so that clipping does not count it."""

        def without_part(gradient: Tensor) -> Tensor:
            gradient = gradient.clone()
            gradient[place] = 0
            return gradient

        self._kept.append((parameter.detach()[place], value.to(parameter)))
        self._hooks.append(parameter.register_hook(without_part))

    def _restore(self) -> None:
        for place, kept in self._kept:
            place.copy_(kept)


def _layers(model: nn.Module) -> dict[str, Any]:
    """The LoRA layers by the names of the modules they adapt."""
    return {name.removeprefix(PREFIX): layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}


@torch.no_grad()
def _write(ladder: RankLadder, name: str, layer: Any) -> None:
    """Put a ladder's directions into a LoRA layer, their lengths shared evenly between the factors."""
    adapter = layer.active_adapters[0]
    module, a, b = ladder.modules[name], layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    if a.shape != module.down.shape or b.shape != module.up.shape:
        raise LadderError(f"{name}: the ladder holds {tuple(module.down.shape)}, the layer {tuple(a.shape)}")
    up, down = module.balanced()
    a.copy_(down)
    b.copy_(up / layer.scaling[adapter])
