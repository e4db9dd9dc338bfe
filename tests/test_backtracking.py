"""Adapters whose regular expressions could keep PEFT busy without end are refused before PEFT reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from chunkwise_lora import LadderError
from chunkwise_lora.benchmark.methods import methods
from chunkwise_lora.evaluation.baselines import Comparison, MethodSelection
from chunkwise_lora.ladder.backtracking import refuse_backtracking
from models import ADAPTERS, adapter, build

HARMFUL = {
    "nested repeats": r"([a-z0-9_.]+)+!",
    "alternatives in a repeat": r"(a|a)+!",
    "optional in a repeat": r"(a?)+!",
    "a reference": r"(.+)\1!",
    "many repeats": ".*a" * 5,
    "too long": "a" * 5000,
    "no expression": "(",
}


def with_field(folder: Path, field: str, value: Any) -> Path:
    """A copy of an adapter with another value of one field."""
    shutil.copytree(adapter("llama", "one_layer"), folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    return folder


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern", "target_modules", "modules_to_save"])
@pytest.mark.parametrize("expression", HARMFUL.values(), ids=HARMFUL)
def test_a_harmful_expression_is_refused_by_file_and_field(tmp_path: Path, field: str, expression: str) -> None:
    value = {"target_modules": expression, "modules_to_save": [expression]}.get(field, {expression: 4})
    with pytest.raises(LadderError, match=rf"adapter_config\.json: {field}"):
        refuse_backtracking(with_field(tmp_path / "adapter", field, value))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_adapters_of_the_tests_are_not_refused(kind: str) -> None:
    refuse_backtracking(adapter("llama", kind))


@pytest.mark.parametrize(
    "expression",
    [
        r"model\.layers\.[0-9]+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
        r"^(?!.*vision).*(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?",
        r".*\.(?:[1-9]|1[0-9])\.mlp\.(?:down|up)_proj$",
    ],
)
def test_expressions_in_use_are_not_refused(tmp_path: Path, expression: str) -> None:
    refuse_backtracking(with_field(tmp_path / "adapter", "target_modules", expression))


def test_an_evaluation_and_a_benchmark_refuse_them_before_peft_loads_anything(tmp_path: Path) -> None:
    harmful = with_field(tmp_path / "adapter", "alpha_pattern", {HARMFUL["nested repeats"]: 16})
    base = build("llama")
    with pytest.raises(LadderError, match="alpha_pattern"):
        methods(base, {"harmful": harmful}, {})
    with pytest.raises(LadderError, match="alpha_pattern"):
        Comparison(base, harmful).methods(MethodSelection(["lossless"]), torch.ones(1, 4, dtype=torch.long))
