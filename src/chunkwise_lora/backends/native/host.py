"""What the process and its CPU can do."""

from __future__ import annotations

import ctypes
from functools import cache

import torch


def give_memory_back() -> None:
    """Return freed memory to the system. glibc keeps free pieces between pieces that are still in use."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


@cache
def emulates(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether PyTorch's matrix products in `dtype` are much slower than in float32 on `device`.

    That is so for half precision on a CPU without instructions for it.
    """
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16) or not torch.backends.mkldnn.is_available():
        return False
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{'bf16' if dtype == torch.bfloat16 else 'fp16'}_supported")
    return not supported()
