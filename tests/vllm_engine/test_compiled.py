"""Compiled and sharded models generate the tokens of plain ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import E2E, OPTIONS, PROMPTS, WIKI, Engine

SHARDED = """
import json, sys
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    options, prompts, adapters = json.load(sys.stdin)
    llm = LLM(**options, tensor_parallel_size=2)
    ids = {path: number for number, path in enumerate(dict.fromkeys(filter(None, adapters)), 1)}
    requests = [path and LoRARequest(path, ids[path], path) for path in adapters]
    extra = {"chunkwise_preset": "balanced"}
    params = [
        SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, extra_args=path and extra) for path in adapters
    ]
    outputs = llm.generate(prompts, params, lora_request=requests, use_tqdm=False)
    print("\\n" + json.dumps([list(one.outputs[0].token_ids) for one in outputs]), flush=True)
"""


@pytest.fixture(scope="module")
def mixed(with_embedding: Path) -> list[str | None]:
    """The adapters of a mixed batch. The last one adapts the token embedding, too."""
    return [WIKI, E2E, None, str(with_embedding)]


@pytest.fixture(scope="module")
def plain(new_engine: Callable[..., Engine], mixed: list[str | None]) -> dict[str, list[int]]:
    """The tokens of an engine without compilation for a mixed batch."""
    return balanced(new_engine(), mixed)


def balanced(engine: Engine, adapters: list[str | None]) -> dict[str, list[int]]:
    for number, (prompt, adapter) in enumerate(zip(PROMPTS, adapters, strict=True)):
        engine.add(str(number), prompt, adapter, 16, **({"chunkwise_preset": "balanced"} if adapter else {}))
    return engine.run()


def test_no_plan_is_compiled_in(
    plain: dict[str, list[int]],
    mixed: list[str | None],
    new_engine: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CHUNKWISE_INDUCTOR=1 compiles for real; by default the model is only traced, which takes seconds, not minutes."""
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "0" if os.environ.get("CHUNKWISE_INDUCTOR") == "1" else "1")
    engine = new_engine(enforce_eager=False)
    assert engine.llm.llm_engine.vllm_config.compilation_config.mode != 0
    assert balanced(engine, mixed) == plain
    assert engine.greedy(PROMPTS, mixed, 8) != engine.greedy(PROMPTS, [None] * 4, 8)
    assert balanced(engine, mixed) == plain


def test_two_ranks_give_the_tokens_of_one(plain: dict[str, list[int]], mixed: list[str | None], tmp_path: Path) -> None:
    script = tmp_path / "sharded.py"  # a file, because workers import it when they start
    script.write_text(SHARDED)
    done = subprocess.run(
        [sys.executable, str(script)],
        input=json.dumps([OPTIONS, PROMPTS, mixed]),
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("[["))
    assert json.loads(line) == [plain[str(number)] for number in range(len(PROMPTS))]
