"""A ladder as a GGUF LoRA adapter, which llama.cpp and programs built on it run without our code.

Importing this package needs the package `gguf`; without it, the import raises a `LadderError`.
"""

from chunkwise_lora.errors import LadderError

try:
    import gguf  # noqa: F401
except ImportError:
    raise LadderError("GGUF files need the package gguf; install it with: pip install 'chunkwise-lora[gguf]'") from None

from chunkwise_lora.ladder.gguf.base import GgufBase
from chunkwise_lora.ladder.gguf.placement import place
from chunkwise_lora.ladder.gguf.writing import DTYPES, write_gguf

__all__ = ["DTYPES", "GgufBase", "place", "write_gguf"]
