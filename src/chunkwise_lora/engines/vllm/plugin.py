"""The entry point that vLLM calls in each of its processes."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from chunkwise_lora.engines.vllm.versions import HOOKS, TESTED, is_tested

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
    if not is_tested(version):
        logger.error(
            "ChunkWise LoRA supports vLLM %s, not %s, and is off: adapters run as vLLM's own LoRA, and "
            "ladders cannot be loaded. Install a supported version, or a chunkwise-lora that supports yours.",
            ", ".join(TESTED),
            version,
        )
        return
    try:
        # Nothing is changed unless all functions can be wrapped.
        changes = [
            (owner, HOOKS[place].name, _wrapped(owner, HOOKS[place].name, around))
            for place, around in _wrappers().items()
            for owner in HOOKS[place].owners()
        ]
    except (ImportError, AttributeError) as error:
        logger.error(
            "ChunkWise LoRA does not find the functions that it wraps in this vLLM, and changes nothing: %s", error
        )
        return
    for owner, name, replacement in changes:
        setattr(owner, name, replacement)
    _registered = True
    logger.info("ChunkWise LoRA runs LoRA adapters as rank ladders")


def _wrappers() -> dict[str, Callable[..., Any]]:
    """Return the wrapper of each function in `HOOKS`. It gets the original function as its first argument."""
    from vllm.model_executor.models import supports_lora
    from vllm.platforms import current_platform

    from chunkwise_lora.engines.vllm import admission, frontend, metrics, reports

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

    return {
        "load_lora_model": load_lora_model,
        "check_and_update_config": check_and_update_config,
        "unsupported_by_v2": unsupported_by_v2,
        "process_inputs": process_inputs,
        "extra_hash_keys": extra_hash_keys,
        "schedule": admission.schedule,
        "may_start": admission.may_start,
        "remove_lora": admission.remove_lora,
        "sleep": frontend.sleep,
        "update_from_output": reports.update_from_output,
        "make_request_output": reports.make_request_output,
        "metrics": get_prometheus_registry,
        "metrics of the server": get_prometheus_registry,
        "completion_response": reports.completion_response,
        "chat_response": reports.chat_response,
        "load_adapter": frontend.load_adapter,
        "unload_adapter": frontend.unload_adapter,
        "check_new_adapter": frontend.check_new_adapter,
        "beam search of completions": frontend.note_beam_search,
        "beam search of chats": frontend.note_beam_search,
    }


def _wrapped(owner: Any, name: str, around: Callable[..., Any]) -> Callable[..., Any]:
    """Return `around`, with the original `owner.name` as its first argument."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapper(*arguments: Any, **options: Any) -> Any:
        return around(original, *arguments, **options)

    return wrapper
