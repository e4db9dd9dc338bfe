"""CPUs without instructions for half precision: PyTorch emulates its products, which is far slower than float32."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def emulates(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether PyTorch's matrix products in `dtype` are emulated on `device`."""
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16) or not torch.backends.mkldnn.is_available():
        return False
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{'bf16' if dtype == torch.bfloat16 else 'fp16'}_supported")
    return not supported()


class Widened:
    """Holds the last input in float32, so that modules with the same input convert it only once."""

    def __init__(self) -> None:
        self._key: tuple[int, int, int] | None = None
        self._x: Tensor
        """Held so that its memory is not used for another input."""
        self._wide: Tensor

    def of(self, x: Tensor) -> Tensor:
        """Return x in float32. It is converted again if x is another tensor or was changed in place (its version)."""
        if x.is_inference() or not x.is_contiguous():  # inference tensors have no version
            return x.float()
        key = (x.data_ptr(), x._version, x.numel())
        if key != self._key:
            self._key, self._x, self._wide = key, x, x.float()
        return self._wide.view(x.shape)
