"""The part of the plug-in in vLLM's front-end processes: it refuses requests and settings that cannot work, and keeps
the KV blocks of different plans apart."""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict
from collections.abc import Callable
from contextvars import ContextVar
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.logger import init_logger
from vllm.lora.utils import get_adapter_absolute_path
from vllm.platforms import current_platform

from chunkwise_lora.backends import triton
from chunkwise_lora.engines.requested_config import KEY, Choice, of_request
from chunkwise_lora.engines.vllm import loading, metrics, settings, versions
from chunkwise_lora.engines.vllm.budget import Ask
from chunkwise_lora.engines.vllm.reports import SAYS, RefusedRequest
from chunkwise_lora.engines.vllm.settings import ServerSettings
from chunkwise_lora.errors import ChunkWiseError, EngineError, LadderError, shown
from chunkwise_lora.method.config import ChunkWiseConfig
from chunkwise_lora.method.selection import RankScaleSelector

logger = init_logger("vllm.chunkwise")

OFF = "or set CHUNKWISE_VLLM=0 to run vLLM's own LoRA"

KNOWN_FOLDERS = 1024
"""Number of adapters whose folder and config this process remembers."""


class MissingAdapter(LadderError):
    """There is no folder of an adapter where a request names one."""


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
        "dual-batch overlap (enable_dbo, ubatch_size)": parallel.use_ubatching,
        "fully_sharded_loras": lora.fully_sharded_loras,
        "enable_tower_connector_lora": lora.enable_tower_connector_lora,
        "Model Runner V2 (VLLM_USE_V2_MODEL_RUNNER=1)": config.use_v2_model_runner,
    }
    if names := [name for name, is_set in refused.items() if is_set]:
        raise EngineError(f"ChunkWise LoRA does not run with {', '.join(names)}; remove these settings, {OFF}")
    server = settings.of_server(config.additional_config)
    if server.adapter_memory is not None:
        _refuse_without_budget(config)
    if not _keeps_graphs(config, server):
        config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE  # a graph would repeat the plan of one pass
        server = server.model_copy(update={"cuda_graphs": False})
    if isinstance(config.additional_config, dict):  # workers on other machines have another environment
        choice = server.model_dump(mode="json", exclude_none=True)
        config.additional_config = {**config.additional_config, KEY: choice}
    metrics.open_folder()


def _keeps_graphs(config: VllmConfig, server: ServerSettings) -> bool:
    """Return whether vLLM's CUDA graphs stay on, and log it."""
    if config.compilation_config.cudagraph_mode == CUDAGraphMode.NONE:
        return False
    if not server.cuda_graphs:
        logger.info_once(
            "ChunkWise LoRA switches CUDA graphs off. They can be tried with "
            """--additional-config '{"chunkwise": {"cuda_graphs": true}}', but were never tested on a GPU."""
        )
    elif why := _graph_obstacle(config):
        logger.warning_once("ChunkWise LoRA switches CUDA graphs off: %s", why)
    else:
        logger.warning_once(
            "ChunkWise LoRA runs adapters of up to rank %d in CUDA graphs, which was never tested on a GPU",
            config.lora_config.max_lora_rank,
        )
        return True
    return False


def _graph_obstacle(config: VllmConfig) -> str | None:
    """Return why CUDA graphs cannot run adapters here, or None."""
    if not current_platform.is_cuda():
        return "the device is no CUDA device"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if not triton.may_run(torch.device("cuda"), None):
        return "CHUNKWISE_TRITON=0 switches the kernels off"
    if config.model_config.dtype not in triton.DTYPES:
        return f"the kernels do not run in {config.model_config.dtype}"
    if config.model_config.runner_type == "pooling":
        return "the model is a pooling model, which may run its head within a graph"
    return None


def _refuse_without_budget(config: VllmConfig) -> None:
    """Refuse an engine in which `adapter_memory` cannot be kept."""
    if not versions.is_at_least(versions.MEMORY_SINCE):
        raise EngineError(f"adapter_memory needs vLLM {versions.MEMORY_SINCE} or newer; update vLLM, or remove it")
    if config.scheduler_config.scheduler_cls is not None:
        raise EngineError("adapter_memory does not run with another scheduler (scheduler_cls); remove one of them")


def accept(config: VllmConfig, request: Any) -> None:
    """Check a request's adapter and extra arguments, and set the config that it follows and the salt of its KV blocks.

    Raises:
        RefusedRequest: The adapter or an extra argument cannot work.
    """
    extra_args = getattr(request.sampling_params, "extra_args", None)
    try:
        wanted = of_request(extra_args) or _of_beam_search.get()
        if request.lora_request is None:
            if wanted is not None:
                raise EngineError("a chunkwise preset or mean rank is given, but the request names no adapter")
            return
        if request.prompt_token_ids is None or request.prompt_embeds is not None:
            raise EngineError("plans are made from token ids; give a prompt of tokens or text, not of embeddings")
        server = settings.of_server(config.additional_config)
        adapter = _known(request.lora_request.lora_path, server, config)
        if server.adapter_memory is not None and request.sampling_params is None:
            raise EngineError(
                "a server with adapter_memory generates text only; run pooling requests on one without it"
            )
    except ChunkWiseError as error:
        raise RefusedRequest(error) from None
    chosen = wanted or adapter.config
    if request.sampling_params is not None:
        extra_args = settings.with_config(chosen, extra_args)
        if server.adapter_memory is not None:
            highest = RankScaleSelector(chosen.selection, adapter.rung_ranks).highest_rung
            sizes = _rung_bytes(adapter, config)
            ask = Ask(request.lora_request.lora_int_id, sizes, highest, insists=wanted is not None)
            extra_args = settings.with_ask(ask, extra_args)
        request.sampling_params.extra_args = extra_args
    request.cache_salt = settings.salt(chosen, request.cache_salt)
    metrics.unloaded.discard(request.lora_request.lora_name)


_last_known: OrderedDict[tuple[str, Choice], loading.Checked] = OrderedDict()
"""By path and server's settings: an adapter when its files were last in order."""


def _known(path: str, server: ServerSettings, config: VllmConfig) -> loading.Checked:
    """Return what is known about an adapter.

    An adapter that was in order once may be in memory, where it can run without its files. The worker, which knows,
    refuses its requests otherwise.
    """
    try:
        return _checked(path, server, config)
    except ChunkWiseError:
        if (path, server) in _last_known:
            return _last_known[path, server]
        raise


def _checked(path: str, server: ServerSettings, config: VllmConfig) -> loading.Checked:
    """Check the files of an adapter, and return and remember what they say."""
    adapter = loading.check(_folder_of(path), server)
    if server.adapter_memory is not None:
        least = next(filter(None, _rung_bytes(adapter, config)), 0)
        if least > server.adapter_memory:
            raise LadderError(
                f"{shown(path)}: its lowest rung takes {least} bytes, more than the server's adapter_memory, "
                f"{server.adapter_memory}; give it more"
            )
    _last_known[path, server] = adapter
    _last_known.move_to_end((path, server))
    while len(_last_known) > KNOWN_FOLDERS:
        _last_known.popitem(last=False)
    return adapter


def _rung_bytes(adapter: loading.Checked, config: VllmConfig) -> list[int]:
    """Return (rungs,) bytes of an adapter's factors at each rung on one worker, at most."""
    return [numbers * config.lora_config.lora_dtype.itemsize for numbers in adapter.rung_numbers]


@lru_cache(maxsize=KNOWN_FOLDERS)
def _folder_of(path: str) -> str:
    """Return the folder where vLLM's workers look for an adapter. A name on the hub is downloaded first."""
    folder = get_adapter_absolute_path(path)
    if not os.path.isdir(folder):
        raise MissingAdapter(
            f"{shown(path)}: is neither a folder nor a name on the hub; give those of a ladder or a PEFT adapter"
        )
    return folder


async def check_new_adapter(original: Callable[..., Any], models: Any, request: Any) -> Any:
    """Check a request to load an adapter, before a worker reads it. Returns vLLM's response if it is an error."""
    config = models.engine_client.vllm_config
    response = await original(models, request)
    if response is not None or config.lora_config is None:
        return response
    try:
        server = settings.of_server(config.additional_config)
        await asyncio.to_thread(_checked, request.lora_path, server, config)
    except MissingAdapter:
        return versions.error_response(models, LoRAAdapterNotFoundError(request.lora_name, shown(request.lora_path)))
    except ChunkWiseError as error:
        return versions.error_response(models, RefusedRequest(error))
    return None


async def load_adapter(original: Callable[..., Any], models: Any, request: Any, *rest: Any, **options: Any) -> Any:
    """Load an adapter into the engine. If it does not fit the base model, the client gets HTTP 400."""
    response = await original(models, request, *rest, **options)
    _, ours, message = getattr(getattr(response, "error", None), "message", "").partition(SAYS)
    if ours:
        return versions.error_response(models, RefusedRequest(ours + message))
    if (loaded := models.lora_requests.get(request.lora_name)) is not None:
        loaded.load_inplace = False  # it was loaded now, and need not be loaded again for every request
        metrics.unloaded.discard(request.lora_name)
    return response


async def unload_adapter(original: Callable[..., Any], models: Any, request: Any) -> Any:
    """Unload an adapter. Its metrics are not shown any longer."""
    response = await original(models, request)
    if request.lora_name not in models.lora_requests:
        metrics.unloaded.add(request.lora_name)
    return response


_of_beam_search: ContextVar[ChunkWiseConfig | None] = ContextVar("_of_beam_search", default=None)
"""The config that the running HTTP request asks for, if it is a beam search."""


def sleep(original: Callable[..., Any], core: Any, level: int = 1, *rest: Any, **options: Any) -> Any:
    """Put the engine to sleep, except at level 2, which would discard what the adapters' kernels read.

    Raises:
        EngineError: Level 2.
    """
    if level > 1 and core.vllm_config.lora_config is not None:
        raise EngineError(f"sleep level {level} discards what adapters need; use level 1, or start the server again")
    return original(core, level, *rest, **options)


def note_beam_search(original: Callable[..., Any], request: Any, *arguments: Any, **options: Any) -> Any:
    """Make the parameters of a beam search. They have no place for extra arguments, so these are kept for `accept`.

    Raises:
        RefusedRequest: An extra argument cannot work.
    """
    try:
        _of_beam_search.set(of_request(request.vllm_xargs))  # in the task of this HTTP request
    except ChunkWiseError as error:
        raise RefusedRequest(error) from None
    return original(request, *arguments, **options)


def private_key(request: Any, end: int) -> list[tuple[str, str]]:
    """Return extra keys for the hash of a request's KV block that ends at token `end`.

    If plans read entropies, a block with generated tokens belongs to its request alone. The request finds it again
    after a preemption; no other request does.
    """
    is_private = (request.cache_salt or "").endswith(settings.PRIVATE)
    return [(KEY, request.request_id)] if is_private and end > request.num_prompt_tokens else []
