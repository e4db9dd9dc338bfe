"""The part of the plug-in in vLLM's front-end processes: it refuses requests and settings that cannot work, and keeps
the KV blocks of different plans apart."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

from vllm.config import CUDAGraphMode, VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.lora.utils import get_adapter_absolute_path

from chunkwise_lora.engines.requested_config import KEY, of_request
from chunkwise_lora.engines.vllm import loading, metrics, settings
from chunkwise_lora.errors import ChunkWiseError, EngineError, LadderError

OFF = "or set CHUNKWISE_VLLM=0 to run vLLM's own LoRA"


class RefusedRequest(VLLMValidationError, ValueError):
    """A request that cannot work. vLLM answers it with HTTP 400; in Python it is also a `ValueError`."""


def prepare(config: VllmConfig) -> None:
    """Refuse an engine that cannot run ladders, and copy the environment's settings to all processes of the engine.

    Raises:
        EngineError: A setting of the engine does not work with ladders. The message names it.
        ConfigError: The server's own settings are impossible.
    """
    lora, parallel = config.lora_config, config.parallel_config
    refused = {
        "speculative decoding (speculative_config)": config.speculative_config is not None,
        "pipeline parallelism (pipeline_parallel_size)": parallel.pipeline_parallel_size > 1,
        "dual-batch overlap (enable_dbo)": parallel.enable_dbo,
        "fully_sharded_loras": lora.fully_sharded_loras,
        "enable_tower_connector_lora": lora.enable_tower_connector_lora,
        "Model Runner V2 (VLLM_USE_V2_MODEL_RUNNER=1)": config.use_v2_model_runner,
    }
    if names := [name for name, is_set in refused.items() if is_set]:
        raise EngineError(f"ChunkWise LoRA does not run with {', '.join(names)}; remove these settings, {OFF}")
    server = settings.of_server(config.additional_config)
    if isinstance(config.additional_config, dict):  # workers on other machines have another environment
        choice = server.model_dump(mode="json", exclude_none=True)
        config.additional_config = {**config.additional_config, KEY: choice}
    # A captured graph would repeat the plan of one pass.
    config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
    metrics.open_folder()


def accept(config: VllmConfig, request: Any) -> None:
    """Check a request's adapter and extra arguments, and set the config that it follows and the salt of its KV blocks.

    Raises:
        RefusedRequest: The adapter or an extra argument cannot work.
    """
    extra_args = getattr(request.sampling_params, "extra_args", None)
    try:
        wanted = of_request(extra_args)
        if request.lora_request is None:
            if wanted is not None:
                raise EngineError("a chunkwise preset or mean rank is given, but the request names no adapter")
            return
        if request.prompt_token_ids is None or request.prompt_embeds is not None:
            raise EngineError("plans are made from token ids; give a prompt of tokens or text, not of embeddings")
        path = _folder_of(request.lora_request.lora_path)
        default = loading.check(path, settings.of_server(config.additional_config))
    except ChunkWiseError as error:
        raise RefusedRequest(str(error)) from None
    chosen = wanted or default
    if request.sampling_params is not None:
        request.sampling_params.extra_args = settings.with_config(chosen, extra_args)
    if salt := settings.salt(chosen):
        request.cache_salt = f"{request.cache_salt or ''}{salt}"


@lru_cache(maxsize=1024)
def _folder_of(path: str) -> str:
    """Return the folder where vLLM's workers look for an adapter. A name on the hub is downloaded first."""
    folder = get_adapter_absolute_path(path)
    if not os.path.isdir(folder):
        raise LadderError(
            f"{path}: is neither a folder nor a name on the hub; give those of a ladder or a PEFT adapter"
        )
    return folder


def private_key(request: Any, end: int) -> list[tuple[str, str]]:
    """Return extra keys for the hash of a request's KV block that ends at token `end`.

    If plans read entropies, a block with generated tokens belongs to its request alone. The request finds it again
    after a preemption; no other request does.
    """
    is_private = (request.cache_salt or "").endswith(settings.PRIVATE)
    return [(KEY, request.request_id)] if is_private and end > request.num_prompt_tokens else []
