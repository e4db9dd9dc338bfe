"""Second moments of the inputs of an adapter's directions, for the data-aware ladder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from chunkwise_lora.calibration.log_probabilities import DEFAULT, ChunkWiseModel, at_full_rank


@torch.no_grad()
def second_moments(model: ChunkWiseModel, batches: Iterable[Tensor], adapter: str = DEFAULT) -> dict[str, Tensor]:
    """Gather the second moment of z = down @ x for every module, at full rank.

    Args:
        model: A model with the ladder attached.
        batches: Token ids, each (batch, tokens).
        adapter: Name of the ladder.

    Returns:
        (r, r) E[z z^T] by module name, in float32, for `RankLadder.data_aware`. Modules that no token reaches, such as
        unused experts, are left out.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def gather(name: str, down: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].reshape(-1, down.shape[1]).float()
            z = x @ down.to(x.device).float().T
            sums[name] = sums.get(name, 0) + (z.T @ z).double().cpu()
            counts[name] = counts.get(name, 0) + len(z)

        return hook

    hooks = [
        model.base.get_submodule(name).register_forward_pre_hook(gather(name, module.down))
        for name, module in model.ladders[adapter].modules.items()
    ]
    try:
        for tokens in batches:
            last = (torch.arange(tokens.shape[1]) == tokens.shape[1] - 1).expand_as(tokens)
            at_full_rank(model, tokens, adapter, last)  # fewer logits cost less, and none are needed
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (total / counts[name]).float() for name, total in sums.items() if counts[name]}
