"""The ladder equals the adapter at full rank, is optimal at lower ranks (by numpy), and is stored without loss."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import small
from chunkwise_lora import ChunkWiseConfig, ChunkWiseModel, LadderError, RankLadder
from chunkwise_lora.calibration.moments import second_moments
from chunkwise_lora.ladder import LADDER_NAME, LadderModule, describe, even_ranks, is_ladder, truncate
from chunkwise_lora.ladder.contents import Expectation
from chunkwise_lora.ladder.peft_adapter import PeftAdapter
from chunkwise_lora.ladder.tensors import learned_tensors
from chunkwise_lora.method.complexity import LearnedComplexity
from chunkwise_lora.method.config import ComplexityConfig
from models import ADAPTERS, adapter, build, linear_outputs_plus, peft_model, prompts

WEIGHTS = "adapter_model.safetensors"


def delta_weights(kind: str) -> dict[str, Tensor]:
    """The weight change s B A that PEFT computes for every module."""
    model = peft_model("llama", kind)
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def write_adapter(folder: Path, a: Tensor, b: Tensor, alpha: float = 16.0, **config: Any) -> Path:
    """An adapter of one module `proj`."""
    folder.mkdir(exist_ok=True)
    prefix = "base_model.model.proj.lora_"
    save_file(
        {f"{prefix}A.weight": a.contiguous(), f"{prefix}B.weight": b.contiguous()}, folder / "adapter_model.safetensors"
    )
    fields = {"peft_type": "LORA", "r": len(a), "lora_alpha": alpha, "target_modules": ["proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def same(first: RankLadder, second: RankLadder) -> bool:
    return (
        first.modules.keys() == second.modules.keys()
        and all(
            getattr(first, field) == getattr(second, field)
            for field in ("base_model", "build", "rung_ranks", "policy", "rung_divergence", "expectation")
        )
        and all(
            torch.equal(one.up, two.up)
            and torch.equal(one.down, two.down)
            and torch.allclose(one.sigma, two.sigma, rtol=1e-6 if one.up.dtype == torch.float32 else 0.02)
            and (one.up.dtype, one.down.dtype, one.ranks) == (two.up.dtype, two.down.dtype, two.ranks)
            for one, two in ((first.modules[name], second.modules[name]) for name in first.modules)
        )
        and first.saved_modules.keys() == second.saved_modules.keys()
        and all(torch.equal(first.saved_modules[name], second.saved_modules[name]) for name in first.saved_modules)
    )


@pytest.mark.parametrize("kind", ADAPTERS)
def test_full_rank_equals_pefts_delta_weight(kind: str) -> None:
    ladder, deltas = RankLadder.from_peft(adapter("llama", kind)), delta_weights(kind)
    assert ladder.modules.keys() == deltas.keys()
    for name, module in ladder.modules.items():
        assert torch.allclose(module.up @ module.down, deltas[name], atol=1e-5), name
        assert module.ranks[-1] == module.rank <= min(deltas[name].shape)


@given(
    rank=st.integers(1, 20),
    inputs=st.integers(1, 16),
    outputs=st.integers(1, 16),
    alpha=st.floats(0.1, 64),
    seed=st.integers(0, 1000),
)
def test_every_rank_has_the_error_of_numpys_svd(
    tmp_path_factory: pytest.TempPathFactory, rank: int, inputs: int, outputs: int, alpha: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)
    module = RankLadder.from_peft(write_adapter(tmp_path_factory.mktemp("adapter"), a, b, alpha)).modules["proj"]
    delta = (alpha / rank * b.double() @ a.double()).numpy()
    sigma = np.linalg.svd(delta, compute_uv=False)
    tolerance = 1e-5 * sigma[0]
    assert np.allclose(module.sigma.numpy(), sigma[: module.rank], atol=tolerance)
    for k in range(module.rank + 1):
        error = np.linalg.norm(delta - (module.up[:, :k].double() @ module.down[:k].double()).numpy())
        assert error == pytest.approx(np.linalg.norm(sigma[k:]), abs=10 * tolerance)
        assert module.energy(k) == pytest.approx((sigma[:k] ** 2).sum() / (sigma**2).sum(), abs=1e-5)


def test_as_trained_a_ladder_keeps_the_adapters_own_first_directions() -> None:
    source, ladder = PeftAdapter.load(adapter("llama")), RankLadder.from_peft(adapter("llama"), as_trained=True)
    for name, (a, b, scale) in source.factors.items():
        module = ladder.modules[name]
        for k in (1, module.rank):
            assert torch.allclose(module.up[:, :k] @ module.down[:k], scale * b[:, :k] @ a[:k], atol=1e-6)


def test_an_adapter_that_does_nothing_makes_a_ladder_that_does_nothing(tmp_path: Path) -> None:
    module = RankLadder.from_peft(write_adapter(tmp_path, torch.randn(4, 6), torch.zeros(5, 4))).modules["proj"]
    assert not (module.up @ module.down).any()
    assert module.energy(0) == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_an_adapter_of_any_float_dtype_becomes_a_float32_ladder(tmp_path: Path, dtype: torch.dtype) -> None:
    a, b = torch.randn(4, 6).to(dtype), torch.randn(5, 4).to(dtype)
    module = RankLadder.from_peft(write_adapter(tmp_path, a, b)).modules["proj"]
    assert module.up.dtype == module.down.dtype == torch.float32
    assert torch.allclose(module.up @ module.down, 4 * b.float() @ a.float(), atol=1e-5)


# Rungs


@given(rank=st.integers(1, 300), steps=st.integers(1, 16))
def test_even_ranks_rise_evenly_from_nothing_to_all(rank: int, steps: int) -> None:
    ranks = even_ranks(rank, steps)
    assert (len(ranks), ranks[0], ranks[-1]) == (steps + 1, 0, rank)
    assert all(abs(k - step * rank / steps) <= 0.5 for step, k in enumerate(ranks))


def test_gate_tables_switch_on_the_first_directions() -> None:
    module = RankLadder.from_peft(adapter("llama")).modules["model.layers.0.mlp.up_proj"]
    assert module.gate_table().sum(1).tolist() == list(module.ranks)
    assert (module.gate_table().diff(dim=1) <= 0).all()


def test_a_rungs_rank_is_the_mean_over_modules_weighted_by_the_cost_of_a_direction() -> None:
    ladder = RankLadder.from_peft(adapter("llama", "patterns"))
    costs = {name: sum(delta.shape) for name, delta in delta_weights("patterns").items()}
    for rung, rank in enumerate(ladder.rung_ranks):
        total = sum(module.ranks[rung] * costs[name] for name, module in ladder.modules.items())
        assert rank == pytest.approx(total / sum(costs.values()))
    assert list(ladder.rung_ranks) == sorted(ladder.rung_ranks)


def test_with_ranks_gives_every_module_its_own_rungs_and_keeps_the_directions() -> None:
    ladder = RankLadder.from_peft(adapter("llama"))
    ranks = {name: (index % 3, 4, module.rank) for index, (name, module) in enumerate(ladder.modules.items())}
    changed = ladder.with_ranks(ranks)
    assert changed.rungs == 3
    assert all(module.ranks == ranks[name] for name, module in changed.modules.items())
    assert all(module.up is ladder.modules[name].up for name, module in changed.modules.items())


@pytest.mark.parametrize(
    "change",
    [
        lambda ranks: ranks.popitem(),
        lambda ranks: ranks.update(no_such_module=(0, 8)),
        lambda ranks: ranks.update({next(iter(ranks)): (0, 4)}),
        lambda ranks: ranks.update({next(iter(ranks)): (4, 2, 8)}),
        lambda ranks: ranks.update({next(iter(ranks)): (-1, 8)}),
        lambda ranks: ranks.update({next(iter(ranks)): (0, 4, 8)}),
        lambda ranks: ranks.update({next(iter(ranks)): ()}),
    ],
    ids=["one missing", "one unknown", "not full rank", "falling", "negative", "other rungs", "none"],
)
def test_impossible_ranks_are_refused(change: Callable[[dict[str, tuple[int, ...]]], Any]) -> None:
    ladder = RankLadder.from_peft(adapter("llama"))
    ranks = {name: (0, module.rank) for name, module in ladder.modules.items()}
    change(ranks)
    with pytest.raises(LadderError):
        ladder.with_ranks(ranks)


def test_an_empty_ladder_is_refused() -> None:
    with pytest.raises(LadderError, match="module"):
        RankLadder({})


IMPOSSIBLE_FACTORS: dict[str, dict[str, Tensor]] = {
    "another rank in up": {"up": torch.ones(5, 3)},
    "another rank in down": {"down": torch.ones(3, 6)},
    "another rank in sigma": {"sigma": torch.ones(3)},
    "three dimensions": {"up": torch.ones(5, 4, 1)},
    "sigma of no dimension": {"sigma": torch.tensor(1.0)},
    "whole numbers": {"down": torch.ones(4, 6, dtype=torch.int8)},
    "NaN": {"sigma": torch.full((4,), float("nan"))},
}


@pytest.mark.parametrize("change", IMPOSSIBLE_FACTORS.values(), ids=IMPOSSIBLE_FACTORS)
def test_impossible_factors_are_refused_by_module(change: dict[str, Tensor]) -> None:
    factors = {"up": torch.ones(5, 4), "down": torch.ones(4, 6), "sigma": torch.ones(4)}
    assert RankLadder({"proj": LadderModule(**factors, ranks=(0, 4))}).rung_ranks == (0, 4)
    with pytest.raises(LadderError, match="proj"):
        RankLadder({"proj": LadderModule(**(factors | change), ranks=(0, 4))})


def test_a_scale_that_overflows_is_refused_by_module(tmp_path: Path) -> None:
    a, b = torch.full((4, 6), 1e20), torch.full((5, 4), 1e20)
    with pytest.raises(LadderError, match="proj"):
        RankLadder.from_peft(write_adapter(tmp_path, a, b))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64])
def test_a_ladder_in_another_dtype_is_refused_by_name(dtype: torch.dtype) -> None:
    with pytest.raises(LadderError, match=str(dtype)):
        RankLadder.from_peft(adapter("llama")).to(dtype)


def test_describe_is_plain_data_about_every_module() -> None:
    ladder = RankLadder.from_peft(adapter("llama"))
    described = json.loads(json.dumps(describe(ladder)))
    assert described["modules"].keys() == ladder.modules.keys()
    assert described["modules"]["model.layers.0.mlp.up_proj"]["energy"][-1] == pytest.approx(1)


# The data-aware ladder


def correlated(width: int, tokens: int, generator: torch.Generator) -> Tensor:
    mixing = torch.randn(width, width, generator=generator) * torch.logspace(0, -2, width)
    return torch.randn(tokens, width, generator=generator) @ mixing.T


@given(rank=st.integers(1, 6), inputs=st.integers(6, 12), outputs=st.integers(6, 12), seed=st.integers(0, 1000))
def test_the_data_aware_ladder_is_optimal_on_its_inputs_for_every_rank(
    tmp_path_factory: pytest.TempPathFactory, rank: int, inputs: int, outputs: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)
    plain = RankLadder.from_peft(write_adapter(tmp_path_factory.mktemp("adapter"), a, b))
    x = correlated(inputs, 400, generator)
    z = x @ plain.modules["proj"].down.T
    aware = plain.data_aware({"proj": z.T @ z / len(z)})
    delta = (16 / rank * b.double() @ a.double()).numpy()
    second_moment = (x.double().T @ x.double() / len(x)).numpy()
    values, vectors = np.linalg.eigh(second_moment)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    sigma = np.linalg.svd(delta @ root, compute_uv=False)

    def error(ladder: RankLadder, k: int) -> float:
        module = ladder.modules["proj"]
        missing = delta - (module.up[:, :k].double() @ module.down[:k].double()).numpy()
        return float(np.linalg.norm(missing @ root))

    scale = np.linalg.norm(sigma)
    for k in range(rank + 1):
        best = np.linalg.norm(sigma[k:])
        assert best - 1e-4 * scale <= error(aware, k) <= best + 2e-2 * scale
        assert error(aware, k) <= error(plain, k) + 2e-2 * scale
    assert error(aware, rank) < 1e-4 * scale
    assert (aware.build, plain.build) == ("data-aware", "svd")


def test_the_data_aware_ladder_beats_plain_svd_where_inputs_are_correlated(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(8, 24, generator=generator), torch.randn(24, 8, generator=generator)
    plain = RankLadder.from_peft(write_adapter(tmp_path, a, b))
    x = correlated(24, 1000, generator)
    z = x @ plain.modules["proj"].down.T
    aware = plain.data_aware({"proj": z.T @ z / len(z)})
    outputs = {"svd": plain.modules["proj"], "data-aware": aware.modules["proj"]}
    errors = {
        name: [float(((x @ m.down[k:].T) @ m.up[:, k:].T).square().sum()) for k in (2, 4, 6)]
        for name, m in outputs.items()
    }
    assert all(ours < 0.8 * theirs for ours, theirs in zip(errors["data-aware"], errors["svd"], strict=True))


def test_modules_without_moments_keep_their_plain_directions() -> None:
    plain = RankLadder.from_peft(adapter("llama"))
    seen, unseen, silent = list(plain.modules)[:3]
    aware = plain.data_aware({seen: torch.diag(torch.arange(1.0, 9.0)), silent: torch.zeros(8, 8)})
    assert aware.modules[unseen] is plain.modules[unseen]
    assert aware.modules[silent] is plain.modules[silent]
    assert not torch.equal(aware.modules[seen].up, plain.modules[seen].up)
    with pytest.raises(LadderError, match="nowhere"):
        plain.data_aware({"nowhere": torch.eye(8)})


def test_data_aware_keeps_rungs_and_dtype() -> None:
    ladder = RankLadder.from_peft(adapter("llama")).to(torch.bfloat16)
    ladder = ladder.with_ranks(dict.fromkeys(ladder.modules, (1, 3, 8)))
    name = next(iter(ladder.modules))
    module = ladder.data_aware({name: torch.eye(8)}).modules[name]
    assert (module.ranks, module.up.dtype, module.down.dtype) == ((1, 3, 8), torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize("moment", [torch.eye(7), torch.full((8, 8), float("nan"))], ids=["wrong shape", "NaN"])
def test_impossible_moments_are_refused(moment: Tensor) -> None:
    ladder = RankLadder.from_peft(adapter("llama"))
    name = next(iter(ladder.modules))
    with pytest.raises(LadderError, match=name):
        ladder.data_aware({name: moment})


def test_second_moments_are_those_of_the_modules_inputs_in_peft() -> None:
    model = ChunkWiseModel(build("llama"), adapter("llama"))
    batches = [prompts((9, 9))["input_ids"], prompts((9, 9), seed=4)["input_ids"]]
    moments = second_moments(model, batches)
    reference = peft_model("llama").get_base_model()
    inputs: dict[str, list[Tensor]] = {}

    def keep(name: str, x: Tensor) -> Tensor:
        inputs.setdefault(name, []).append(x.detach().flatten(0, 1))
        return torch.zeros(1)

    with torch.no_grad(), linear_outputs_plus(reference, keep, model.ladders["default"].modules):
        for batch in batches:
            reference(batch)
    assert moments.keys() == inputs.keys()
    for name, module in model.ladders["default"].modules.items():
        z = torch.cat(inputs[name]) @ module.down.T
        assert torch.allclose(moments[name], z.T @ z / len(z), rtol=1e-3, atol=1e-4), name
    assert not any(module._forward_pre_hooks for module in model.modules()), "hooks are left behind"


# On disk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["plain", "patterns", "saved_head"])
def test_a_saved_ladder_loads_unchanged(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    ladder = RankLadder.from_peft(adapter("llama", kind)).to(dtype)
    ladder.save_pretrained(tmp_path / "a" / "b")
    assert same(RankLadder.from_pretrained(tmp_path / "a" / "b"), ladder)
    assert same(RankLadder.load(tmp_path / "a" / "b"), ladder)


def test_load_takes_the_folder_of_an_adapter_too() -> None:
    assert same(RankLadder.load(adapter("llama")), RankLadder.from_peft(adapter("llama")))


def test_a_data_aware_ladder_with_its_own_ranks_loads_unchanged(tmp_path: Path) -> None:
    plain = RankLadder.from_peft(adapter("llama"))
    ladder = plain.with_ranks(dict.fromkeys(plain.modules, (2, 8))).data_aware(
        {next(iter(plain.modules)): torch.eye(8)}
    )
    ladder.save_pretrained(tmp_path)
    assert same(RankLadder.from_pretrained(tmp_path), ladder)


def test_saving_again_replaces_the_ladder_and_leaves_no_other_file(tmp_path: Path) -> None:
    RankLadder.from_peft(adapter("llama")).save_pretrained(tmp_path)
    second = RankLadder.from_peft(adapter("llama", seed=2))
    second.save_pretrained(tmp_path)
    second.save_pretrained(tmp_path)
    assert same(RankLadder.from_pretrained(tmp_path), second)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", WEIGHTS, LADDER_NAME}


def test_a_loaded_ladder_can_be_saved_over_itself(tmp_path: Path) -> None:
    RankLadder.from_peft(adapter("llama")).save_pretrained(tmp_path)
    loaded = RankLadder.from_pretrained(tmp_path)
    changed = loaded.with_ranks(dict.fromkeys(loaded.modules, (0, 8)))
    changed.save_pretrained(tmp_path)
    changed.to(torch.bfloat16).save_pretrained(tmp_path)
    assert same(RankLadder.from_pretrained(tmp_path), changed.to(torch.bfloat16))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_peft_reads_a_ladders_folder_as_the_adapter(tmp_path: Path, kind: str) -> None:
    RankLadder.from_peft(adapter("llama", kind)).save_pretrained(tmp_path)
    with torch.no_grad():
        expected = peft_model("llama", kind)(**prompts()).logits
        given = PeftModel.from_pretrained(build("llama"), str(tmp_path))(**prompts()).logits
    assert torch.allclose(given, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["saved_head", "saved_mlp", "saved_embedding", "tied_embedding"])
def test_replaced_modules_are_saved_under_pefts_names(tmp_path: Path, kind: str) -> None:
    RankLadder.from_peft(adapter("llama", kind)).save_pretrained(tmp_path)
    assert load_file(tmp_path / WEIGHTS).keys() == load_file(adapter("llama", kind) / WEIGHTS).keys()


def test_modules_whose_names_end_alike_keep_their_own_ranks(tmp_path: Path) -> None:
    module = RankLadder.from_peft(adapter("llama")).modules["model.layers.0.mlp.up_proj"]
    short = replace(module, up=module.up[:, :3], down=module.down[:3], sigma=module.sigma[:3], ranks=(0, 3))
    long = replace(module, ranks=(0, 8))
    for modules in ({"proj": short, "deep.proj": long}, {"proj": long, "deep.proj": short, "b.deep.proj": long}):
        RankLadder(modules).save_adapter(tmp_path)
        read = PeftAdapter.load(tmp_path).factors
        assert {name: len(a) for name, (a, _, _) in read.items()} == {name: m.rank for name, m in modules.items()}
        assert {scale for _, _, scale in read.values()} == {1.0}


def test_the_policy_and_what_was_measured_are_saved_with_the_ladder(tmp_path: Path) -> None:
    plain = RankLadder.from_peft(adapter("llama"))
    expectation = Expectation(asked_rank=None, mean_rank=4.1, loss_increase=0.004, loss_increase_error=0.001)
    divergence = (0.5, *[0.1] * 7, 0.0)
    policy = ChunkWiseConfig.preset("compact")
    ladder = replace(plain, policy=policy, rung_divergence=divergence, expectation=expectation)
    ladder.save_pretrained(tmp_path)
    assert same(RankLadder.load(tmp_path), ladder)
    assert describe(ladder)["rung_divergence"] == ladder.rung_divergence
    other = ladder.with_ranks({name: (0, m.rank) for name, m in ladder.modules.items()})
    assert other.rung_divergence is other.expectation is None


def test_a_policy_that_needs_a_learned_estimator_is_refused_without_one() -> None:
    learned = ChunkWiseConfig(complexity=ComplexityConfig(learned=True))
    with pytest.raises(LadderError, match=r"complexity\.learned"):
        replace(RankLadder.from_peft(adapter("llama")), policy=learned)


@pytest.mark.parametrize("divergence", [(0.0,), (float("nan"),) * 9])
def test_an_impossible_divergence_is_refused(divergence: tuple[float, ...]) -> None:
    with pytest.raises(LadderError, match="rung_divergence"):
        replace(RankLadder.from_peft(adapter("llama")), rung_divergence=divergence)


def test_factors_are_stored_once_and_sigma_only_if_it_was_learned(tmp_path: Path) -> None:
    plain = RankLadder.from_peft(adapter("llama"))
    plain.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "chunkwise.safetensors").exists()
    aware = plain.data_aware({next(iter(plain.modules)): torch.diag(torch.arange(1.0, 9.0))})
    aware.save_pretrained(tmp_path / "aware")
    assert all(name.startswith("sigma/") for name in load_file(tmp_path / "aware" / "chunkwise.safetensors"))
    assert same(RankLadder.load(tmp_path / "aware"), aware)


def test_a_base_name_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    ladder = replace(RankLadder.from_peft(adapter("llama")), base_model="\ud800")
    with pytest.raises(LadderError, match=r"base_model.*\\ud800"):
        ladder.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("factor", [1e-6, 1e-3, 1.0, 1e3, 1e6])
def test_float16_keeps_adapters_of_any_usual_size(factor: float) -> None:
    ladder = RankLadder.from_peft(adapter("llama"))
    for module in ladder.modules.values():
        scaled = replace(module, down=module.down * factor)
        stored, exact = scaled.to(torch.float16), scaled.up.double() @ scaled.down.double()
        error = (stored.up.double() @ stored.down.double() - exact).norm() / exact.norm()
        assert error < 2e-3  # float16 has 11 bits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_ladder_of_16_bits_takes_half_the_disk_and_runs_in_peft(dtype: torch.dtype, tmp_path: Path) -> None:
    whole = small.calibrated()
    whole.save_pretrained(tmp_path / "whole")
    whole.to(dtype).save_pretrained(tmp_path / "half")
    sizes = [(tmp_path / name / WEIGHTS).stat().st_size for name in ("whole", "half")]
    assert sizes[1] / sizes[0] == pytest.approx(0.5, abs=0.02)
    loaded = RankLadder.load(tmp_path / "half")
    assert (loaded.policy, loaded.rung_divergence) == (whole.policy, whole.rung_divergence)
    assert loaded.learned is not None and whole.learned is not None
    assert np.array_equal(loaded.learned.token, whole.learned.token)
    rounding = 4 * torch.finfo(dtype).eps
    for name, module in loaded.modules.items():
        exact = whole.modules[name]
        assert module.ranks == exact.ranks and torch.equal(module.sigma, exact.sigma)
        product = exact.up @ exact.down
        assert (module.up.float() @ module.down.float() - product).norm() < rounding * product.norm(), name
    base = AutoModelForCausalLM.from_pretrained(small.BASE, dtype=torch.float32).eval()
    ids = torch.randint(3, small.VOCABULARY, (1, 24))
    with ChunkWiseModel(base, loaded, ChunkWiseConfig.preset("lossless")) as model, torch.no_grad():
        ours = model(ids).logits
    with torch.no_grad():
        peft = PeftModel.from_pretrained(base, str(tmp_path / "half")).eval()(ids).logits
    assert torch.allclose(ours, peft, atol=1e-4)


def test_factors_beyond_float16_are_refused() -> None:
    ladder = RankLadder.from_peft(adapter("llama"))
    loud = {name: replace(module, up=module.up * 1e12) for name, module in ladder.modules.items()}
    with pytest.raises(LadderError, match="float16"):
        replace(ladder, modules=loud).to(torch.float16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.update(lora_alpha=16), "lora_alpha"),
        (lambda config: config.update(use_rslora=True), "use_rslora"),
        (lambda config: config.update(rank_pattern={"proj": 3}), "rank_pattern"),
    ],
)
def test_a_changed_config_with_which_peft_would_compute_another_function_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    RankLadder.from_peft(adapter("llama")).save_pretrained(tmp_path)
    path, manifest = tmp_path / "adapter_config.json", json.loads((tmp_path / LADDER_NAME).read_text())
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    manifest["files"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / LADDER_NAME).write_text(json.dumps(manifest))
    with pytest.raises(LadderError, match=rf"adapter_config\.json: {message}"):
        RankLadder.load(tmp_path)


# One rung as an adapter


def uneven(ladder: RankLadder) -> RankLadder:
    """A ladder on whose rungs modules differ in rank, and some have rank 0."""
    ranks = {name: (0, min(index, m.rank), m.rank) for index, (name, m) in enumerate(ladder.modules.items())}
    return replace(ladder.with_ranks(ranks), rung_divergence=(0.5, 0.1, 0.0))


@pytest.mark.parametrize("kind", ["plain", "patterns", "saved_mlp", "lm_head"])
def test_a_rung_is_written_as_a_plain_adapter(tmp_path: Path, kind: str) -> None:
    ladder = uneven(RankLadder.from_peft(adapter("llama", kind)))
    share = ladder.rung_ranks[1] / ladder.rung_ranks[-1]
    ladder.truncated(share).save_adapter(tmp_path)
    assert not is_ladder(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", WEIGHTS]
    expected = {name: m.up[:, : m.ranks[1]] @ m.down[: m.ranks[1]] for name, m in ladder.modules.items() if m.ranks[1]}
    read = RankLadder.load(tmp_path)
    assert read.modules.keys() == expected.keys()
    model = PeftModel.from_pretrained(build("llama"), str(tmp_path))
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert layers.keys() == expected.keys()
    for name, delta in expected.items():
        assert torch.allclose(read.modules[name].up @ read.modules[name].down, delta, atol=1e-5)
        assert torch.allclose(layers[name].get_delta_weight("default"), delta, atol=1e-5)
        assert read.modules[name].rank <= ladder.modules[name].ranks[1]


@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_an_equal_rank_needs_no_pattern(tmp_path: Path, share: float) -> None:
    ladder = RankLadder.from_peft(adapter("llama", "patterns"))
    ladder.truncated_equally(share).save_adapter(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    for name, (a, b, scale) in PeftAdapter.load(tmp_path).factors.items():
        module, k = ladder.modules[name], config["r"]
        assert len(a) == k and scale == 1
        assert torch.allclose(b @ a, module.up[:, :k] @ module.down[:k], atol=1e-5)


def test_a_truncation_reports_its_loss() -> None:
    ladder = uneven(RankLadder.from_peft(adapter("llama")))
    half = truncate(ladder, ladder.rung_ranks[1] / ladder.rung_ranks[-1])
    assert half.kl == 0.1
    assert 0.1 < half.energy_kept < 1
    assert (truncate(ladder, 1.0).kl, truncate(ladder, 1.0).energy_kept) == (0.0, 1.0)
    assert truncate(ladder, 0.5, one_rank=True).kl is None
    assert truncate(ladder, 1e-9).ladder.rung_ranks == half.ladder.rung_ranks, "the lowest rung above 0"


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, float("nan")])
def test_an_impossible_share_is_refused(share: float) -> None:
    with pytest.raises(LadderError, match="share above 0"):
        RankLadder.from_peft(adapter("llama")).truncated(share)


# Format 1


def write_format_1(ladder: RankLadder, folder: Path) -> None:
    """Write a ladder of format 1, as earlier releases did."""
    tensors = {f"saved_modules/{name}": tensor for name, tensor in ladder.saved_modules.items()}
    for name, module in ladder.modules.items():
        parts = {"up": module.up, "down": module.down, "sigma": module.sigma}
        tensors |= {f"{name}/{part}": tensor.contiguous() for part, tensor in parts.items()}
    if ladder.learned is not None:
        tensors |= learned_tensors(ladder.learned)
    content = save(tensors)
    digest = hashlib.sha256(content).hexdigest()
    manifest = {
        "format_version": 1,
        "build": ladder.build,
        "base_model": {"name_or_path": ladder.base_model, "fingerprint": ladder.fingerprint},
        "tensors": f"ladder-{digest[:12]}.safetensors",
        "sha256": digest,
        "ranks": {name: module.ranks for name, module in ladder.modules.items()},
    }
    folder.mkdir(exist_ok=True)
    (folder / f"ladder-{digest[:12]}.safetensors").write_bytes(content)
    (folder / "ladder.json").write_text(json.dumps(manifest))
    if ladder.policy is not None:
        (folder / "chunkwise_config.json").write_text(ladder.policy.to_json())


@pytest.mark.parametrize("kind", ["plain", "patterns", "saved_mlp"])
@pytest.mark.parametrize("policy", [None, ChunkWiseConfig(complexity=ComplexityConfig(learned=True))])
def test_a_ladder_of_format_1_is_read_and_saved_as_format_2(
    tmp_path: Path, kind: str, policy: ChunkWiseConfig | None
) -> None:
    learned = LearnedComplexity(np.ones(5), np.zeros(5), np.ones(4), np.zeros(4)) if policy else None
    ladder = replace(RankLadder.from_peft(adapter("llama", kind)), policy=policy, learned=learned)
    write_format_1(ladder, tmp_path)
    assert is_ladder(tmp_path)
    old = RankLadder.load(tmp_path)
    assert same(old, ladder)
    assert (old.learned is None) == (policy is None)
    old.save_pretrained(tmp_path)
    assert same(RankLadder.load(tmp_path), ladder)
    names = {"adapter_config.json", WEIGHTS, LADDER_NAME, *(["chunkwise.safetensors"] if policy else [])}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_damaged_ladder_of_format_1_is_refused(tmp_path: Path) -> None:
    write_format_1(RankLadder.from_peft(adapter("llama")), tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(LadderError, match=path.name):
        RankLadder.load(tmp_path)


def test_a_policy_in_the_folder_of_a_plain_adapter_is_used(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, torch.randn(4, 6), torch.randn(5, 4))
    (folder / "chunkwise_config.json").write_text(ChunkWiseConfig.preset("compact").to_json())
    assert RankLadder.load(folder).policy == ChunkWiseConfig.preset("compact")
