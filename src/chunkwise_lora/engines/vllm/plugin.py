"""The entry point that vLLM calls in each of its processes."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

KNOWN_VERSIONS = ("0.32.0",)
"""Versions of vLLM that this plug-in was tested with. It wraps internal functions, which change between versions."""

_registered = False


def register() -> None:
    """Let vLLM run LoRA adapters as ladders. A second call changes nothing.

    CHUNKWISE_VLLM=0 turns the plug-in off. On an unknown version of vLLM it logs an error and changes nothing.
    """
    global _registered  # noqa: PLW0603
    if _registered or os.environ.get("CHUNKWISE_VLLM") == "0":
        return
    import vllm
    from vllm.logger import init_logger

    logger = init_logger("vllm.chunkwise")  # a child of vLLM's logger, so that its messages are shown
    version = vllm.__version__.partition("+")[0]
    if version not in KNOWN_VERSIONS:
        logger.error(
            "ChunkWise LoRA supports vLLM %s, not %s, and is off: adapters run as vLLM's own LoRA, and "
            "ladders cannot be loaded. Install a supported version, or a chunkwise-lora that supports yours.",
            ", ".join(KNOWN_VERSIONS),
            version,
        )
        return
    try:
        # Nothing is changed unless all functions can be wrapped.
        changes = [(owner, name, _wrapped(owner, name, around)) for owner, name, around in _changes()]
    except (ImportError, AttributeError) as error:
        logger.error(
            "ChunkWise LoRA does not find the functions that it wraps in this vLLM, and changes nothing: %s", error
        )
        return
    for owner, name, replacement in changes:
        setattr(owner, name, replacement)
    _registered = True
    logger.info("ChunkWise LoRA runs LoRA adapters as rank ladders")


def _changes() -> list[tuple[Any, str, Callable[..., Any]]]:
    """Return the functions of vLLM to wrap: (owner, name, wrapper). A wrapper gets the original function as its first
    argument."""
    from vllm.config import VllmConfig
    from vllm.model_executor.models import supports_lora
    from vllm.platforms import current_platform
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.metrics import prometheus
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    from chunkwise_lora.engines.vllm import frontend, metrics

    def load_lora_model(original: Callable[..., Any], runner: Any, model: Any, *rest: Any) -> Any:
        if not supports_lora(model):
            return original(runner, model, *rest)  # which raises the error
        from chunkwise_lora.engines.vllm.worker import load_ladder_model

        return load_ladder_model(runner, model, *rest)

    def check_and_update_config(original: Callable[..., Any], config: Any) -> None:
        lora = config.lora_config
        if lora is not None and current_platform.is_cpu():
            # On a CPU vLLM does not compile models with its own LoRA. With ladders it can, so LoRA is hidden here.
            config.lora_config = None
        try:
            original(config)
        finally:
            config.lora_config = lora
        if lora is not None:
            frontend.prepare(config)

    def unsupported_by_v2(original: Callable[..., Any], config: Any) -> list[str]:
        return [*original(config), *(["ChunkWise LoRA"] if config.lora_config is not None else [])]

    def process_inputs(original: Callable[..., Any], processor: Any, *arguments: Any, **options: Any) -> Any:
        request = original(processor, *arguments, **options)
        if processor.lora_config is not None:
            frontend.accept(processor.vllm_config, request)
        return request

    def extra_hash_keys(original: Callable[..., Any], request: Any, start: int, end: int) -> list[Any]:
        return [*original(request, start, end), *frontend.private_key(request, end)]

    def get_prometheus_registry(original: Callable[..., Any]) -> Any:
        registry = original()
        metrics.register(registry)
        return registry

    endpoint = sys.modules.get("vllm.entrypoints.serve.instrumentator.metrics")  # has imported the function by name
    return [
        (LoRAModelRunnerMixin, "load_lora_model", load_lora_model),
        (current_platform, "check_and_update_config", check_and_update_config),
        (VllmConfig, "_get_v2_model_runner_unsupported_features", unsupported_by_v2),
        (InputProcessor, "process_inputs", process_inputs),
        # Of the functions that give a block's extra keys, the only one that knows which tokens the block holds.
        (kv_cache_utils, "_gen_prompt_embeds_extra_hash_keys", extra_hash_keys),
        *((owner, "get_prometheus_registry", get_prometheus_registry) for owner in (prometheus, endpoint) if owner),
    ]


def _wrapped(owner: Any, name: str, around: Callable[..., Any]) -> Callable[..., Any]:
    """Return `around`, with the original `owner.name` as its first argument."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapper(*arguments: Any, **options: Any) -> Any:
        return around(original, *arguments, **options)

    return wrapper
