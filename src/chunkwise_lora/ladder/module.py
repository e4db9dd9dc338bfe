"""The singular directions of one linear module, and its rank on each rung."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from chunkwise_lora.errors import LadderError
from chunkwise_lora.ladder.checks import check_factors, check_layout, check_name, check_ranks, check_sigma, check_tensor


@dataclass(frozen=True)
class LadderModule:
    """The singular directions of one linear module."""

    up: Tensor
    """(out, r)"""
    down: Tensor
    """(r, in)"""
    sigma: Tensor
    """(r,) float32: what each direction contributes, in the norm that the build minimises. In falling order, unless the
    build is `as-trained`."""
    ranks: tuple[int, ...]
    """The module's rank on each rung. Ranks never fall from one rung to the next, and the last one is r."""

    @property
    def rank(self) -> int:
        """r, the number of directions."""
        return len(self.sigma)

    @property
    def cost(self) -> int:
        """Numbers that are read per direction: in + out."""
        return self.up.shape[0] + self.down.shape[1]

    def balanced(self) -> tuple[Tensor, Tensor]:
        """Return new up (out, r) and down (r, in) in float32, where both sides of a direction have the same length.

        This is a good start for training.
        """
        up, down = self.up.float(), self.down.float()
        balance = (up.norm(dim=0) / down.norm(dim=1).clamp_min(1e-12)).clamp_min(1e-12).sqrt()
        return up / balance, down * balance[:, None]

    def to(self, dtype: torch.dtype) -> LadderModule:
        """Return the module with factors in `dtype`.

        float16 has a narrow range. For it, a power of two moves from the larger to the smaller side of each direction
        first, which changes no product.
        """
        up, down = self.up, self.down
        if dtype == torch.float16:
            sizes = [side.float().clamp_min(torch.finfo(torch.float32).tiny).log2() for side in self._largest()]
            exponents = ((sizes[1] - sizes[0]) / 2).round()
            up, down = torch.ldexp(up.float(), exponents), torch.ldexp(down.float(), -exponents[:, None])
        return replace(self, up=up.to(dtype), down=down.to(dtype))

    def _largest(self) -> tuple[Tensor, Tensor]:
        """(r,) and (r,): the largest magnitude of each direction in up and in down."""
        return self.up.abs().amax(0), self.down.abs().amax(1)

    def up_to(self, rung: int) -> LadderModule | None:
        """Return a copy without the directions above a rung; None if none is left. Higher rungs then equal it."""
        rank = self.ranks[rung]
        if rank == 0:
            return None
        up = self.up[:, :rank].T.clone(memory_format=torch.contiguous_format).T
        ranks = tuple(min(rank, one) for one in self.ranks)
        return LadderModule(up, self.down[:rank].clone(), self.sigma[:rank], ranks)

    def gate_table(self) -> Tensor:
        """Return (rungs, r) float32 ones and zeros: the gates of each rung."""
        return (torch.arange(self.rank) < torch.tensor(self.ranks)[:, None]).float()

    def energy(self, k: int) -> float:
        """Return the share of the squared sigma that the first k directions hold, from 0 to 1."""
        total = float(self.sigma.double().square().sum())
        return float(self.sigma[:k].double().square().sum()) / total if total else 1.0

    def check(self, name: str) -> None:
        """Check shapes, types and ranks of the module called `name`.

        The rank may be above min(in, out): the build `as-trained` keeps all directions of an adapter, even if they
        are more than the module's inputs.

        Raises:
            LadderError: The tensors and ranks do not fit together.
        """
        shapes = [tuple(t.shape) for t in (self.up, self.down, self.sigma)]
        if [len(shape) for shape in shapes] != [2, 2, 1] or not shapes[0][1] == shapes[1][0] == shapes[2][0]:
            raise LadderError(f"{name}: up, down and sigma are {shapes}, not (out, r), (r, in) and (r,)")
        if 0 in (*shapes[0], *shapes[1]):
            raise LadderError(f"{name}: up and down are {shapes[:2]}; a module needs inputs, outputs and a direction")
        floating = self.up.is_floating_point() and self.down.is_floating_point()
        if not floating or not self.sigma.isfinite().all():
            raise LadderError(f"{name}: up and down must be floating-point, sigma finite; build the ladder again")
        check_ranks(name, self.ranks, self.rank)


def even_ranks(rank: int, steps: int) -> tuple[int, ...]:
    """Return ranks of one module on `steps` + 1 rungs, spread evenly from 0 to `rank`."""
    return tuple(round(step * rank / steps) for step in range(steps + 1))


def direction_lengths(up: Tensor, down: Tensor) -> Tensor:
    """Return (r,) float32: the Frobenius norm of each direction's product, |up column| x |down row|.

    For a plain SVD these are the singular values.
    """
    return (up.double().norm(dim=0) * down.double().norm(dim=1)).float()


def checked_module(name: str, up: Tensor, down: Tensor, sigma: Tensor | None, ranks: Sequence[int]) -> LadderModule:
    """Check the tensors of a file and return them as a module. Without `sigma`, it is computed from the factors.

    Raises:
        LadderError: The tensors have a wrong dtype or shape, hold NaN, infinity or numbers too large to compute with,
            or the ranks do not fit them.
    """
    check_name(name, name)
    for side, factor in (("up", up), ("down", down)):
        check_layout(f"{name}: {side}", factor, (None, None))
    check_factors(name, up, down)  # finite numbers, too
    if sigma is not None:
        check_sigma(f"{name}: sigma", sigma, up.shape[1])
    return LadderModule(up, down, direction_lengths(up, down) if sigma is None else sigma, tuple(ranks))


def checked_parameter(name: str, value: Tensor) -> Tensor:
    """Check a replaced parameter from a file and return it.

    Raises:
        LadderError: It has a wrong dtype, or holds NaN or infinity.
    """
    check_name(name, name)
    check_tensor(name, value)
    return value
