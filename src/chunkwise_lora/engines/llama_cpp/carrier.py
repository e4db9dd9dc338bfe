"""The LoRA adapter that llama.cpp itself loads, so that its graphs have a place for ours.

It has rank 1, is zero, and covers the modules of all loaded adapters. Our kernels take its place in every graph.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import llama_cpp

from chunkwise_lora.engines.llama_cpp.library import quiet
from chunkwise_lora.errors import EngineError
from chunkwise_lora.ladder import LadderModule


class Carrier:
    """Sets LoRA adapters of a llama.cpp context and frees those that it no longer needs.

    Args:
        llm: The `llama_cpp.Llama` whose context it is.
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._adapter: Any = None

    def cover(
        self,
        architecture: str,
        shapes: Mapping[str, tuple[int, int]],
        factors: Mapping[str, LadderModule] | None = None,
    ) -> None:
        """Let the next graphs have a place for an adapter.

        Args:
            architecture: The model's architecture, as GGUF files name it.
            shapes: (out, in) of the modules, by tensor name.
            factors: The adapter's factors of rank 1; by default zeros.

        Raises:
            EngineError: llama.cpp refuses the adapter.
        """
        with tempfile.TemporaryDirectory(prefix="chunkwise-") as folder:
            path = Path(folder) / "carrier.gguf"
            if shapes:
                _write(path, architecture, shapes, factors or {})
            self.use(path if shapes else None)

    def use(self, path: Path | None) -> None:
        """Let llama.cpp run the GGUF LoRA adapter in the file `path`, or none.

        Raises:
            EngineError: llama.cpp refuses the adapter.
        """
        adapter = None
        if path is not None:
            with quiet(self._llm.verbose):
                adapter = llama_cpp.llama_adapter_lora_init(self._llm.model, str(path).encode())
            if adapter is None:
                raise EngineError("llama.cpp cannot load an adapter for these modules; verbose=True shows why")
        count = int(adapter is not None)
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
        if llama_cpp.llama_set_adapters_lora(self._llm.ctx, adapters, count, (ctypes.c_float * 1)(1)):
            raise EngineError("llama.cpp refuses to run an adapter with this model")
        self.free()
        self._adapter = adapter

    def free(self) -> None:
        """Free the adapter. The context must not use it any more."""
        if self._adapter is not None:
            llama_cpp.llama_adapter_lora_free(self._adapter)
            self._adapter = None


def _write(
    path: Path, architecture: str, shapes: Mapping[str, tuple[int, int]], factors: Mapping[str, LadderModule]
) -> None:
    from gguf import GGUFType, GGUFWriter, Keys

    writer = GGUFWriter(path, architecture)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, 0.0)  # no factor on the product
    for tensor, (outputs, inputs) in shapes.items():
        down, up = np.zeros((1, inputs), np.float16), np.zeros((outputs, 1), np.float16)
        if tensor in factors:
            down, up = factors[tensor].down.half().numpy(), factors[tensor].up.half().numpy()
        writer.add_tensor(f"{tensor}.lora_a", down)
        writer.add_tensor(f"{tensor}.lora_b", up)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
