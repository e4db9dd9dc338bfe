"""The engine for llama.cpp, through llama-cpp-python."""

from chunkwise_lora.engines.llama_cpp.library import check_installed

check_installed()

from chunkwise_lora.engines.llama_cpp.model import BASE, ChunkWiseLlama  # noqa: E402

__all__ = ["BASE", "ChunkWiseLlama"]
