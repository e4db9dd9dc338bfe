"""Loads the base model and its tokenizer, and tokenizes text."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from chunkwise_lora import examples
from chunkwise_lora.errors import EngineError, first_line

if TYPE_CHECKING:
    import torch


def load_base_and_tokenizer(name: str, device: torch.device | str = "cpu") -> tuple[Any, Any]:
    """The base model and tokenizer of the example, in a folder or on the hub. On a CPU float16 weights become float32.

    Args:
        name: The name of the model.
        device: Where to put the model.

    Raises:
        EngineError: The model or its tokenizer cannot be loaded.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from chunkwise_lora.engines.transformers.loading import load_base

    logging.disable_progress_bar()
    source = examples.find_base(name, _tell)
    base = load_base(source).to(device)
    if base.device.type == "cpu" and str(base.dtype) == "torch.float16":
        base = base.float()  # CPUs compute float16 slowly
    try:
        return base, AutoTokenizer.from_pretrained(source)
    except Exception as error:  # damaged tokenizers raise many kinds of errors
        raise EngineError(f"{name}: its tokenizer cannot be loaded ({first_line(error)})") from None


def _tell() -> None:
    print("making the example model from its GGUF file, once, for some 20 seconds ...", file=sys.stderr)


def token_ids(tokenizer: Any, text: str) -> torch.Tensor:
    """(1, tokens) int64 ids of `text`."""
    ids: torch.Tensor = tokenizer(text, return_tensors="pt").input_ids
    return ids.long()
