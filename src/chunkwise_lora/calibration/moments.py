"""What a ladder needs to know of real inputs: second moments of z = down @ x, per module."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from chunkwise_lora.engines.transformers.model import DEFAULT, ChunkWiseModel
from chunkwise_lora.method.config import ChunkWiseConfig


@torch.no_grad()
def second_moments(model: ChunkWiseModel, batches: Iterable[Tensor], adapter: str = DEFAULT) -> dict[str, Tensor]:
    """Run token ids (batch, tokens) at full rank and gather E[z z^T], (r, r), for `RankLadder.data_aware`.

    Modules that no token reaches are left out.
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
        model.model.get_submodule(name).register_forward_pre_hook(gather(name, module.down))
        for name, module in model.ladders[adapter].modules.items()
    ]
    try:
        for batch in batches:
            model(batch, adapter_names=adapter, chunkwise_config=ChunkWiseConfig.preset("lossless"), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (total / counts[name]).float() for name, total in sums.items() if counts[name]}
