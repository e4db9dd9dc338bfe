"""The rank ladder: a trained LoRA adapter as singular directions, strongest first.

For one linear module the adapter is dW = s B A. The ladder holds `up` (out, r) and `down` (r, in) with
dW = up @ down, ordered so that `up[:, :k] @ down[:k]` is the best rank-k version: two slices, no copy.
dW itself is never formed: thin QR of both factors, then an SVD of their r x r core.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from chunkwise_lora.errors import LadderError
from chunkwise_lora.files import read_text, write_atomically
from chunkwise_lora.ladder.peft_adapter import CONFIG_NAME as PEFT_CONFIG_NAME
from chunkwise_lora.ladder.peft_adapter import WEIGHTS_NAME, PeftAdapter
from chunkwise_lora.method.complexity import SIGNALS, LearnedComplexity

LADDER_NAME = "ladder.json"
FORMAT_VERSION = 1
RUNGS = 8
"""Steps of a ladder above rank 0, unless an adapter's rank is lower."""

Build = Literal["svd", "as-trained", "data-aware", "calibrated"]


def is_ladder(folder: str | Path) -> bool:
    """Whether a ladder was saved in the folder."""
    return os.path.isfile(Path(folder) / LADDER_NAME)  # unlike Path's, never an error


@dataclass(frozen=True)
class LadderModule:
    """The singular directions of one linear module."""

    up: Tensor
    """(out, r)"""
    down: Tensor
    """(r, in)"""
    sigma: Tensor
    """(r,) float32: what each direction contributes, in the norm the build minimises; falling, unless as trained."""
    ranks: tuple[int, ...]
    """The module's rank on each rung, not falling, the last one r."""

    @property
    def rank(self) -> int:
        """r, the number of directions."""
        return len(self.sigma)

    @property
    def cost(self) -> int:
        """Numbers read per direction: in + out."""
        return self.up.shape[0] + self.down.shape[1]

    def balanced(self) -> tuple[Tensor, Tensor]:
        """New up and down in float32, the lengths of their directions shared evenly: a start for training."""
        up, down = self.up.float(), self.down.float()
        balance = (up.norm(dim=0) / down.norm(dim=1).clamp_min(1e-12)).clamp_min(1e-12).sqrt()
        return up / balance, down * balance[:, None]

    def gate_table(self) -> Tensor:
        """(rungs, r) float32 of ones and zeros: the gates of each rung."""
        return (torch.arange(self.rank) < torch.tensor(self.ranks)[:, None]).float()

    def energy(self, k: int) -> float:
        """Share of the squared singular values that the first k directions hold."""
        total = float(self.sigma.square().sum())
        return float(self.sigma[:k].square().sum()) / total if total else 1.0


@dataclass(frozen=True)
class RankLadder:
    """The ladder of a whole adapter: one `LadderModule` per adapted linear module.

    A rung names a rank for every module; all modules have the same number of rungs, the lowest first.
    """

    modules: Mapping[str, LadderModule]
    base_model: str | None = None
    """Name or path of the base model that the adapter was trained on, as the adapter states it."""
    build: Build = "svd"
    saved_modules: Mapping[str, Tensor] = field(default_factory=dict)
    """Parameters that the adapter replaces whole (PEFT's `modules_to_save`), by parameter name."""
    learned: LearnedComplexity | None = None
    """What calibration learned about which tokens need rank."""

    def __post_init__(self) -> None:
        if not self.modules:
            raise LadderError("a ladder needs at least one module")
        if len({len(module.ranks) for module in self.modules.values()}) != 1:
            raise LadderError("all modules of a ladder need the same number of rungs")
        for name, module in self.modules.items():
            ranks, shapes = module.ranks, [tuple(t.shape) for t in (module.up, module.down, module.sigma)]
            if [len(shape) for shape in shapes] != [2, 2, 1] or not shapes[0][1] == shapes[1][0] == shapes[2][0]:
                raise LadderError(f"{name}: up, down and sigma are {shapes}, not (out, r), (r, in) and (r,)")
            if not (
                module.up.is_floating_point() and module.down.is_floating_point() and module.sigma.isfinite().all()
            ):
                raise LadderError(f"{name}: up and down must be floating-point, sigma finite; build the ladder anew")
            if list(ranks) != sorted(ranks) or not ranks or ranks[0] < 0 or ranks[-1] != module.rank:
                raise LadderError(f"{name}: ranks {ranks} must rise from at least 0 to the full rank {module.rank}")

    @property
    def rungs(self) -> int:
        """Number of rungs."""
        return len(next(iter(self.modules.values())).ranks)

    @property
    def rung_ranks(self) -> tuple[float, ...]:
        """Each rung's rank: the mean over modules, weighted by what a direction costs to read."""
        costs = sum(module.cost for module in self.modules.values())
        return tuple(
            sum(module.ranks[rung] * module.cost for module in self.modules.values()) / costs
            for rung in range(self.rungs)
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names and shapes of the adapted modules: the bases this ladder fits."""
        lines = [f"{name} {m.up.shape[0]} {m.down.shape[1]}\n" for name, m in sorted(self.modules.items())]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @classmethod
    def load(cls, path: str | Path) -> RankLadder:
        """A saved ladder if `path` is the folder of one, or else the ladder of the PEFT adapter there."""
        return cls.from_pretrained(path) if is_ladder(path) else cls.from_peft(path)

    @classmethod
    def from_peft(cls, adapter: str | Path, *, revision: str | None = None, as_trained: bool = False) -> RankLadder:
        """Build the plain SVD ladder of a PEFT LoRA adapter: a folder, or a name on the hub.

        The ladder is float32 whatever the adapter's dtype, so that full rank equals the adapter; see `to`.
        With `as_trained` the directions stay those of the adapter, in its order: for one whose first directions were
        trained to stand alone.

        Raises:
            LadderError: The adapter is missing, damaged, stored as pickle, or not plain LoRA.
        """
        source = PeftAdapter.load(adapter, revision)
        steps = min(RUNGS, max(len(a) for a, _, _ in source.factors.values()))
        build = _as_trained if as_trained else _decompose
        modules = {name: build(b, a, scale, steps) for name, (a, b, scale) in source.factors.items()}
        how: Build = "as-trained" if as_trained else "svd"
        return cls(modules, source.base_model, build=how, saved_modules=source.saved_modules)

    def data_aware(self, moments: Mapping[str, Tensor], outputs: Mapping[str, Tensor] | None = None) -> RankLadder:
        """The ladder that truncates best on real inputs: minimal E||dW x - dW_k x||^2 for every k at once.

        `moments` maps modules to the (r, r) second moment E[z z^T] of z = down @ x over a calibration text. Modules
        without moments, or whose moments are all zero, keep their plain SVD. At full rank nothing changes.

        `outputs` holds the (r, r) second moments E[q q^T] of q = up^T d log p / dy for the same modules. With them, an
        error counts as much as it moves the next-token distribution: E[(q^T e)^2] for independent z and q, as in
        K-FAC (Martens and Grosse, arXiv 1503.05671).
        """
        for name, moment in (*moments.items(), *(outputs or {}).items()):
            if name not in self.modules:
                raise LadderError(f"moments given for {name}, which this ladder does not hold")
            rank = self.modules[name].rank
            if moment.shape != (rank, rank) or not moment.isfinite().all():
                raise LadderError(f"{name}: its moment must be ({rank}, {rank}) finite numbers; gather it anew")
        modules = {
            name: _reweight(module, moments[name], (outputs or {}).get(name))
            if name in moments and moments[name].any()
            else module
            for name, module in self.modules.items()
        }
        return replace(self, modules=modules, build="data-aware")

    def sorted_by(self, importance: Mapping[str, Tensor], steps: int) -> RankLadder:
        """The same directions, the most important first, on rungs that spend their budget where it matters most.

        `importance` gives every module what each of its directions (r,) contributes, such as the KL divergence of
        switching it off. Rung i of `steps` holds the directions of all modules that contribute most for their cost,
        as many as i / `steps` of the whole cost pays for. Full rank is the same as before.
        """
        if importance.keys() != self.modules.keys():
            raise LadderError("sorted_by needs the importance of exactly the ladder's modules")
        modules, worth, costs = {}, [], []
        for name, module in self.modules.items():
            if importance[name].shape != (module.rank,) or not importance[name].isfinite().all():
                raise LadderError(f"{name}: its importance must be {module.rank} finite numbers; gather it anew")
            order = importance[name].argsort(descending=True, stable=True)
            sigma = importance[name][order].clamp_min(0).sqrt().float()
            up, down = module.up[:, order].contiguous(), module.down[order].contiguous()
            modules[name] = replace(module, up=up, down=down, sigma=sigma)
            worth.append(sigma.square() / module.cost)
            costs.append(torch.full((module.rank,), float(module.cost), dtype=torch.float64))
        order, cost = torch.cat(worth).argsort(descending=True, stable=True), torch.cat(costs)
        spent = torch.empty_like(cost)
        spent[order] = cost[order].cumsum(0) / cost.sum() * steps
        rungs = spent.sub(1e-6).ceil().split([module.rank for module in modules.values()])
        ranks = {
            name: tuple(int((rung <= step).sum()) for step in range(steps + 1))
            for name, rung in zip(modules, rungs, strict=True)
        }
        return replace(self, modules=modules, build="calibrated").with_ranks(ranks)

    def with_ranks(self, ranks: Mapping[str, Sequence[int]]) -> RankLadder:
        """The same directions on other rungs: `ranks` gives every module its rank on each rung."""
        if set(ranks) != set(self.modules):
            raise LadderError("with_ranks needs the ranks of exactly the ladder's modules")
        modules = {name: replace(module, ranks=tuple(ranks[name])) for name, module in self.modules.items()}
        return replace(self, modules=modules)

    def to(self, dtype: torch.dtype) -> RankLadder:
        """The same ladder with factors in `dtype`: half the bytes in bfloat16 or float16, and no longer lossless."""
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise LadderError(f"a ladder is stored in float32, bfloat16 or float16, not in {dtype}")
        modules = {
            name: replace(module, up=module.up.to(dtype), down=module.down.to(dtype))
            for name, module in self.modules.items()
        }
        return replace(self, modules=modules)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the ladder to `folder`.

        The tensors go to a file named after their content, then `ladder.json`, which names that file, is
        renamed into place: until that moment a reader sees the old ladder, whole.
        """
        folder = Path(folder)
        tensors = {f"saved_modules/{name}": tensor.contiguous() for name, tensor in self.saved_modules.items()}
        for name, module in self.modules.items():
            tensors[f"{name}/up"] = module.up.contiguous()
            tensors[f"{name}/down"] = module.down.contiguous()
            tensors[f"{name}/sigma"] = module.sigma.contiguous()
        if self.learned is not None:
            for one in fields(self.learned):
                values = np.asarray(getattr(self.learned, one.name), np.float32)
                tensors[f"learned/{one.name}"] = torch.from_numpy(values)
        content = serialise(tensors)
        digest = hashlib.sha256(content).hexdigest()
        manifest = _Manifest(
            format_version=FORMAT_VERSION,
            build=self.build,
            base_model=_BaseModel(name_or_path=self.base_model, fingerprint=self.fingerprint),
            tensors=f"ladder-{digest[:12]}.safetensors",
            sha256=digest,
            ranks={name: module.ranks for name, module in self.modules.items()},
        )
        write_atomically(folder / manifest.tensors, content, LadderError)
        write_atomically(folder / LADDER_NAME, (manifest.model_dump_json(indent=1) + "\n").encode(), LadderError)
        for old in folder.glob("ladder-*.safetensors"):
            if old.name != manifest.tensors:
                old.unlink()

    def save_peft(self, folder: str | Path) -> None:
        """Write the ladder at full rank as a plain PEFT adapter, for programs that know no ladders.

        `folder` may be the ladder's own, which stays a ladder. The factors then lie there twice, since programs that
        read PEFT's file refuse one with more in it.
        """
        from peft import LoraConfig

        folder = Path(folder)
        prefix = "base_model.model."
        tensors = {f"{prefix}{name}": tensor.contiguous() for name, tensor in self.saved_modules.items()}
        for name, module in self.modules.items():
            tensors[f"{prefix}{name}.lora_A.weight"] = module.down.contiguous()
            tensors[f"{prefix}{name}.lora_B.weight"] = module.up.contiguous()
        ranks = {name: module.rank for name, module in self.modules.items()}
        rank = max(ranks.values())
        ragged = {name: own for name, own in ranks.items() if own != rank}
        config = LoraConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=self.base_model,
            inference_mode=True,
            r=rank,
            lora_alpha=rank,  # and so for every module: the factors hold the scale
            rank_pattern=ragged,
            alpha_pattern=dict(ragged),
            target_modules=sorted(ranks),
            modules_to_save=sorted({name.rpartition(".")[0] for name in self.saved_modules}) or None,
        )
        content = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
        write_atomically(folder / WEIGHTS_NAME, serialise(tensors, {"format": "pt"}), LadderError)
        write_atomically(folder / PEFT_CONFIG_NAME, json.dumps(content, indent=2).encode(), LadderError)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> RankLadder:
        """Read a ladder that `save_pretrained` wrote; the tensors stay memory-mapped.

        Raises:
            LadderError: A file is missing, cut off or altered.
        """
        folder = Path(folder)
        manifest = _Manifest.read(folder / LADDER_NAME)
        path = folder / manifest.tensors
        tensors = _open_tensors(path, manifest.sha256)
        try:
            modules = {
                name: LadderModule(
                    tensors.pop(f"{name}/up"), tensors.pop(f"{name}/down"), tensors.pop(f"{name}/sigma"), tuple(ranks)
                )
                for name, ranks in manifest.ranks.items()
            }
            prefix = "saved_modules/"
            saved = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            learned = _learned(tensors)
            ladder = cls(modules, manifest.base_model.name_or_path, manifest.build, saved, learned)
        except (KeyError, LadderError) as error:
            raise LadderError(f"{folder}: {LADDER_NAME} and {path.name} do not fit together ({error})") from None
        if ladder.fingerprint != manifest.base_model.fingerprint:
            raise LadderError(
                f"{folder / LADDER_NAME}: base_model.fingerprint is not that of the tensors; build it anew"
            )
        return ladder


class _BaseModel(BaseModel):
    name_or_path: str | None
    fingerprint: str


class _Manifest(BaseModel):
    """What `ladder.json` holds."""

    model_config = ConfigDict(extra="forbid", strict=False)

    format_version: int
    build: Build
    base_model: _BaseModel
    tensors: str = Field(pattern=r"^ladder-[0-9a-f]{12}\.safetensors$")
    sha256: str
    ranks: dict[str, tuple[int, ...]]

    @classmethod
    def read(cls, path: Path) -> _Manifest:
        text = read_text(path, LadderError)
        try:
            manifest = cls.model_validate_json(text)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"])) or "file"
            raise LadderError(f"{path}: {where}: {problem['msg']}; build the ladder anew") from None
        if manifest.format_version != FORMAT_VERSION:
            raise LadderError(
                f"{path}: format_version is {manifest.format_version}, this release reads {FORMAT_VERSION}; "
                "build the ladder anew, or use the release that wrote it"
            )
        return manifest


def _open_tensors(path: Path, sha256: str) -> dict[str, Tensor]:
    """Memory-mapped tensors of a file whose content hash is known."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != sha256:
            raise LadderError(f"{path}: was cut off or altered (its SHA-256 is not the one noted); build it anew")
        with safe_open(path, "pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise LadderError(f"{path}: cannot be read ({error})") from None


def _learned(tensors: Mapping[str, Tensor]) -> LearnedComplexity | None:
    prefix = "learned/"
    values = {name.removeprefix(prefix): t.float().numpy() for name, t in tensors.items() if name.startswith(prefix)}
    if not values:
        return None
    if values.keys() != {one.name for one in fields(LearnedComplexity)}:
        raise LadderError(f"what was learned holds {', '.join(sorted(values))}")
    for name, value in values.items():
        wanted = (len(SIGNALS),) if name in ("weights", "means") else (value.size,)
        if value.shape != wanted or not np.isfinite(value).all():
            raise LadderError(f"{prefix}{name} must be {wanted} finite numbers")
    return LearnedComplexity(**values)


def even_ranks(rank: int, steps: int) -> tuple[int, ...]:
    """Ranks of one module on `steps` + 1 rungs, evenly from 0 to `rank`."""
    return tuple(round(step * rank / steps) for step in range(steps + 1))


def _decompose(b: Tensor, a: Tensor, scale: float, steps: int) -> LadderModule:
    """The SVD of scale * b @ a, b (out, r) and a (r, in), in O((in + out) r^2)."""
    q_up, r_up = torch.linalg.qr(scale * b.double())
    q_down, r_down = torch.linalg.qr(a.double().T)
    u, sigma, v = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    up, down = q_up @ u, sigma[:, None] * (v @ q_down.T)
    return LadderModule(up.float(), down.float(), sigma.float(), even_ranks(len(sigma), steps))


def _as_trained(b: Tensor, a: Tensor, scale: float, steps: int) -> LadderModule:
    """The directions of scale * b @ a as they are."""
    up, down = scale * b.float(), a.float()
    sigma = up.norm(dim=0) * down.norm(dim=1)
    return LadderModule(up, down.contiguous(), sigma, even_ranks(len(sigma), steps))


def _reweight(module: LadderModule, moment: Tensor, output: Tensor | None = None) -> LadderModule:
    """The directions of `up @ down` in the norm of inputs whose z = down @ x has second moment `moment`, and of
    outputs that matter as `output` says; by default all alike."""
    g_half, g_inverse_half = _roots(moment)
    if output is not None and output.any():
        s_half, s_inverse_half = _roots(output)
        back = module.up.double() @ s_inverse_half
    else:  # errors count by their length, and up = q r with an orthonormal q
        back, s_half = torch.linalg.qr(module.up.double())
    u, sigma, v = torch.linalg.svd(s_half @ g_half, full_matrices=False)
    up, down = back @ u, sigma[:, None] * (v @ g_inverse_half @ module.down.double())
    return LadderModule(up.to(module.up.dtype), down.to(module.down.dtype), sigma.float(), module.ranks)


def _roots(moment: Tensor, ridge: float = 1e-4) -> tuple[Tensor, Tensor]:
    """The square root of a second moment and its inverse, in float64.

    The ridge, relative to the mean of the diagonal, keeps unseen directions finite.
    """
    g = moment.double()
    g = g + ridge * g.diagonal().mean() * torch.eye(len(g), dtype=g.dtype)
    values, vectors = torch.linalg.eigh(g)
    root = values.clamp_min(1e-300).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def describe(ladder: RankLadder) -> dict[str, Any]:
    """Ranks and energy kept per rung and module, for tables and JSON."""
    return {
        "base_model": ladder.base_model,
        "build": ladder.build,
        "rung_ranks": ladder.rung_ranks,
        "modules": {
            name: {
                "in": module.down.shape[1],
                "out": module.up.shape[0],
                "ranks": module.ranks,
                "sigma": module.sigma.tolist(),
                "energy": [module.energy(k) for k in module.ranks],
            }
            for name, module in ladder.modules.items()
        },
    }
