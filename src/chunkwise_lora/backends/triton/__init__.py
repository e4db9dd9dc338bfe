"""Adapters on a GPU, by Triton kernels. Importing the modules of this package needs Triton; this file does not."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from types import ModuleType

import torch

from chunkwise_lora.backends.base import Limits


def may_run(device: torch.device, limits: Limits | None) -> bool:
    """Return whether this is a CUDA device. CHUNKWISE_TRITON=0 turns the backend off."""
    return device.type == "cuda" and os.environ.get("CHUNKWISE_TRITON") != "0"


DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Element types that the kernels know."""


def attention_on(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """Return the module `attention` of this package, or None if its kernels do not run on the device in this dtype."""
    return _attention() if dtype in DTYPES and may_run(device, None) else None


@cache
def _attention() -> ModuleType | None:
    try:
        return import_module("chunkwise_lora.backends.triton.attention")
    except ImportError:  # a build of PyTorch without Triton, about which `backend_on` has logged a warning
        return None
