"""What this plug-in needs of vLLM: the versions that it was tested with and every internal function that it replaces.

vLLM's internal functions change between versions. `tests/vllm_engine/test_versions.py` compares this file with the
source of a version, so what a new version breaks is found by name.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any, NamedTuple

TESTED = ("0.30", "0.31", "0.32", "0.33")
"""Minor versions of vLLM that this plug-in was tested with."""


def is_tested(version: str) -> bool:
    """Return whether a version of vLLM, such as "0.32.1+cpu", is a release of one of the tested minor versions."""
    return ".".join(version.split(".")[:2]) in TESTED


def is_at_least(wanted: str, version: str | None = None) -> bool:
    """Return whether a version, by default that of the installed vLLM, is of the minor version `wanted` or newer."""
    from vllm import __version__

    return _minor(version or __version__) >= _minor(wanted)


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


MEMORY_SINCE = "0.31"
"""The first version in which a request can wait for the adapters' budget."""

_SERVING = "vllm.entrypoints.openai"
_MODELS = f"{_SERVING}.models.serving"


class Hook(NamedTuple):
    """A function of vLLM that the plug-in replaces."""

    module: str
    owner: str
    """Name of the class, or empty if the module owns the function."""
    name: str
    parameters: tuple[str, ...]
    """The function's first parameters: those that the plug-in reads, and those before them."""
    in_server: bool = False
    """The function belongs to the API server. In a process without one, it is not replaced."""
    since: str = TESTED[0]
    """The first version that has the function. In earlier ones, what needs it is refused."""

    def owners(self) -> list[Any]:
        """Return the object that has the function as an attribute: none, if the function need not be replaced.

        Raises:
            ImportError, AttributeError: This vLLM has no such function.
        """
        if (self.in_server and _MODELS not in sys.modules) or not is_at_least(self.since):
            return []
        module = import_module(self.module)
        owner = getattr(module, self.owner) if self.owner else module
        getattr(owner, self.name)
        return [owner]


HOOKS = {
    "load_lora_model": Hook(
        "vllm.v1.worker.lora_model_runner_mixin",
        "LoRAModelRunnerMixin",
        "load_lora_model",
        ("self", "model", "vllm_config", "device"),
    ),
    "check_and_update_config": Hook(
        "vllm.platforms", "current_platform", "check_and_update_config", ("cls", "vllm_config")
    ),
    "unsupported_by_v2": Hook("vllm.config", "VllmConfig", "_get_v2_model_runner_unsupported_features", ("self",)),
    "process_inputs": Hook(
        "vllm.v1.engine.input_processor", "InputProcessor", "process_inputs", ("self", "request_id", "prompt", "params")
    ),
    # Of the functions that give a block's extra keys, the only one that knows which tokens the block holds.
    "extra_hash_keys": Hook(
        "vllm.v1.core.kv_cache_utils",
        "",
        "_gen_prompt_embeds_extra_hash_keys",
        ("request", "start_token_idx", "end_token_idx"),
    ),
    "update_from_output": Hook(
        "vllm.v1.core.sched.scheduler",
        "Scheduler",
        "update_from_output",
        ("self", "scheduler_output", "model_runner_output"),
    ),
    "schedule": Hook("vllm.v1.core.sched.scheduler", "Scheduler", "schedule", ("self",)),
    "may_start": Hook(
        "vllm.v1.core.sched.scheduler",
        "Scheduler",
        "_handle_blocked_waiting_request",
        ("self", "request"),
        since=MEMORY_SINCE,
    ),
    "remove_lora": Hook("vllm.v1.engine.core", "EngineCore", "remove_lora", ("self", "lora_id")),
    "sleep": Hook("vllm.v1.engine.core", "EngineCore", "sleep", ("self", "level")),
    "make_request_output": Hook(
        "vllm.v1.engine.output_processor",
        "RequestState",
        "make_request_output",
        ("self", "new_token_ids", "pooling_output", "finish_reason", "stop_reason"),
    ),
    "metrics": Hook("vllm.v1.metrics.prometheus", "", "get_prometheus_registry", ()),
    # This module has imported the function by name.
    "metrics of the server": Hook(
        "vllm.entrypoints.serve.instrumentator.metrics", "", "get_prometheus_registry", (), in_server=True
    ),
    "load_adapter": Hook(
        _MODELS, "OpenAIServingModels", "load_lora_adapter", ("self", "request", "base_model_name"), in_server=True
    ),
    "check_new_adapter": Hook(
        _MODELS, "OpenAIServingModels", "_check_load_lora_adapter_request", ("self", "request"), in_server=True
    ),
    "unload_adapter": Hook(_MODELS, "OpenAIServingModels", "unload_lora_adapter", ("self", "request"), in_server=True),
    "completion_response": Hook(
        f"{_SERVING}.completion.serving",
        "OpenAIServingCompletion",
        "request_output_to_completion_response",
        ("self", "final_res_batch"),
        in_server=True,
    ),
    "chat_response": Hook(
        f"{_SERVING}.chat_completion.serving",
        "OpenAIServingChat",
        "chat_completion_full_generator",
        ("self", "request", "result_generator"),
        in_server=True,
    ),
    "beam search of completions": Hook(
        f"{_SERVING}.completion.protocol",
        "CompletionRequest",
        "to_beam_search_params",
        ("self", "max_tokens"),
        in_server=True,
    ),
    "beam search of chats": Hook(
        f"{_SERVING}.chat_completion.protocol",
        "ChatCompletionRequest",
        "to_beam_search_params",
        ("self", "max_tokens"),
        in_server=True,
    ),
}


def error_response(models: Any, error: Exception) -> Any:
    """Return the response by which vLLM's `OpenAIServingModels` answers a request with an error."""
    return sys.modules[_MODELS].create_error_response(error)
