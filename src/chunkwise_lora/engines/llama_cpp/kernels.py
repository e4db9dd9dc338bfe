"""Compiles and loads the C part of the engine, which runs adapters inside llama.cpp's graphs."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import numpy as np

from chunkwise_lora.backends.native import build
from chunkwise_lora.engines.llama_cpp import library
from chunkwise_lora.engines.llama_cpp.structs import Functions
from chunkwise_lora.errors import EngineError

SOURCES = [Path(__file__).parent / "native" / name for name in ("graph.c", "vectors.h", "products.h", "attention.h")]
"""The first is compiled and includes the others."""

_REFUSALS = {
    1: "llama.cpp runs other tokens than were planned",
    2: "llama.cpp applies LoRA in a way that this engine does not know, at",
    3: "llama.cpp's graph holds a LoRA that no adapter has, at",
    4: "the inputs or outputs of a module have another shape or type than its adapter, at",
    5: "the rows of a module are not those of the pass, at",
    6: "the nodes of two modules' LoRA are mixed, at",
}
"""Messages by the error code of a pass."""


@cache
def functions() -> Functions:
    """Return the functions of the compiled library. It is compiled on first use; see `backends.native.build`.

    Raises:
        EngineError: llama-cpp-python is not installed, or is a version that this engine was not tested with.
        BuildError: There is no C compiler, or it gives no working library.
    """
    library.check_installed()
    header = library.header()
    return Functions(build.load(_works, [*SOURCES, header], [f"-I{header.parent}"]))


def _works(loaded: ctypes.CDLL) -> bool:
    """Return whether a library has the layout of ggml's structures, and computes an entropy correctly."""
    found = Functions(loaded)
    logits = np.log(np.array([0.25, 0.5, 0.125, 0.125], np.float32))
    entropy = found.entropy(logits.ctypes.data, len(logits))
    return library.has_layout_of(found.same_layout) and abs(entropy - 1.75 * np.log(2)) < 1e-4


def refusal(error: int, where: bytes) -> EngineError:
    """Return the error for the code of a pass that failed, and the name of the tensor where it failed."""
    return EngineError(f"{_REFUSALS[error]} {where.decode(errors='replace')}; this model cannot run with adapters")
