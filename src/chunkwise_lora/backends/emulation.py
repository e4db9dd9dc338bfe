"""CPUs without instructions for half precision, on which PyTorch emulates its products, far below float32's speed."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def emulates(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether PyTorch's matrix products in `dtype` are emulated on `device`."""
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16) or not torch.backends.mkldnn.is_available():
        return False
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{'bf16' if dtype == torch.bfloat16 else 'fp16'}_supported")
    return not supported()


class Widened:
    """The last input in float32, which the modules that share the input share."""

    def __init__(self) -> None:
        self._key: tuple[int, int, int] | None = None
        self._x: Tensor
        """Held so that its memory is not used for another input."""
        self._wide: Tensor

    def of(self, x: Tensor) -> Tensor:
        """x in float32. It is widened anew where x is another tensor or has changed in place, as its version tells."""
        if x.is_inference() or not x.is_contiguous():  # inference tensors have no version
            return x.float()
        key = (x.data_ptr(), x._version, x.numel())
        if key != self._key:
            self._key, self._x, self._wide = key, x, x.float()
        return self._wide.view(x.shape)
