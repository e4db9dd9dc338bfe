"""Reads the `ChunkWiseConfig` that a server or a request asks for.

A server names a config in its `--additional-config`, or else in its environment. A request names one in its extra
arguments. `chunkwise_lora.engines.base.config_for` decides which of them applies.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from chunkwise_lora.errors import ConfigError
from chunkwise_lora.method.config import ChunkWiseConfig, StrictConfig

KEY = "chunkwise"
"""Key of our settings in vLLM's `--additional-config`. With an underscore, prefix of a request's extra arguments."""

SALT = f"{KEY}:"
PRIVATE = ":private"
"""End of the salt of requests whose plan reads entropies, so that no other request has the same plan."""


class Choice(StrictConfig):
    """A config that is given in one of three ways, or no config."""

    preset: Literal["lossless", "balanced", "compact"] | None = Field(None, description="A preset's name.")
    mean_rank: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Every token alike, at the rung nearest to this share of the full rank."
    )
    config: ChunkWiseConfig | None = Field(None, description="All settings of the method; for servers only.")

    @model_validator(mode="after")
    def _at_most_one(self) -> Self:
        if sum(value is not None for value in (self.preset, self.mean_rank, self.config)) > 1:
            raise ConfigError("Choice: give one of preset, mean_rank and config, not several")
        return self

    @property
    def chosen(self) -> ChunkWiseConfig | None:
        """The config that is given, or None."""
        if self.preset is not None:
            return ChunkWiseConfig.preset(self.preset)
        if self.mean_rank is not None:
            return ChunkWiseConfig.uniform(self.mean_rank)
        return self.config


def of_server(additional_config: Any) -> Choice:
    """Return the server's choice, from its `--additional-config`, or else from CHUNKWISE_PRESET or CHUNKWISE_MEAN_RANK.

    Raises:
        ConfigError: A value is impossible. The error names the place.
    """
    given = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
    where = f"--additional-config, {KEY!r}"
    if given is None:
        where = "environment"
        given = {
            name: os.environ[variable]
            for name in ("preset", "mean_rank")
            if os.environ.get(variable := f"CHUNKWISE_{name.upper()}")
        }
    try:
        return Choice.model_validate(given)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def of_request(extra_args: Mapping[str, Any] | None) -> ChunkWiseConfig | None:
    """Return the config in a request's extra argument `chunkwise_preset` or `chunkwise_mean_rank`, or None.

    Raises:
        ConfigError: A name is unknown, or a value is impossible.
    """
    prefix = f"{KEY}_"
    given = {name: value for name, value in (extra_args or {}).items() if name.startswith(prefix)}
    if not given:
        return None
    if unknown := given.keys() - {f"{prefix}preset", f"{prefix}mean_rank"}:
        raise ConfigError(f"unknown {', '.join(sorted(unknown))}; give {prefix}preset or {prefix}mean_rank")
    return Choice.model_validate({name.removeprefix(prefix): value for name, value in given.items()}).chosen


def with_config(config: ChunkWiseConfig, extra_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a request's extra arguments, with the config that it follows added."""
    return {**(extra_args or {}), KEY: config.to_json()}


def config_in(extra_args: Mapping[str, Any] | None) -> ChunkWiseConfig | None:
    """Return the config that `with_config` added to a request's extra arguments, or None."""
    return _parsed(extra_args[KEY]) if extra_args and KEY in extra_args else None


@lru_cache(maxsize=256)
def _parsed(config: str) -> ChunkWiseConfig:
    return ChunkWiseConfig.from_json(config)


def salt(config: ChunkWiseConfig) -> str | None:
    """Return the salt that keeps KV blocks made under `config` apart from other blocks of the same tokens and adapter.

    It is None for `lossless`, whose blocks are those of vLLM's own LoRA. The salt ends in `PRIVATE` if plans read
    entropies: a generated token then runs on another rung than the same token in a prompt, so no other request may
    use its block.
    """
    if config == ChunkWiseConfig.preset("lossless"):
        return None
    digest = hashlib.sha256(config.to_json().encode()).hexdigest()[:16]
    return f"{SALT}{digest}{PRIVATE if config.reads_entropy else ''}"
