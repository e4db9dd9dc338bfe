"""What the engine must know of the base model, asked from llama.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

from llama_cpp import llama_cpp

from chunkwise_lora.engines.llama_cpp.library import ggml_function
from chunkwise_lora.errors import EngineError, shown
from chunkwise_lora.ladder.gguf import GgufBase
from chunkwise_lora.ladder.gguf.architectures import ARCHITECTURES


def base_of(llm: Any) -> GgufBase:
    """Return the facts that decide where a ladder's modules lie in the model of a `llama_cpp.Llama`.

    Raises:
        EngineError: The engine does not know the architecture's modules.
    """
    name = llm.metadata.get("general.architecture")
    architecture = {known.name: known for known in ARCHITECTURES.values()}.get(name)
    if architecture is None:
        known = ", ".join(sorted({known.name for known in ARCHITECTURES.values()}))
        raise EngineError(f"{llm.model_path}: adapters cannot run with architecture '{shown(name)}'; known are {known}")
    whole = int(llm.metadata.get("split.count", 1)) <= 1  # otherwise this file holds only some of the tensors
    shapes = _shapes(llm.model_path) if whole else None
    return GgufBase(
        source=llm.model_path,
        architecture=architecture,
        blocks=llama_cpp.llama_model_n_layer(llm.model),
        heads=llama_cpp.llama_model_n_head(llm.model),
        kv_heads=llama_cpp.llama_model_n_head_kv(llm.model),
        width=llm.n_embd(),
        tied=shapes is not None and "output.weight" not in shapes,
        shapes=shapes,
    )


class _GgufInitParams(ctypes.Structure):
    """`struct gguf_init_params`."""

    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


def _shapes(path: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a GGUF file's tensors by name, (out, in) for a linear module."""
    address, number = ctypes.c_void_p, ctypes.c_int64
    file = ggml_function("gguf_init_from_file", address, ctypes.c_char_p, _GgufInitParams)(
        path.encode(), _GgufInitParams(True, None)
    )
    if not file:
        raise EngineError(f"{path}: cannot be read as a GGUF file")
    name_of = ggml_function("gguf_get_tensor_name", ctypes.c_char_p, address, number)
    sizes_of = ggml_function("gguf_get_tensor_ne", ctypes.POINTER(number), address, number)
    try:
        count = ggml_function("gguf_get_n_tensors", number, address)(file)
        return {name_of(file, i).decode(): (sizes_of(file, i)[1], sizes_of(file, i)[0]) for i in range(count)}
    finally:
        ggml_function("gguf_free", None, address)(file)
