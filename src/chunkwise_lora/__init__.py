"""ChunkWise LoRA: spend adapter rank and KV-cache precision where the text is hard (arXiv 2601.21109)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chunkwise_lora.errors import ChunkWiseError, ConfigError, EngineError, LadderError
from chunkwise_lora.ladder import RankLadder
from chunkwise_lora.method.config import ChunkWiseConfig
from chunkwise_lora.method.scheduler import Plan, RuntimeScheduler
from chunkwise_lora.method.trace import Trace

if TYPE_CHECKING:
    from chunkwise_lora.engines.transformers import ChunkWiseModel

__all__ = [
    "ChunkWiseConfig",
    "ChunkWiseError",
    "ChunkWiseModel",
    "ConfigError",
    "EngineError",
    "LadderError",
    "Plan",
    "RankLadder",
    "RuntimeScheduler",
    "Trace",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # No engine is imported unless it is used.
    if name == "ChunkWiseModel":
        from chunkwise_lora.engines.transformers import ChunkWiseModel

        return ChunkWiseModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
