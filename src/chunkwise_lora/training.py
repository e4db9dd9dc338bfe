"""Training a LoRA adapter for truncation, with PEFT and transformers' Trainer.

    nested = NestedRank(ladder)
    Trainer(model=peft_model, callbacks=[nested], compute_loss_func=nested.loss, ...).train()

Ordinary training does not order the directions of an adapter. Nested training makes low rungs useful on their own
(nested dropout, Rippel et al., arXiv 1402.0915; DyLoRA, Valipour et al., arXiv 2210.07558). `NestedRank` runs every
sequence chunk by chunk on random rungs, as a policy does later, and trains it to match full rank:

- With the ladder of a trained adapter, full rank is that adapter as it was given. No labels are needed, and the adapter
  does not memorise the training text.
- Without a ladder, full rank is the adapter in training, and it learns from the labels itself.
- With a policy, sequences run on the rungs that the policy plans.
- With teachers, all rungs learn from the teachers.

`GrowRank` adds rank in steps: a fully trained adapter of a low rank becomes the first directions of a larger adapter,
and stays unchanged while the other directions are trained.
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
from chunkwise_lora.ladder.peft_files import PREFIX
from chunkwise_lora.method.config import ChunkWiseConfig
from chunkwise_lora.method.scheduler import RuntimeScheduler


class _Hooked(TrainerCallback):
    """A callback with hooks in the model, which it removes at the end of training."""

    def __init__(self) -> None:
        self._hooks: list[Any] = []

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


class NestedRank(_Hooked):
    """Runs the LoRA layers of a PEFT model on sampled rungs during training.

    Give the object to the Trainer as a callback, and its method `loss` as `compute_loss_func`.

    Args:
        ladder: A ladder of the adapter, such as `chunkwise calibrate` writes. Training starts from its directions,
            samples its rungs, and trains them to match the ladder at full rank. Without a ladder, training starts from
            the adapter as it is, a rung is the same rank in all layers, and full rank learns from the labels.
        teachers: Models that all rungs learn from instead: the target is the mean of their next-token distributions.
            They are set to evaluation mode and moved to the model's device.
        policy: A policy that was fitted to the ladder. Sequences then run on the rungs that it plans, all shifted by
            the same step of at most one rung and limited to `lowest` and `highest`. Its scales and the argument
            `chunk` are not used.
        lowest: Lowest sampled rung, as a share of the full rank.
        highest: Highest sampled rung below the full rank, as a share of the full rank.
        full: Share of the sequences that run at full rank.
        chunk: Tokens that share a random rung.
        seed: Seed of the sampled rungs.

    Raises:
        ConfigError: An argument is out of range, or the policy and the ladder do not belong together.
    """

    def __init__(  # noqa: PLR0913 - each parameter is a setting of the user
        self,
        ladder: RankLadder | None = None,
        *,
        teachers: Sequence[nn.Module] = (),
        policy: ChunkWiseConfig | None = None,
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
        if policy is not None and ladder is None:
            raise ConfigError("NestedRank: a policy needs the ladder that it was fitted to; give that ladder, too")
        if policy is not None and policy.complexity.learned and ladder is not None and ladder.learned is None:
            raise ConfigError(
                "NestedRank: the policy needs the estimator that calibration learned, but this ladder has none; give "
                "the ladder that the policy was fitted to"
            )
        super().__init__()
        self.ladder = ladder
        self.teachers = [teacher.eval() for teacher in teachers]
        self.policy = policy
        self.lowest = lowest
        self.highest = highest
        self.full = full
        self.chunk = chunk
        self._generator = torch.Generator().manual_seed(seed)
        self._tables: dict[str, Tensor] = {}
        self._gated = self._at_given_full_rank = False
        self._top = 0
        self._sampler: RungSampler = RandomRungs(0, 1)
        self._rungs = self._nested = torch.empty(0)
        self._model: Any = None
        self._inputs: dict[str, Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gate the layers, and start from the ladder's directions unless training resumes from a checkpoint.

        Raises:
            LadderError: The ladder's modules are not the model's LoRA layers.
        """
        self._model = model = kwargs["model"]
        layers = _layers(model)
        if self.ladder is not None and self.ladder.modules.keys() != layers.keys():
            raise LadderError(
                "NestedRank: the ladder has other modules than the model has LoRA layers; build the ladder from this "
                "adapter"
            )
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
                    _start_from(self.ladder, name, layer)
                if not self.teachers:
                    self._hooks.append(factor.register_forward_hook(self._use_given(module.down)))
                    up = module.up / layer.scaling[adapter]
                    self._hooks.append(layer.lora_B[adapter].register_forward_hook(self._use_given(up)))
            self._hooks.append(factor.register_forward_hook(self._gate(name)))
        for teacher in self.teachers:
            teacher.to(next(model.parameters()).device)
        self._hooks.append(model.register_forward_pre_hook(self._sample, with_kwargs=True))
        self._top = len(next(iter(self._tables.values()))) - 1
        low, high = round(self.lowest * self._top), min(round(self.highest * self._top), self._top - 1)
        self._sampler = RandomRungs(low, high + 1, self.chunk)
        if self.policy is not None and self.ladder is not None:
            vocab_size = model.config.get_text_config().vocab_size
            options = (self.policy, self.ladder.rung_ranks, vocab_size, self.ladder.learned)
            self._sampler = PlannedRungs(partial(RuntimeScheduler, *options), low, high + 1)

    def trained_ladder(self) -> RankLadder:
        """The ladder with the trained directions and the same rungs.

        Calibrate it with `keep_directions` to fit a policy to it.

        Raises:
            LadderError: Training did not start from a ladder.
        """
        if self.ladder is None:
            raise LadderError(
                "training did not start from a ladder; save the adapter, then use RankLadder.from_peft(folder, "
                "as_trained=True)"
            )
        modules = {}
        for name, layer in _layers(self._model).items():
            adapter = layer.active_adapters[0]
            up = layer.lora_B[adapter].weight.detach().float() * layer.scaling[adapter]
            down = layer.lora_A[adapter].weight.detach().float().clone()
            modules[name] = replace(self.ladder.modules[name], up=up.cpu(), down=down.cpu())
        return self.ladder.with_modules(modules)

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """The loss, for the Trainer's `compute_loss_func`: the mean over the tokens that have labels.

        Args:
            outputs: The model's output, with logits (batch, tokens, vocabulary).
            labels: (batch, tokens) token ids; -100 marks tokens that are not learned.
            num_items_in_batch: Number of learned tokens of all passes whose gradients are added up; by default that of
                this pass.

        Returns:
            () nats per learned token.
        """
        log_p = outputs["logits"][:, :-1].float().log_softmax(-1)
        targets = labels[:, 1:]
        learned = (targets != -100).float()
        losses = -log_p.gather(2, targets.clamp_min(0)[..., None]).squeeze(2)
        if self._gated:
            full_rank_learns_labels = self.ladder is None and not self.teachers
            distilled = self._nested if full_rank_learns_labels else torch.ones_like(self._nested)
            distilled = distilled.to(log_p.device)
            if distilled.any():
                target = self._targets(distilled)
                kl = (target.exp() * (target - log_p[distilled])).sum(-1)
                losses = losses.masked_scatter(distilled[:, None], kl)
        count = learned.sum().clamp_min(1) if num_items_in_batch is None else num_items_in_batch
        return (losses * learned).sum() / count

    @torch.no_grad()
    def _targets(self, rows: Tensor) -> Tensor:
        """Log-probabilities of the teachers, or of full rank, for the sequences `rows` (batch,) bool of the pass.

        Returns:
            (sequences, tokens - 1, vocabulary).
        """
        inputs = {name: value[rows] for name, value in self._inputs.items()}

        def log_p(model: nn.Module) -> Tensor:
            logits: Tensor = model(**inputs).logits
            return logits[:, :-1].float().log_softmax(-1)

        if self.teachers:
            each = torch.stack([log_p(teacher) for teacher in self.teachers])
            return each.logsumexp(0) - math.log(len(self.teachers))
        self._gated, self._at_given_full_rank = False, self.ladder is not None
        full = log_p(self._model.base_model)
        self._gated, self._at_given_full_rank = True, False  # gradient checkpointing runs the layers again
        return full

    def _sample(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward pass, sample the rung of every token."""
        self._gated = model.training
        if not self._gated:
            return
        self._inputs = {name: kwargs[name] for name in ("input_ids", "attention_mask") if name in kwargs}
        self._rungs = self._sampler(kwargs["input_ids"].cpu(), self._generator)
        self._nested = torch.rand(len(self._rungs), generator=self._generator) >= self.full
        self._rungs[~self._nested] = self._top

    def _use_given(self, factor: Tensor) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        """A hook that uses `factor` of the given ladder instead of the trained factor, for the target of the loss."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            return nn.functional.linear(args[0], factor.to(args[0])) if self._at_given_full_rank else None

        return hook

    def _gate(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        """A hook that multiplies the output of `lora_A` by the gates of every token's rung."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if not self._gated:
                return output
            return output * self._tables[name].to(output)[self._rungs.to(output.device)]

        return hook


class GrowRank(_Hooked):
    """Makes a trained adapter the first directions of a larger adapter, and keeps them unchanged during training.

    The other directions add nothing at first. After training, make a ladder with `RankLadder.from_peft(folder,
    as_trained=True)`: on the rung with the smaller adapter's rank, it equals the smaller adapter.

    Args:
        smaller: The trained adapter of a lower rank: a folder, or a name on the hub.

    Raises:
        LadderError: The smaller adapter is damaged, is not plain LoRA, or replaces whole modules.
    """

    def __init__(self, smaller: str | Path) -> None:
        super().__init__()
        self._smaller = smaller
        adapter = PeftAdapter.load(smaller)
        if adapter.saved_modules:
            raise LadderError(
                f"{smaller}: the adapter replaces {min(adapter.saved_modules)} (modules_to_save), and replaced modules "
                "cannot grow; train an adapter without modules_to_save"
            )
        self._factors = adapter.factors
        self._kept: list[tuple[Tensor, Tensor]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Copy the smaller adapter into the first directions.

        Raises:
            LadderError: Its modules or shapes do not fit the model's LoRA layers.
        """
        layers = _layers(kwargs["model"])
        if self._factors.keys() != layers.keys():
            raise LadderError(
                f"{self._smaller}: the adapter has other modules than the model has LoRA layers; train both on the "
                "same modules"
            )
        self._kept.clear()
        for name, (down, up, scale) in self._factors.items():
            layer = layers[name]
            adapter = layer.active_adapters[0]
            a, b, rank = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, len(down)
            if (a.shape[1], b.shape[0]) != (down.shape[1], up.shape[0]) or rank >= len(a):
                raise LadderError(
                    f"{self._smaller}: {name} has rank {rank}, {down.shape[1]} inputs and {up.shape[0]} outputs, but "
                    f"the model's layer has rank {len(a)}, {a.shape[1]} inputs and {b.shape[0]} outputs; give an "
                    "adapter of a lower rank for the same base model"
                )
            if state.global_step == 0:
                b.detach()[:, rank:].zero_()
            self._keep(a, (slice(rank), slice(None)), down)
            self._keep(b, (slice(None), slice(rank)), up.float() * (scale / layer.scaling[adapter]))
        self._restore()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Undo what the optimizer changed in the first directions, such as weight decay."""
        self._restore()

    def _keep(self, parameter: Tensor, place: tuple[slice, slice], value: Tensor) -> None:
        """Keep the part of a parameter at `place` at `value`, and its gradient at 0, so that clipping ignores it."""

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
    """The LoRA layers, by the names of the modules that they adapt."""
    return {name.removeprefix(PREFIX): layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}


@torch.no_grad()
def _start_from(ladder: RankLadder, name: str, layer: Any) -> None:
    """Copy a ladder's directions into a LoRA layer, with equal norms of `lora_A` and `lora_B` per direction."""
    adapter = layer.active_adapters[0]
    module, a, b = ladder.modules[name], layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    if a.shape != module.down.shape or b.shape != module.up.shape:
        raise LadderError(
            f"{name}: lora_A is {tuple(module.down.shape)} in the ladder, but {tuple(a.shape)} in the layer; train an "
            "adapter of the ladder's rank"
        )
    up, down = module.balanced()
    a.copy_(down)
    b.copy_(up / layer.scaling[adapter])
