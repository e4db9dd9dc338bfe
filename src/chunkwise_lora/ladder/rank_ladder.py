"""The rank ladder: a trained LoRA adapter as singular directions, strongest first.

For one linear module the adapter is dW = s B A. The ladder holds `up` (out, r) and `down` (r, in) with
dW = up @ down, ordered so that `up[:, :k] @ down[:k]` is the best rank-k version: two slices, no copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from chunkwise_lora.errors import LadderError
from chunkwise_lora.ladder import algebra, folder, format_v1
from chunkwise_lora.ladder.adapter_files import AdapterFiles
from chunkwise_lora.ladder.adapter_location import find_folder
from chunkwise_lora.ladder.contents import Build, LadderContents
from chunkwise_lora.ladder.hub import ladder_on_hub
from chunkwise_lora.ladder.module import LadderModule
from chunkwise_lora.ladder.peft_adapter import PeftAdapter
from chunkwise_lora.ladder.truncation import truncate

if TYPE_CHECKING:
    from peft import PeftModel

RUNGS = 8
"""Number of rungs above rank 0, unless the adapter's rank is lower."""


@dataclass(frozen=True)
class RankLadder(LadderContents):
    """The ladder of a whole adapter: one `LadderModule` per adapted linear module, and the policy fitted to it."""

    @classmethod
    def load(cls, path: str | Path, *, revision: str | None = None, subfolder: str | None = None) -> RankLadder:
        """Load the ladder in the folder `path` or on the hub, or build the plain SVD ladder of the PEFT adapter there.

        `revision` is a branch, tag or commit on the hub. A `subfolder` need not be given if it is the only one that
        holds an adapter.

        Raises:
            LadderError: There is neither a ladder nor a PEFT adapter, or it cannot be read.
            ConfigError: The policy is damaged.
        """
        found = ladder_or_adapter(path, revision, subfolder)
        if isinstance(found, RankLadder):
            return found
        policy = format_v1.read_policy(found.config_path.parent)
        return replace(cls.of_adapter(PeftAdapter.of(found)), policy=policy)

    @classmethod
    def from_peft(
        cls,
        adapter: str | Path | PeftModel,
        *,
        adapter_name: str | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        as_trained: bool = False,
    ) -> RankLadder:
        """Build the plain SVD ladder of a PEFT LoRA adapter: a folder, a name on the hub, or a model in memory.

        `adapter_name` chooses an adapter of a model in memory; without it, the active adapter is taken.

        The ladder is in float32 for every dtype of the adapter, so that full rank equals the adapter; see `to`.
        With `as_trained`, the directions are those of the adapter, in its order. Use this for an adapter whose first
        directions were trained to work without the others.

        Raises:
            LadderError: The adapter is missing, damaged, stored as pickle, or not plain LoRA.
        """
        if isinstance(adapter, (str, Path)):
            return cls.of_adapter(PeftAdapter.load(adapter, revision, subfolder), as_trained)
        from chunkwise_lora.ladder.peft_model import whole_adapter  # imports PEFT, which takes seconds

        return cls.of_adapter(whole_adapter(adapter, adapter_name), as_trained)

    @classmethod
    def of_adapter(cls, adapter: PeftAdapter, as_trained: bool = False) -> RankLadder:
        """Build the plain SVD ladder of an adapter's factors, or the ladder of its own directions; see `from_peft`."""
        build: Build = "as-trained" if as_trained else "svd"
        decompose = algebra.as_trained if as_trained else algebra.decompose
        steps = min(RUNGS, max(len(a) for a, _, _ in adapter.factors.values()))
        modules = {name: decompose(b, a, scale, steps) for name, (a, b, scale) in adapter.factors.items()}
        return cls(modules, adapter.base_model, build, adapter.saved_modules)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> RankLadder:
        """Read a ladder that `save_pretrained` wrote, with its policy. It reads ladders of format 1, too.

        The tensors are read into memory, so the files may be replaced or cut off while the ladder is in use.

        Raises:
            LadderError: A file is missing, cut off or altered.
            ConfigError: The policy is damaged.
        """
        old = format_v1.is_format_1(path) and not folder.is_format_2(path)
        return (format_v1 if old else folder).read(Path(path), cls)

    def save_pretrained(self, path: str | Path) -> None:
        """Write the ladder to the folder `path`.

        The folder is a PEFT adapter folder: `peft.PeftModel.from_pretrained(base, path)` loads the ladder at full rank.

        Raises:
            LadderError: The folder cannot be written.
        """
        folder.write(self, Path(path))

    def save_adapter(self, path: str | Path) -> None:
        """Write the ladder at full rank to the folder `path` as a plain PEFT adapter.

        The folder then holds no rungs, no policy and nothing learned. Any program that reads PEFT adapters can run it.
        Use `truncated` first for a lower rank.

        Raises:
            LadderError: The folder cannot be written.
        """
        folder.write_adapter(self, Path(path))

    def truncated(self, share: float) -> RankLadder:
        """Return the highest rung whose rank is at most `share` of the full rank, as a ladder of only this rung.

        Modules that have rank 0 on it are left out. `save_adapter` writes it as a plain PEFT adapter, with a rank per
        module if the ranks differ. `ladder.truncate` also tells what is lost.

        Raises:
            LadderError: The share is not above 0 and at most 1.
        """
        return truncate(self, share).ladder

    def truncated_equally(self, share: float) -> RankLadder:
        """Do the same as `truncated`, but with one rank for all modules, for programs that support only one rank.

        At the same cost, this loses more than `truncated` if calibration gave modules different ranks.

        Raises:
            LadderError: The share is not above 0 and at most 1.
        """
        return truncate(self, share, one_rank=True).ladder

    def data_aware(self, moments: Mapping[str, Tensor], outputs: Mapping[str, Tensor] | None = None) -> RankLadder:
        """Rotate the basis so that it truncates best on real inputs: minimal E||dW x - dW_k x||^2 for every k at once.

        Full rank computes the same function as before.

        Args:
            moments: By module: the (r, r) second moment E[z z^T] of z = down @ x over a calibration text. Modules
                without a moment, or with one that is all zeros, keep their plain SVD.
            outputs: By module: the (r, r) second moment E[q q^T] of q = up^T d log p / dy. With it, the weight of
                an error is its effect on the next-token distribution: E[(q^T e)^2] for independent z and q, as in K-FAC
                (Martens and Grosse, arXiv 1503.05671).

        Raises:
            LadderError: A moment belongs to no module of this ladder, has another shape, or is not finite.
        """
        for name, moment in (*moments.items(), *(outputs or {}).items()):
            if name not in self.modules:
                raise LadderError(f"moments given for {name}, which this ladder does not hold")
            rank = self.modules[name].rank
            if moment.shape != (rank, rank) or not moment.isfinite().all():
                raise LadderError(f"{name}: its moment must be ({rank}, {rank}) finite numbers; compute it again")
        modules = {
            name: algebra.reweight(module, moments[name], (outputs or {}).get(name))
            if name in moments and moments[name].any()
            else module
            for name, module in self.modules.items()
        }
        return self._changed(modules=modules, build="data-aware")

    def sorted_by(self, importance: Mapping[str, Tensor], steps: int) -> RankLadder:
        """Sort the directions by importance, and choose rungs that hold the most important directions for their cost.

        Full rank computes the same function as before.

        Args:
            importance: Per module (r,): what each direction contributes, such as the KL divergence of switching it off.
            steps: Number of rungs above rank 0. Rung i holds the directions with the highest importance per cost,
                over all modules, up to i / `steps` of the total cost.

        Raises:
            LadderError: The importance is not given for exactly the ladder's modules, or not finite.
        """
        modules = algebra.sort_by_importance(self.modules, importance, steps)
        return self._changed(modules=modules, build="calibrated")

    def with_ranks(self, ranks: Mapping[str, Sequence[int]]) -> RankLadder:
        """Return the same directions on other rungs: `ranks` gives every module its rank on each rung.

        Raises:
            LadderError: The ranks are not given for exactly the ladder's modules, or are impossible.
        """
        if set(ranks) != set(self.modules):
            raise LadderError("with_ranks needs the ranks of exactly the ladder's modules")
        modules = {name: replace(module, ranks=tuple(ranks[name])) for name, module in self.modules.items()}
        return self._changed(modules=modules)

    def with_modules(self, modules: Mapping[str, LadderModule]) -> RankLadder:
        """Return a ladder of other directions, without the results of calibration for the old ones."""
        return self._changed(modules=modules, learned=None, policy=None)

    def _changed(self, **changes: Any) -> RankLadder:
        """Return a changed ladder, without what was measured for the old rungs."""
        return replace(self, rung_divergence=None, expectation=None, **changes)

    def to(self, dtype: torch.dtype) -> RankLadder:
        """Return the ladder with factors in `dtype`: bfloat16 and float16 take half the bytes, and are not lossless.

        Raises:
            LadderError: The dtype is not float32, bfloat16 or float16, or its range is too small for the factors.
        """
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise LadderError(f"a ladder is stored in float32, bfloat16 or float16, not in {dtype}")
        modules = {}
        for name, module in self.modules.items():
            modules[name] = module.to(dtype)
            if not (modules[name].up.isfinite().all() and modules[name].down.isfinite().all()):
                raise LadderError(f"{name}: its factors are beyond the range of {dtype}; store the ladder in bfloat16")
        return replace(self, modules=modules)


def ladder_or_adapter(
    path: str | Path, revision: str | None = None, subfolder: str | None = None
) -> RankLadder | AdapterFiles:
    """Read the ladder in the folder `path` or on the hub, or else the PEFT adapter there.

    Raises:
        LadderError: There is neither a ladder nor a LoRA adapter, or it cannot be read.
        ConfigError: The ladder's policy is damaged.
    """
    while True:  # until what is read is what was looked for: a writer may put the other kind there meanwhile
        place = find_folder(path, subfolder) or ladder_on_hub(str(path), revision, subfolder)
        if place is not None and folder.is_ladder(place):
            try:
                return RankLadder.from_pretrained(place)
            except LadderError:
                if folder.is_ladder(place):
                    raise
        files = AdapterFiles.load(path, revision, subfolder)
        if not files.of_ladder:
            return files
