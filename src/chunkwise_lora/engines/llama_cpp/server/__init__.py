"""llama-cpp-python's OpenAI-compatible server, with adapters by the `model` of a request."""

from chunkwise_lora.engines.llama_cpp.server.app import create_app
from chunkwise_lora.engines.llama_cpp.server.served import ServedLlama

__all__ = ["ServedLlama", "create_app"]
