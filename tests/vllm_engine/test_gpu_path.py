"""The Triton backend gives vLLM the tokens of plain products. Without a GPU, it runs in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from chunkwise_lora.backends.torch_products import TorchBackend
from chunkwise_lora.engines.requested_config import KEY
from conftest import E2E, OPTIONS, WIKI, Engine

PROMPTS, ADAPTERS, TOKENS = ["The king", "name[The Eagle]", "He said"], [WIKI, E2E, None], 3
TRITON = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from chunkwise_lora.engines.vllm import manager
from chunkwise_lora.backends.triton.backend import TritonBackend
manager.backend_on = TritonBackend
options, prompts, adapters, tokens = json.load(sys.stdin)
llm = LLM(**options)
assert options["enforce_eager"] or llm.llm_engine.vllm_config.compilation_config.cudagraph_mode.value, "no graphs"
requests = [path and LoRARequest(path, 1 + number, path) for number, path in enumerate(adapters)]
params = [
    SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True,
                   extra_args=path and {"chunkwise_preset": "balanced"})
    for path in adapters
]
outputs = llm.generate(prompts, params, lora_request=requests, use_tqdm=False)
print("\\n" + json.dumps([list(one.outputs[0].token_ids) for one in outputs]))
"""


GRAPHS = {"enforce_eager": False, "additional_config": {KEY: {"cuda_graphs": True}}}
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


@pytest.mark.parametrize("options", [{}, pytest.param(GRAPHS, marks=NEEDS_GPU)], ids=["eager", "graphs"])
def test_triton_gives_the_tokens_of_products(
    options: dict[str, Any], new_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    done = subprocess.run(
        [sys.executable, "-c", TRITON],
        input=json.dumps([OPTIONS | options, PROMPTS, ADAPTERS, TOKENS]),
        env={**os.environ, "TRITON_INTERPRET": "0" if torch.cuda.is_available() else "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]

    from chunkwise_lora.engines.vllm import manager

    monkeypatch.setattr(manager, "backend_on", TorchBackend)
    engine = new_engine()
    for number, (prompt, adapter) in enumerate(zip(PROMPTS, ADAPTERS, strict=True)):
        engine.add(str(number), prompt, adapter, TOKENS, **({"chunkwise_preset": "balanced"} if adapter else {}))
    expected = engine.run()
    assert json.loads(done.stdout.splitlines()[-1]) == [expected[str(number)] for number in range(len(PROMPTS))]
