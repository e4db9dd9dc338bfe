"""Compiled and sharded models give the tokens of plain ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from transformers import AutoConfig

from chunkwise_lora import embedded
from chunkwise_lora.evaluation.shapes import random_adapter
from conftest import E2E, OPTIONS, PROMPTS, WIKI, Engine

SHARDED = """
import json, sys
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    options, prompts, adapters, preset = json.load(sys.stdin)
    llm = LLM(**options, tensor_parallel_size=2)
    requests = [path and LoRARequest(path, 1 + (path == adapters[0]), path) for path in adapters]
    params = [
        SamplingParams(
            temperature=0, max_tokens=16, ignore_eos=True, extra_args={"chunkwise_preset": preset} if path else None
        )
        for path in adapters
    ]
    outputs = llm.generate(prompts, params, lora_request=requests, use_tqdm=False)
    print("\\n" + json.dumps([list(one.outputs[0].token_ids) for one in outputs]))
"""


def test_no_plan_is_compiled_in(new_engine: Callable[..., Engine], tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(embedded.BASE)
    config.num_hidden_layers = 1
    adapters = [str(random_adapter(config, rank, tmp_path / str(rank))) for rank in (8, 24)]
    options = {"load_format": "dummy", "hf_overrides": {"num_hidden_layers": 1}}
    given = []
    for eager in (True, False):
        engine = new_engine(**options, enforce_eager=eager)
        assert (engine.llm.llm_engine.vllm_config.compilation_config.mode == 0) == eager
        mixed = [adapters[0], None, adapters[1], adapters[0]]
        given.append(
            [
                engine.greedy(PROMPTS, mixed, 16),
                engine.greedy(PROMPTS, [adapters[1]] * 4, 16, chunkwise_preset="balanced"),
                engine.greedy(PROMPTS, [None] * 4, 16),
            ]
        )
    assert given[0] == given[1]
    assert given[0][0] != given[0][2]


def test_two_ranks_give_the_tokens_of_one(new_engine: Callable[..., Engine], tmp_path: Path) -> None:
    adapters = [WIKI, E2E, None, WIKI]
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    done = subprocess.run(
        [sys.executable, str(script)],
        input=json.dumps([OPTIONS, PROMPTS, adapters, "balanced"]),
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    engine = new_engine()
    for number, (prompt, adapter) in enumerate(zip(PROMPTS, adapters, strict=True)):
        extra = {"chunkwise_preset": "balanced"} if adapter else {}
        engine.add(str(number), prompt, adapter, 16, **extra)
    given = engine.run()
    assert json.loads(done.stdout.splitlines()[-1]) == [given[str(number)] for number in range(4)]
