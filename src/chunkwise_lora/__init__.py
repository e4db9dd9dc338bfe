"""ChunkWise LoRA: spend adapter rank and KV-cache precision where the text is hard (arXiv 2601.21109)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from chunkwise_lora.errors import ChunkWiseError, ConfigError, EngineError, LadderError
from chunkwise_lora.method.config import ChunkWiseConfig
from chunkwise_lora.method.plan import Plan
from chunkwise_lora.method.scheduler import RuntimeScheduler
from chunkwise_lora.method.trace import Trace

if TYPE_CHECKING:
    from chunkwise_lora.engines.transformers import ChunkWiseModel
    from chunkwise_lora.ladder import RankLadder

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

_LAZY = {"ChunkWiseModel": "chunkwise_lora.engines.transformers", "RankLadder": "chunkwise_lora.ladder"}
"""Names that are imported on first use, and their modules: PyTorch and engines take seconds to import."""


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
