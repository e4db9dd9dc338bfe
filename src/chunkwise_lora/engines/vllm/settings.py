"""Which `ChunkWiseConfig` a request gets.

The first of these that says anything: the request, the server (`--additional-config`, then the environment), the config
beside the ladder, `lossless`.
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
"""Our key in vLLM's `--additional-config`, and with an underscore the prefix of a request's extra arguments."""

SALT = f"{KEY}:"
PRIVATE = ":private"
"""Ends the salt of requests whose generated tokens ran by a plan that no other request would give them."""


class Choice(StrictConfig):
    """One way to name a config, or none."""

    preset: Literal["lossless", "balanced", "compact"] | None = Field(None, description="A preset's name.")
    mean_rank: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Every token alike, at the rung nearest to this share of the full rank."
    )
    config: ChunkWiseConfig | None = Field(None, description="All knobs; for servers only.")

    @model_validator(mode="after")
    def _at_most_one(self) -> Self:
        if sum(value is not None for value in (self.preset, self.mean_rank, self.config)) > 1:
            raise ConfigError("Choice: give one of preset, mean_rank and config, not several")
        return self

    @property
    def chosen(self) -> ChunkWiseConfig | None:
        """The config that was named."""
        if self.preset is not None:
            return ChunkWiseConfig.preset(self.preset)
        if self.mean_rank is not None:
            return ChunkWiseConfig.uniform(self.mean_rank)
        return self.config


def of_server(additional_config: Any) -> Choice:
    """What the server says: its `--additional-config`, or else CHUNKWISE_PRESET or CHUNKWISE_MEAN_RANK.

    Raises:
        ConfigError: Naming the place with the impossible value.
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
    """What a request's extra arguments `chunkwise_preset` or `chunkwise_mean_rank` ask for, None for nothing.

    Raises:
        ConfigError: An unknown name or an impossible value.
    """
    prefix = f"{KEY}_"
    given = {name: value for name, value in (extra_args or {}).items() if name.startswith(prefix)}
    if not given:
        return None
    if unknown := given.keys() - {f"{prefix}preset", f"{prefix}mean_rank"}:
        raise ConfigError(f"unknown {', '.join(sorted(unknown))}; give {prefix}preset or {prefix}mean_rank")
    return Choice.model_validate({name.removeprefix(prefix): value for name, value in given.items()}).chosen


def carrying(config: ChunkWiseConfig, extra_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """A request's extra arguments with the config that it runs by, the one that its KV is salted with."""
    return {**(extra_args or {}), KEY: config.to_json()}


def carried(extra_args: Mapping[str, Any] | None) -> ChunkWiseConfig | None:
    """The config that `carrying` put into a request's extra arguments."""
    return _parsed(extra_args[KEY]) if extra_args and KEY in extra_args else None


@lru_cache(maxsize=256)
def _parsed(config: str) -> ChunkWiseConfig:
    return ChunkWiseConfig.from_json(config)


def salt(config: ChunkWiseConfig) -> str | None:
    """What tells KV made under `config` from other KV of the same tokens and adapter; None for `lossless`.

    It ends in `PRIVATE` where plans read entropies: a generated token then runs on another rung than the same token in
    a prompt would, so its KV is no other request's.
    """
    if config == ChunkWiseConfig.preset("lossless"):
        return None
    digest = hashlib.sha256(config.to_json().encode()).hexdigest()[:16]
    return f"{SALT}{digest}{PRIVATE if config.reads_entropy else ''}"
