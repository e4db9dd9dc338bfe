"""More than 20,000 damaged folders: each loads as a valid ladder, or is refused by a `ChunkWiseError`."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from peft import EvaConfig, LoraConfig
from safetensors.torch import save

from chunkwise_lora import ChunkWiseConfig, ChunkWiseError, RankLadder, RuntimeScheduler
from chunkwise_lora.ladder import describe, is_ladder
from chunkwise_lora.ladder.adapter_source import AdapterSource
from chunkwise_lora.method.complexity import SIGNALS, LearnedComplexity
from mutations import mutate_json, mutate_tensors, unpack

CASES = 7_000
"""Number of damaged folders of each kind."""

MODULES = {"model.layers.0.self_attn.q_proj": (5, 6, 4), "model.layers.0.mlp.up_proj": (7, 6, 2)}
"""Outputs, inputs and rank of every module."""

Files = dict[str, bytes]


def adapter_files() -> Files:
    """A PEFT adapter with patterns and a replaced module."""
    generator = torch.Generator().manual_seed(0)
    prefix = "base_model.model."
    tensors = {f"{prefix}lm_head.weight": torch.randn(3, 6, generator=generator)}
    for name, (outputs, inputs, rank) in MODULES.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator)
        tensors[f"{prefix}{name}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "some/base",
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": False,
        "bias": "none",
        "target_modules": ["q_proj", "up_proj"],
        "modules_to_save": ["lm_head"],
        "rank_pattern": {"up_proj": 2},
        "alpha_pattern": {r"layers\.0\.mlp\..*": 3},
        "init_lora_weights": True,
        "use_dora": False,
    }
    return {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": save(tensors)}


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    """A temporary folder, in memory if the system has one."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="chunkwise-fuzz-", dir=memory) as folder:
        yield Path(folder)


def write_files(folder: Path, files: Files) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def format_2_files(scratch: Path) -> Files:
    """A ladder with a policy, a stored sigma and a learned estimator."""
    ladder = RankLadder.from_peft(write_files(scratch / "adapter", adapter_files()))
    ladder = ladder.sorted_by({name: torch.rand(m.rank) + 0.1 for name, m in ladder.modules.items()}, 3)
    ones = np.ones(5, np.float32)
    learned = LearnedComplexity(ones, ones, np.ones(len(SIGNALS), np.float32), np.zeros(len(SIGNALS), np.float32))
    ladder = replace(ladder, learned=learned, policy=ChunkWiseConfig(), rung_divergence=(0.5, 0.2, 0.1, 0.0))
    ladder.save_pretrained(scratch / "ladder")
    return {path.name: path.read_bytes() for path in (scratch / "ladder").iterdir()}


def format_1_files(scratch: Path) -> Files:
    """A ladder of format 1, which earlier releases wrote."""
    ladder = RankLadder.from_peft(write_files(scratch / "adapter", adapter_files()))
    tensors = {f"saved_modules/{name}": tensor for name, tensor in ladder.saved_modules.items()}
    for name, module in ladder.modules.items():
        tensors |= {f"{name}/up": module.up, f"{name}/down": module.down, f"{name}/sigma": module.sigma}
    for name in ("token", "previous"):
        tensors[f"learned/{name}"] = torch.ones(5)
    for name in ("weights", "means"):
        tensors[f"learned/{name}"] = torch.ones(len(SIGNALS))
    manifest = {
        "format_version": 1,
        "build": ladder.build,
        "base_model": {"name_or_path": "some/base", "fingerprint": ladder.fingerprint},
        "ranks": {name: list(module.ranks) for name, module in ladder.modules.items()},
    }
    files = {
        "ladder-000000000000.safetensors": save(tensors),
        "ladder.json": json.dumps(manifest).encode(),
        "chunkwise_config.json": ChunkWiseConfig().to_json().encode(),
    }
    return signed(files, Random(0))


def fingerprint(shapes: dict[str, tuple[int, int]]) -> str:
    lines = [f"{name} {outputs} {inputs}\n" for name, (outputs, inputs) in sorted(shapes.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def signed(files: Files, draw: Random) -> Files:
    """The same files with correct checksums and fingerprint, so that the damage behind them is reached."""
    files = dict(files)
    name = "chunkwise.json" if "chunkwise.json" in files else "ladder.json"
    try:
        manifest = json.loads(files[name])
        if name == "chunkwise.json":
            manifest["files"] = {
                one: hashlib.sha256(files[one]).hexdigest() for one in files if one in manifest["files"] and one != name
            }
            weights, up, down = files["adapter_model.safetensors"], "base_model.model.{}.lora_B.weight", ""
            down = up.replace("lora_B", "lora_A")
        else:
            (old,) = (one for one in files if one.startswith("ladder-"))
            digest = hashlib.sha256(files[old]).hexdigest()
            manifest |= {"sha256": digest, "tensors": f"ladder-{digest[:12]}.safetensors"}
            weights = files[manifest["tensors"]] = files.pop(old)
            up, down = "{}/up", "{}/down"
        if draw.random() < 0.9:
            tensors = unpack(weights)
            shapes = {
                one: (tensors[up.format(one)].shape[0], tensors[down.format(one)].shape[1]) for one in manifest["ranks"]
            }
            manifest["base_model"]["fingerprint"] = fingerprint(shapes)
    except Exception:  # too damaged to be signed
        return files
    files[name] = json.dumps(manifest).encode()
    return files


def mutated(files: Files, draw: Random) -> Files:
    """One to three changes of one or two files."""
    changed = dict(files)
    for name in draw.sample(sorted(files), draw.choice([1, 1, 1, 2]) if len(files) > 1 else 1):
        mutate = mutate_json if name.endswith(".json") else mutate_tensors
        changed[name] = mutate(files[name], draw, draw.choice([1, 1, 2, 3]))
    if draw.random() < 0.01:
        changed.pop(draw.choice(sorted(changed)))
    if draw.random() < 0.9 and not {"chunkwise.json", "ladder.json"}.isdisjoint(changed):
        changed = signed(changed, draw)
    return changed


def assert_valid(ladder: RankLadder) -> None:
    """Check that everything that a ladder is used for works."""
    assert len({len(module.ranks) for module in ladder.modules.values()}) == 1
    for name, module in ladder.modules.items():
        assert name.isprintable() and name
        outputs, rank = module.up.shape
        assert module.down.shape[0] == rank == len(module.sigma) == module.ranks[-1] > 0 < outputs * module.cost
        assert list(module.ranks) == sorted(module.ranks) and module.ranks[0] >= 0
        assert {module.up.dtype, module.down.dtype} <= {torch.float32, torch.bfloat16, torch.float16}
        assert module.sigma.dtype == torch.float32 and module.sigma.isfinite().all() and (module.sigma >= 0).all()
        assert (module.up.float() @ module.down.float()).isfinite().all()
        assert module.gate_table().shape == (ladder.rungs, rank)
        assert all(0 <= module.energy(k) <= 1 + 1e-6 for k in module.ranks)
    assert all(math.isfinite(rank) for rank in ladder.rung_ranks)
    for name, tensor in ladder.saved_modules.items():
        assert name.isprintable() and tensor.numel() and tensor.is_floating_point() and tensor.isfinite().all()
    json.dumps(describe(ladder), allow_nan=False).encode()
    if ladder.policy is not None:
        assert ChunkWiseConfig.from_json(ladder.policy.to_json()) == ladder.policy
        assert_plans(ladder.policy, ladder.rung_ranks, ladder.learned)


def assert_plans(
    config: ChunkWiseConfig, rung_ranks: Sequence[float] = (0.0, 1.0, 2.0), learned: LearnedComplexity | None = None
) -> None:
    """Check that a scheduler can follow the config."""
    if config.complexity.learned and learned is None:
        return
    plan = RuntimeScheduler(config, rung_ranks, 9, learned).step([1, 2, 3, 2, 8, 1], [None, 0.5, 1.0, 0.0, 2.0, 0.1])
    assert plan.weights.shape == (6, len(rung_ranks)) and np.isfinite(plan.weights).all()


def assert_round_trip(ladder: RankLadder, folder: Path) -> None:
    """Check that the ladder can be saved, and loads again as the same ladder."""
    ladder.save_pretrained(folder)
    again = RankLadder.load(folder)
    assert again.fingerprint == ladder.fingerprint and again.rung_ranks == ladder.rung_ranks
    assert again.policy == ladder.policy and again.base_model == ladder.base_model
    for name, module in ladder.modules.items():
        assert torch.equal(again.modules[name].up, module.up) and torch.equal(again.modules[name].down, module.down)
    assert again.saved_modules.keys() == ladder.saved_modules.keys()


def loaded(folder: Path) -> RankLadder | None:
    try:
        return RankLadder.load(folder)
    except ChunkWiseError:
        return None


KINDS: dict[str, Callable[[Path], Files]] = {
    "a PEFT adapter": lambda scratch: adapter_files(),
    "a ladder of format 2": format_2_files,
    "a ladder of format 1": format_1_files,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_folder_loads_as_valid_or_is_refused(kind: str, scratch: Path) -> None:
    torch.manual_seed(0)
    files = KINDS[kind](scratch)
    folder = scratch / "fuzz"
    assert_valid(RankLadder.load(write_files(scratch / kind, files)))
    accepted = 0
    for seed in range(CASES):
        draw = Random(f"{kind} {seed}")
        case = mutated(files, draw)
        write_files(folder, case)
        start = time.process_time()
        try:
            if (ladder := loaded(folder)) is not None:
                accepted += 1
                assert_valid(ladder)
                if accepted % 20 == 0:
                    assert_round_trip(ladder, scratch / "again")
                    if not is_ladder(folder):
                        assert_round_trip(RankLadder.from_peft(folder, as_trained=True), scratch / "again")
        except Exception:
            pytest.fail(f"{kind}, seed {seed}: {traceback.format_exc(limit=-6)}")
        assert time.process_time() - start < 20, f"{kind}, seed {seed}: took too long"
        for name in case:
            (folder / name).unlink()
    assert CASES // 20 < accepted < CASES // 2  # some folders must be refused and some must load


def test_a_damaged_adapter_of_any_kind_is_read_for_peft_or_refused(scratch: Path) -> None:
    options = {"r": 4, "rank_pattern": {"up_proj": 2}, "target_modules": ["q_proj", "up_proj"], "use_dora": True}
    files = adapter_files()
    (scratch / "any").mkdir()
    LoraConfig(**options, modules_to_save=["lm_head"], eva_config=EvaConfig()).save_pretrained(scratch / "any")
    files["adapter_config.json"] = (scratch / "any" / "adapter_config.json").read_bytes()
    accepted = 0
    for seed in range(3_000):
        write_files(scratch / "any", mutated(files, Random(f"any {seed}")))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                source = AdapterSource.load(scratch / "any")
                LoraConfig(**source.config)
        except ChunkWiseError:
            continue
        except Exception:
            pytest.fail(f"seed {seed}: {traceback.format_exc(limit=-6)}")
        accepted += 1
        assert all(name.startswith("base_model.model.") and tensor.numel() for name, tensor in source.tensors.items())
        assert all(tensor.isfinite().all() for tensor in source.tensors.values())
    assert 300 < accepted < 2_000


def test_a_damaged_config_is_read_or_refused() -> None:
    content = ChunkWiseConfig.preset("compact").to_json().encode()
    for seed in range(3_000):
        case = mutate_json(content, Random(seed), 2).decode(errors="replace")
        try:
            try:
                config = ChunkWiseConfig.from_json(case)
            except ChunkWiseError:
                continue
            assert ChunkWiseConfig.from_json(config.to_json()) == config
            assert_plans(config)
        except Exception:
            pytest.fail(f"seed {seed}: {traceback.format_exc(limit=-6)}")
