"""What the next-token distribution owes to each direction of a ladder: Fisher information, per module."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from chunkwise_lora.calibration.costs import Text, at_full_rank, hooked
from chunkwise_lora.engines.transformers.model import DEFAULT, ChunkWiseModel


@dataclass
class Sensitivity:
    """Of one module, with z = down @ x what goes into its directions, and q the gradient of log p by what comes out."""

    outputs: Tensor
    """(r, r) E[q q^T] per token that counts, for `RankLadder.data_aware`."""
    gates: Tensor
    """(r,) E[(d log p / d g)^2] per such token: twice the KL divergence, in nats, of switching a direction off."""


def sensitivities(
    model: ChunkWiseModel, batches: Iterable[Text], adapter: str = DEFAULT, seed: int = 0
) -> dict[str, Sensitivity]:
    """Run text at full rank, once forward and once back, and gather every module's sensitivity.

    Next tokens are drawn from the model's own distribution, so that the squares are those of the Fisher information
    and the cross terms between positions vanish. Only what is predicted where the text counts does. Modules that no
    token reaches are left out.
    """
    ladder = model.ladders[adapter].modules
    leaves: dict[str, tuple[Tensor, Tensor]] = {}
    found: dict[str, Sensitivity] = {}
    generator = torch.Generator().manual_seed(seed)

    def lend(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        up, down = ladder[name].up, ladder[name].down

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            x = args[0].detach()
            z = x.float() @ down.to(x.device).float().T
            leaf = torch.zeros_like(z, requires_grad=True)  # its gradient is q
            leaves[name] = z, leaf
            return output + (leaf @ up.to(x.device).float().T).to(output.dtype)

        return hook

    tokens = 0
    with hooked(model.model, {name: lend(name) for name in ladder}):
        for batch in batches:
            with torch.enable_grad():
                log_p = at_full_rank(model, batch.tokens, adapter)
                flat = log_p.detach().flatten(0, 1).cpu()
                drawn = torch.multinomial(flat.exp(), 1, generator=generator).to(log_p.device)
                log_p.flatten(0, 1).gather(1, drawn)[batch.counted.flatten()].sum().backward()
            tokens += int(batch.counted.sum())
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
