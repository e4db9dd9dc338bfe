"""The Fisher information of a ladder's directions: how much the next-token distribution depends on each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from chunkwise_lora.calibration.log_probabilities import (
    DEFAULT,
    ChunkWiseModel,
    at_full_rank,
    forward_hooks,
    sampled,
)
from chunkwise_lora.calibration.text import TokenBlocks


@dataclass
class Sensitivity:
    """How much the next-token distribution depends on one module.

    z = down @ x is the input of the module's gates, and q = up^T (d log p / dy) is the gradient at their output. Both
    fields are averages over scored tokens.
    """

    outputs: Tensor
    """(r, r) E[q q^T], for `RankLadder.data_aware`."""
    gates: Tensor
    """(r,) E[(d log p / d g)^2] of the gate g of each direction. To second order, this is twice the KL divergence, in
    nats, that switching the direction off would cost."""


def sensitivities(
    model: ChunkWiseModel, batches: Iterable[TokenBlocks], adapter: str = DEFAULT, seed: int = 0
) -> dict[str, Sensitivity]:
    """Gather the sensitivity of every module at full rank, with one forward and one backward pass per batch.

    The next tokens are drawn from the model's own distribution, because the Fisher information is defined by it. The
    cross terms between positions then vanish in expectation.

    Args:
        model: A model with the ladder attached.
        batches: Text; only predictions after scored tokens contribute.
        adapter: Name of the ladder.
        seed: Seed of the drawn tokens.

    Returns:
        The sensitivities by module name. Modules that no token reaches, such as unused experts, are left out.
    """
    ladder = model.ladders[adapter].modules
    leaves: dict[str, tuple[Tensor, Tensor]] = {}
    found: dict[str, Sensitivity] = {}
    generator = torch.Generator().manual_seed(seed)

    def add_leaf(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        up, down = ladder[name].up, ladder[name].down

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            x = args[0].detach()
            z = x.float() @ down.to(x.device).float().T
            leaf = torch.zeros_like(z, requires_grad=True)  # its gradient is q
            leaves[name] = z, leaf
            return output + (leaf @ up.to(x.device).float().T).to(output.dtype)

        return hook

    tokens = 0
    with forward_hooks(model.base, {name: add_leaf(name) for name in ladder}):
        for batch in batches:
            with torch.enable_grad():
                log_p = at_full_rank(model, batch.tokens, adapter, batch.scored)
                drawn = sampled(log_p.detach(), generator)
                log_p.gather(1, drawn[:, None]).sum().backward()
            tokens += len(log_p)
            for name, (z, leaf) in leaves.items():
                if leaf.grad is None:
                    continue
                q = leaf.grad.flatten(0, -2)
                outputs = (q.T @ q).cpu()
                of_sequence = (leaf.grad * z).reshape(len(batch), -1, z.shape[-1]).sum(1)
                gates = of_sequence.square().sum(0).cpu()
                if name in found:
                    outputs, gates = found[name].outputs + outputs, found[name].gates + gates
                found[name] = Sensitivity(outputs, gates)
            leaves.clear()
    return {name: Sensitivity(one.outputs / tokens, one.gates / tokens) for name, one in found.items()}
