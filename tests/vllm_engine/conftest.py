"""vLLM engines that the tests share: with the plug-in in this process, without it in another process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import small
from chunkwise_lora.ladder.peft_files import CONFIG_NAME
from chunkwise_lora.method.sequence import SequencePlanner

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

os.environ.update(
    OMP_NUM_THREADS="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
)

WIKI, E2E = str(small.WIKI), str(small.E2E)
PROMPTS = [
    " = Karsund = \n \n Karsund is a town",
    "name[The Eagle], eatType[coffee shop], food[Japanese] =>",
    "The king said to his daughter that",
    " = Battle of the river = \n \n The battle was fought in",
]
BLOCK = 32
OPTIONS: dict[str, Any] = {
    "model": str(small.BASE),
    "dtype": "float32",
    "max_model_len": 512,
    "enforce_eager": True,
    "enable_lora": True,
    "max_loras": 8,
    "max_cpu_loras": 16,
    "max_lora_rank": 64,
    "max_num_seqs": 8,
    "block_size": BLOCK,
    "seed": 0,
}


def needs_vllm(version: str) -> None:
    """Skip a test in an older vLLM, in which what it tests is refused."""
    from chunkwise_lora.engines.vllm import versions

    if not versions.is_at_least(version):
        pytest.skip(f"needs vLLM {version}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests in this folder: they need vLLM."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.vllm)


@pytest.fixture(scope="module", autouse=True)
def _triton_as_it_is() -> Iterator[None]:
    """Make vLLM and its processes run without Triton's interpreter, which tests of the kernels may have chosen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        yield


class Engine:
    """A vLLM engine, and the plans of its requests."""

    def __init__(self, **options: Any) -> None:
        from vllm import LLM

        self.llm = LLM(**{**OPTIONS, **options})
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.runner = self.core.model_executor.driver_worker.worker.model_runner
        self.planner = self.runner.chunkwise.planner
        self.ids: dict[str, int] = {}
        self.plans: dict[str, SequencePlanner] = {}
        """The plan of every request that has ended, by the request's id."""
        close = self.planner.close

        def remember(requests: Sequence[str]) -> None:
            for request in requests:
                if (planner := self.planner.get(request)) is not None:
                    self.plans[request.rpartition("-")[0]] = planner
            close(requests)

        self.planner.close = remember

    def adapter(self, path: str | Path | None) -> Any:
        """The LoRARequest of an adapter; None for the base model."""
        from vllm.lora.request import LoRARequest

        if path is None:
            return None
        number = self.ids.setdefault(str(path), len(self.ids) + 1)
        return LoRARequest(f"adapter-{number}", number, str(path))

    def params(self, tokens: int, **extra: Any) -> Any:
        """Parameters for greedy sampling of `tokens` tokens. `extra` are the request's extra arguments."""
        from vllm import SamplingParams

        return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, extra_args=extra or None)

    def greedy(
        self, prompts: Sequence[Any], adapters: Sequence[str | Path | None], tokens: int = 64, **extra: Any
    ) -> list[list[int]]:
        """New tokens of a batch in which every prompt has an adapter or the base model."""
        outputs = self.llm.generate(
            prompts, self.params(tokens, **extra), lora_request=[self.adapter(one) for one in adapters], use_tqdm=False
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    def add(self, request: str, prompt: Any, adapter: str | Path | None, tokens: int, **extra: Any) -> None:
        """Queue a request, to be run by `step`."""
        self.llm.llm_engine.add_request(
            request, prompt, self.params(tokens, **extra), lora_request=self.adapter(adapter)
        )

    def step(self) -> dict[str, list[int]]:
        """Run one pass; returns the new tokens of the requests that it finished."""
        outputs = self.llm.llm_engine.step()
        return {one.request_id: list(one.outputs[0].token_ids) for one in outputs if one.finished}

    def run(self) -> dict[str, list[int]]:
        """Run passes until all requests have ended; returns their new tokens."""
        finished: dict[str, list[int]] = {}
        while self.llm.llm_engine.has_unfinished_requests():
            finished |= self.step()
        self.settle()
        return finished

    def settle(self) -> None:
        """Run the pass in which vLLM tells its workers that the last requests have ended."""
        while self.core.scheduler.has_finished_requests():
            self.core.step()

    def close(self) -> None:
        """Free the memory of this engine, so that another one can start."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        del self.llm, self.core, self.runner, self.planner
        cleanup_dist_env_and_memory()


@pytest.fixture(scope="module")
def new_engine() -> Iterator[Callable[..., Engine]]:
    """A function that makes an engine and closes the one before it."""
    engines: list[Engine] = []

    def make(**options: Any) -> Engine:
        for old in engines:
            old.close()
        engines[:] = [Engine(**options)]
        return engines[0]

    yield make
    for old in engines:
        old.close()


@pytest.fixture(scope="module")
def engine(new_engine: Callable[..., Engine]) -> Engine:
    """The engine that the tests of a module share."""
    return new_engine()


OWN_LORA = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
options, prompts, adapters, tokens = json.load(sys.stdin)
llm = LLM(**options)
ids = {path: number for number, path in enumerate(sorted({*filter(None, adapters)}), 1)}
requests = [path and LoRARequest(path, ids[path], path) for path in adapters]
params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
outputs = llm.generate(prompts, params, lora_request=requests, use_tqdm=False)
from chunkwise_lora.engines.vllm import plugin
assert not plugin._registered
print("\\n" + json.dumps([list(one.outputs[0].token_ids) for one in outputs]))
"""


def own_lora(prompts: Sequence[str], adapters: Sequence[str | None], tokens: int = 64) -> list[list[int]]:
    """New tokens of vLLM's own LoRA, in a process whose plug-in is switched off.

    It has more slots than adapters, because on a CPU a request without an adapter runs the last slot.
    """
    done = subprocess.run(
        [sys.executable, "-c", OWN_LORA],
        input=json.dumps([{**OPTIONS, "max_loras": 4, "max_lora_rank": 16}, prompts, adapters, tokens]),
        env={**os.environ, "CHUNKWISE_VLLM": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def with_embedding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `wiki` adapter with LoRA on the token embedding, too."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("with_embedding")
    adapter, config = load_file(f"{WIKI}/adapter_model.safetensors"), json.loads(Path(WIKI, CONFIG_NAME).read_text())
    torch.manual_seed(0)
    width, vocabulary = adapter["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape[1], 4096
    for side, shape in (("A", (config["r"], vocabulary)), ("B", (width, config["r"]))):
        adapter[f"base_model.model.model.embed_tokens.lora_embedding_{side}"] = 0.1 * torch.randn(shape)
    save_file(adapter, folder / "adapter_model.safetensors")
    changed = {**config, "target_modules": [*config["target_modules"], "embed_tokens"]}
    (folder / CONFIG_NAME).write_text(json.dumps(changed))
    return folder


@pytest.fixture(scope="session")
def example() -> Iterator[ModuleType]:
    """The module of the example that serves adapters."""
    examples = str(Path(__file__).parents[2] / "examples")
    sys.path.insert(0, examples)
    try:
        import vllm_server

        yield vllm_server
    finally:
        sys.path.remove(examples)
