"""Loads a base model, with errors that name what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from chunkwise_lora.errors import EngineError, first_line


def load_base(name_or_path: str | Path, **options: Any) -> PreTrainedModel:
    """Call `AutoModelForCausalLM.from_pretrained` with `options`, for safetensors files only.

    Raises:
        EngineError: The model cannot be loaded, or some of its weights are missing.
    """
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            name_or_path, use_safetensors=True, output_loading_info=True, **options
        )
    except Exception as error:  # a damaged folder can raise anything
        raise EngineError(
            f"{name_or_path}: cannot be loaded as a causal language model ({first_line(error)})"
        ) from None
    missing = sorted([*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])])
    if missing:
        raise EngineError(
            f"{name_or_path}: has no weights for {len(missing)} parameters, such as {missing[0]}; "
            "download the complete model"
        )
    return model
