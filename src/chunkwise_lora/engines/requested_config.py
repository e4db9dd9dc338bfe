"""Reads the `ChunkWiseConfig` that a request or a server asks for. Engines with a server share it.

`chunkwise_lora.engines.base.config_for` decides which config applies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from chunkwise_lora.errors import ConfigError, shown
from chunkwise_lora.method.config import ChunkWiseConfig, StrictConfig

KEY = "chunkwise"
"""Key of our settings in a server's own. With an underscore, prefix of the fields of a request."""


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


def of_request(fields: Mapping[str, Any] | None) -> ChunkWiseConfig | None:
    """Return the config in a request's field `chunkwise_preset` or `chunkwise_mean_rank`, or None.

    Raises:
        ConfigError: A name is unknown, or a value is impossible.
    """
    prefix = f"{KEY}_"
    given = {name: value for name, value in (fields or {}).items() if name.startswith(prefix)}
    if not given:
        return None
    if unknown := given.keys() - {f"{prefix}preset", f"{prefix}mean_rank"}:
        raise ConfigError(f"unknown {shown(', '.join(sorted(unknown)))}; give {prefix}preset or {prefix}mean_rank")
    return Choice.model_validate({name.removeprefix(prefix): value for name, value in given.items()}).chosen
