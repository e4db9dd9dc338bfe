"""The installed llama-cpp-python: its version, its header, and whether its structures are those that we compile for.

The engine changes the nodes of llama.cpp's graphs, so it runs only versions that it was tested with.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chunkwise_lora.errors import EngineError

KNOWN_VERSIONS = ("0.3.36",)
"""Versions of llama-cpp-python that this engine was tested with."""
INSTALL = f"run: pip install 'llama-cpp-python=={KNOWN_VERSIONS[-1]}'"

_NODE_MEMORY = 16384
"""Bytes of the memory in which a few nodes are made to look at their layout."""

_OBJECT_SIZE = 32
"""Bytes that ggml keeps for every tensor beside `struct ggml_tensor`: `struct ggml_object`."""


def check_installed() -> None:
    """Check that a version of llama-cpp-python is installed that this engine was tested with.

    Raises:
        EngineError: It is missing, does not load, or is another version.
    """
    try:
        import llama_cpp
    except ModuleNotFoundError as error:
        raise EngineError(f"this engine needs llama-cpp-python, and {error}; {INSTALL}") from None
    except (OSError, RuntimeError, FileNotFoundError) as error:  # its shared libraries are damaged or missing
        raise EngineError(f"llama-cpp-python cannot be loaded ({error}); {INSTALL}") from None
    if llama_cpp.__version__ not in KNOWN_VERSIONS:
        raise EngineError(
            f"this engine was tested with llama-cpp-python {', '.join(KNOWN_VERSIONS)}, not with "
            f"{llama_cpp.__version__}, whose graphs may differ; {INSTALL}"
        )


def header() -> Path:
    """Return the path of the header `ggml.h` that was installed with llama-cpp-python.

    Raises:
        EngineError: It is not there.
    """
    import llama_cpp

    package = Path(llama_cpp.__file__).resolve().parent
    for folder in (package, package.parent):
        if (found := folder / "include" / "ggml.h").is_file():
            return found
    raise EngineError(f"llama-cpp-python in {package} was installed without its header ggml.h; {INSTALL}")


def ggml_function(name: str, result: Any, *arguments: Any) -> Any:
    """Return a C function of ggml, with its result type and argument types."""
    from llama_cpp._ggml import libggml

    found = libggml[name]  # a new object, which no one else declares otherwise
    found.restype, found.argtypes = result, list(arguments)
    return found


def has_layout_of(same_layout: Any) -> bool:
    """Return whether `same_layout` of our library recognises a custom node that ggml itself has made.

    Args:
        same_layout: The C function of that name in `native/graph.c`.
    """
    address, size, number, kind = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, ctypes.c_int
    new_2d = ggml_function("ggml_new_tensor_2d", address, address, kind, number, number)
    custom_arguments = [address, kind, *[number] * 4, ctypes.POINTER(address), kind, address, kind, address]
    custom = ggml_function("ggml_custom_4d", address, *custom_arguments)
    tensor_size = ggml_function("ggml_tensor_overhead", size)() - _OBJECT_SIZE
    data = 4096  # any address: nothing runs the node
    context = ggml_function("ggml_init", address, _InitParams)(_InitParams(_NODE_MEMORY, None, True))
    try:
        source = new_2d(context, 0, 3, 2)
        node = custom(context, 0, 3, 2, 1, 1, (address * 1)(source), 1, data, -1, data)
        ggml_function("ggml_set_name", address, address, ctypes.c_char_p)(node, b"node")
        return bool(same_layout(node, source, tensor_size, data))
    finally:
        ggml_function("ggml_free", None, address)(context)


class _InitParams(ctypes.Structure):
    """`struct ggml_init_params`."""

    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


@contextmanager
def quiet(verbose: bool) -> Iterator[None]:
    """Hide what llama.cpp logs below errors, unless `verbose`."""
    from llama_cpp._logger import set_verbose

    logger = logging.getLogger("llama-cpp-python")
    level = logger.level
    set_verbose(verbose)
    try:
        yield
    finally:
        logger.setLevel(level)
