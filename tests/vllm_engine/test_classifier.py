"""Adapters of a classifier, with its head in `modules_to_save` or under LoRA, give what vLLM's own LoRA gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import small
from chunkwise_lora import ChunkWiseConfig, RankLadder
from chunkwise_lora.ladder.peft_files import CONFIG_NAME as CONFIG
from conftest import PROMPTS, WIKI, Engine, needs_vllm

WIDTH, LABELS = 256, 3
PREFIX = "base_model.model."
OWN = """
import json, sys
from vllm import LLM
from vllm.lora.request import LoRARequest
options, prompts, batches = json.load(sys.stdin)
llm = LLM(**options)
ids = {}
for adapters in batches:
    requests = [path and LoRARequest(path, ids.setdefault(path, len(ids) + 1), path) for path in adapters]
    outputs = llm.classify(prompts, lora_request=requests, use_tqdm=False)
    print("probabilities " + json.dumps([one.outputs.probs for one in outputs]))
"""


def adapter(folder: Path, extra: Mapping[str, Tensor] = {}, prefix: str = f"{PREFIX}model.", **changes: Any) -> Path:
    """The `wiki` adapter with further tensors and another config."""
    folder.mkdir()
    tensors = load_file(f"{WIKI}/adapter_model.safetensors")
    tensors = {name.replace(f"{PREFIX}model.", prefix): tensor for name, tensor in tensors.items()}
    save_file(
        {**tensors, **{f"{PREFIX}{name}": tensor for name, tensor in extra.items()}},
        folder / "adapter_model.safetensors",
    )
    config = json.loads(Path(WIKI, CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes, "task_type": "SEQ_CLS"}))
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Adapters of a classifier, by what they hold."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(1)
    targets = [*json.loads(Path(WIKI, CONFIG).read_text())["target_modules"], "score"]
    lora = {"score.lora_A.weight": torch.randn(16, WIDTH), "score.lora_B.weight": 0.1 * torch.randn(LABELS, 16)}
    found = {
        "no head": Path(WIKI),
        "head": adapter(folder / "head", {"score.weight": 0.1 * torch.randn(LABELS, WIDTH)}, modules_to_save=["score"]),
        "fewer labels": adapter(
            folder / "fewer",
            {"score.weight": 0.1 * torch.randn(2, WIDTH), "score.bias": torch.randn(2)},
            modules_to_save=["score"],
        ),
        "LoRA on the head": adapter(folder / "lora", lora, target_modules=targets),
        "names without model": adapter(folder / "bare", prefix=PREFIX),
    }
    return {name: str(path) for name, path in found.items()}


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options of an engine for a classifier with a random head."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(small.BASE, num_labels=LABELS)
    model.config.pad_token_id = 0
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(small.BASE).save_pretrained(folder)
    return {
        "model": str(folder),
        "runner": "pooling",
        "dtype": "float32",
        "max_model_len": 256,
        "enforce_eager": True,
        "enable_lora": True,
        "max_loras": 6,
        "max_lora_rank": 16,
        "max_num_seqs": 8,
    }


@pytest.fixture(scope="module")
def llm(options: dict[str, Any]) -> Iterator[Any]:
    needs_vllm("0.31")  # before, adapters of a head are refused
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm = LLM(**options)
    yield llm
    del llm
    cleanup_dist_env_and_memory()


def probabilities(llm: Any, paths: list[str | None]) -> list[list[float]]:
    from vllm.lora.request import LoRARequest

    requests = [path and LoRARequest(path, 1 + abs(hash(path)) % 2**30, path) for path in paths]
    outputs = llm.classify(PROMPTS, lora_request=requests, use_tqdm=False)
    return [output.outputs.probs for output in outputs]


def test_classifiers_give_the_probabilities_of_vllms_own_lora(
    llm: Any, options: dict[str, Any], adapters: dict[str, str]
) -> None:
    every = list(adapters.values())
    batches: list[list[str | None]] = [
        *([path] * 4 for path in every),
        [None, *every[:3]],
        [every[3], None, every[1], None],
    ]
    done = subprocess.run(
        [sys.executable, "-c", OWN],
        input=json.dumps([options, PROMPTS, batches]),
        env={**os.environ, "CHUNKWISE_VLLM": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.partition(" ")[2] for line in done.stdout.splitlines() if line.startswith("probabilities ")]
    answers = []
    for paths, line in zip(batches, lines, strict=True):
        answers.append(probabilities(llm, paths))
        for ours, own in zip(answers[-1], json.loads(line), strict=True):
            assert ours == pytest.approx(own, abs=1e-4)
    plain, head, fewer, lora, bare, *_ = (answer[0] for answer in answers)
    assert plain == pytest.approx(bare)
    assert len({tuple(one) for one in (plain, head, fewer, lora)}) == 4
    assert len(fewer) == 2


def test_lora_on_the_head_follows_the_plan(llm: Any, adapters: dict[str, str], tmp_path: Path) -> None:
    ladder = RankLadder.from_peft(adapters["LoRA on the head"])
    replace(ladder, policy=ChunkWiseConfig.uniform(0.0)).save_pretrained(tmp_path)
    for ours, base in zip(probabilities(llm, [str(tmp_path)] * 4), probabilities(llm, [None] * 4), strict=True):
        assert ours == pytest.approx(base, abs=1e-6)


def test_a_head_of_other_inputs_is_refused(llm: Any, adapters: dict[str, str], tmp_path: Path) -> None:
    wrong = adapter(tmp_path / "wrong", {"score.weight": torch.randn(LABELS, 64)}, modules_to_save=["score"])
    with pytest.raises(ValueError, match=r"replaces score\.weight \(3, 64\) .* has the head score with 256 inputs"):
        probabilities(llm, [None, str(wrong), None, None])
    assert probabilities(llm, [None, adapters["head"], None, None])


def test_a_head_is_refused_where_the_model_has_none(engine: Engine, adapters: dict[str, str]) -> None:
    """The last test, because it replaces the engine of this module."""
    (output,) = engine.llm.generate(
        PROMPTS[:1], engine.params(4), lora_request=engine.adapter(adapters["head"]), use_tqdm=False
    )
    assert output.outputs[0].finish_reason == "error"
    assert "LlamaForCausalLM in vLLM has no head of a classifier" in output.outputs[0].stop_reason
    assert engine.greedy(PROMPTS[:1], [WIKI], 4)
