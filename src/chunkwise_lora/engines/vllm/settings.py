"""Settings of vLLM's server, and the config that a request carries from the API server to the workers.

A server names a config in its `--additional-config`, or else in its environment.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from pydantic import ByteSize, Field

from chunkwise_lora.engines.requested_config import KEY, Choice
from chunkwise_lora.engines.vllm.budget import Ask
from chunkwise_lora.errors import ConfigError
from chunkwise_lora.method.config import ChunkWiseConfig

SALT = f"{KEY}:"
PRIVATE = ":private"
"""End of the salt of requests whose plan reads entropies, so that no other request has the same plan."""
ASK = f"{KEY}_ask"
"""Key of what a request needs of the adapters' budget, in its extra arguments."""


class ServerSettings(Choice):
    """The settings of a server: the config of its requests, the memory for adapters, and CUDA graphs."""

    adapter_memory: ByteSize | None = Field(
        None, gt=0, description='Bytes that adapters may take on the device, such as "512MiB"; by default no limit.'
    )
    cuda_graphs: bool = Field(
        False, description="Whether vLLM may run passes as CUDA graphs, up to `--max-lora-rank`; not tested on a GPU."
    )


def of_server(additional_config: Any) -> ServerSettings:
    """Return the settings in a server's `--additional-config`, or else in the variables CHUNKWISE_PRESET,
    CHUNKWISE_MEAN_RANK and CHUNKWISE_ADAPTER_MEMORY.

    Raises:
        ConfigError: A value is impossible. The error names the place.
    """
    given = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
    where = f"--additional-config, {KEY!r}"
    if given is None:
        where = "environment"
        given = {
            name: os.environ[variable]
            for name in ("preset", "mean_rank", "adapter_memory")
            if os.environ.get(variable := f"CHUNKWISE_{name.upper()}")
        }
    try:
        return ServerSettings.model_validate(given)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def with_config(config: ChunkWiseConfig, extra_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a request's extra arguments, with the config that it follows added."""
    return {**(extra_args or {}), KEY: config.to_json()}


def config_in(extra_args: Mapping[str, Any] | None) -> ChunkWiseConfig | None:
    """Return the config that `with_config` added to a request's extra arguments, or None."""
    return _parsed(extra_args[KEY]) if extra_args and KEY in extra_args else None


def with_ask(ask: Ask, extra_args: Mapping[str, Any]) -> dict[str, Any]:
    """Return a request's extra arguments, with what it needs of the adapters' budget added."""
    return {**extra_args, ASK: [ask.adapter, list(ask.rung_bytes), ask.highest, ask.insists]}


def ask_in(extra_args: Mapping[str, Any] | None) -> Ask | None:
    """Return what `with_ask` added to a request's extra arguments, or None."""
    return Ask(*extra_args[ASK]) if extra_args and ASK in extra_args else None


@lru_cache(maxsize=256)
def _parsed(config: str) -> ChunkWiseConfig:
    return ChunkWiseConfig.from_json(config)


def salt(config: ChunkWiseConfig, given: str | None = None) -> str | None:
    """Return the salt that keeps KV blocks made under `config` apart from other blocks of the same tokens and adapter.

    For `lossless` it is the client's own salt `given`, if any: these blocks are those of vLLM's own LoRA. Otherwise the
    config is added to it. Two pairs of config and `given` never have the same salt, whatever a client gives. The salt
    ends in `PRIVATE` if plans read entropies: a generated token then runs on another rung than the same token in a
    prompt, so no other request may use its block.
    """
    if config == ChunkWiseConfig.preset("lossless") and SALT not in (given or ""):
        return given
    digest = hashlib.sha256(config.to_json().encode()).hexdigest()[:16]
    return f"{given or ''}{SALT}{digest}{PRIVATE if config.reads_entropy else ''}"


def limited_salt(salt: str | None, rung: int) -> str:
    """Return the salt of a request whose plan would use higher rungs than `rung`, but gets none of them.

    It differs from every salt that `salt` returns.
    """
    is_private = (salt or "").endswith(PRIVATE)
    return f"{(salt or '').removesuffix(PRIVATE)}{SALT}up to {rung}{PRIVATE if is_private else ''}"
