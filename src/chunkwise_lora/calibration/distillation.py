"""Distillation: an adapter's weights learn the outputs of full rank at lower rungs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from chunkwise_lora.calibration.descent import RungTraining, match_full_rank
from chunkwise_lora.calibration.log_probabilities import DEFAULT, ChunkWiseModel, forward_hooks
from chunkwise_lora.ladder import RankLadder


def distil(model: ChunkWiseModel, training: RungTraining, rate: float, adapter: str = DEFAULT) -> RankLadder:
    """Learn adapter weights that are close to full rank on sampled rungs, by gradient descent on the KL divergence.

    Unlike `rotate_basis`, this changes the adapter at full rank, too. The rungs stay as they are. No labels are needed.

    Args:
        model: A model with a ladder attached. Its outputs at full rank are the target.
        training: The text and the rungs to learn for.
        rate: Highest learning rate of AdamW.
        adapter: Name of the ladder.

    Returns:
        The ladder with the learned weights. It has no learned estimator, because the old one no longer fits.
    """
    ladder, device = model.ladders[adapter], model.input_device
    tables = {name: module.gate_table().to(device) for name, module in ladder.modules.items()}
    known = {name: (m.up.float().to(device), m.down.float().to(device)) for name, m in ladder.modules.items()}
    factors = {name: [one.to(device) for one in module.balanced()] for name, module in ladder.modules.items()}
    parameters = [one.requires_grad_() for pair in factors.values() for one in pair]
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    rungs: list[Tensor] = []

    def replace_adapter(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not rungs:
                return None
            x, (up, down), (known_up, known_down) = args[0].float(), factors[name], known[name]
            gates = tables[name][rungs[0]].view(*x.shape[:-1], -1)
            added = (x @ down.T * gates) @ up.T - x @ known_down.T @ known_up.T
            return output + added.to(output.dtype)

        return hook

    def switch_rungs(chosen: Tensor | None) -> None:
        rungs[:] = [] if chosen is None else [chosen]

    with forward_hooks(model.base, {name: replace_adapter(name) for name in ladder.modules}):
        match_full_rank(model, training, optimizer, switch_rungs, adapter)
    modules = {}
    for name, module in ladder.modules.items():
        up, down = (one.detach() for one in factors[name])
        modules[name] = replace(module, up=up.to(module.up), down=down.to(module.down))
    return ladder.with_modules(modules)
