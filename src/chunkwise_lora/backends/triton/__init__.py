"""Adapters on a GPU, by Triton kernels. Importing the modules of this package needs Triton; this file does not."""

from __future__ import annotations

import os

import torch

from chunkwise_lora.backends.base import Limits


def may_run(device: torch.device, limits: Limits | None) -> bool:
    """Return whether this is a CUDA device and the engine has limits. CHUNKWISE_TRITON=0 turns the backend off."""
    return device.type == "cuda" and limits is not None and os.environ.get("CHUNKWISE_TRITON") != "0"
