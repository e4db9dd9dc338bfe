"""vLLM's own Triton LoRA kernels, imported from the Python files of its wheel without the rest of vLLM."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

PACKAGE = "vllm.lora.ops.triton_ops"
NEEDED = ("kernel_utils", "lora_expand_op", "lora_kernel_metadata", "lora_shrink_op", "utils")
"""The modules of `PACKAGE` that are used."""


class LoraKernels:
    """The adapters of one linear layer as vLLM runs them: every adapter is padded to the largest rank.

    Args:
        folder: Holds the Python files of `vllm/lora/ops/triton_ops`.
        factors: For each adapter, down (r, in) and up (out, r).
        of_tokens: (tokens,) the adapter of each token.
    """

    def __init__(self, folder: Path, factors: Sequence[tuple[Tensor, Tensor]], of_tokens: Tensor) -> None:
        self._shrink, self._expand, meta = _kernels(folder)
        rank = max(len(down) for down, _ in factors)
        (first_down, first_up), device = factors[0], factors[0][0].device
        self._down = first_down.new_zeros(len(factors), 1, rank, first_down.shape[1])
        self._up = first_down.new_zeros(len(factors), 1, len(first_up), rank)
        for slot, (down, up) in enumerate(factors):
            self._down[slot, 0, : len(down)], self._up[slot, 0, :, : len(down)] = down, up
        self._meta = meta.make(len(factors), len(of_tokens), device)
        self._meta.prepare_tensors(of_tokens.int())
        self._hidden = torch.empty(1, len(of_tokens), rank, dtype=torch.float32, device=device)

    def add(self, y: Tensor, x: Tensor) -> None:
        """Add the product for x (tokens, in) to y (tokens, out), in place."""
        arguments = self._meta.meta_args(len(x), True)
        self._shrink(x, [self._down], self._hidden, *arguments, 1.0)
        self._expand(self._hidden, [self._up], y, *arguments, add_inputs=True)


@cache
def _kernels(folder: Path) -> tuple[Callable[..., None], Callable[..., None], Any]:
    missing = [name for name in NEEDED if not (folder / f"{name}.py").is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} has no {missing[0]}.py; give the folder vllm/lora/ops/triton_ops of vLLM")
    with _stand_ins(folder):
        shrink, expand, meta = (import_module(f"{PACKAGE}.{NEEDED[i]}") for i in (3, 1, 2))
        return shrink._lora_shrink, expand._lora_expand, meta.LoRAKernelMeta


@contextmanager
def _stand_ins(folder: Path) -> Iterator[None]:
    """Let the kernels' files find what they import from vLLM. Afterwards nothing of it is left in `sys.modules`."""
    import triton
    import triton.language as tl

    def none(*args: object, **kwargs: object) -> None:
        return None

    def no_custom_op(**kwargs: object) -> None:
        raise AttributeError  # vLLM then calls the function itself

    def is_hopper(capability: int) -> bool:
        return torch.cuda.is_available() and torch.cuda.get_device_capability() >= divmod(capability, 10)

    def to_device(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    platform = SimpleNamespace(
        is_cuda=torch.cuda.is_available, has_device_capability=is_hopper, is_device_capability=is_hopper
    )
    envs = {
        "VLLM_BATCH_INVARIANT": False,
        "VLLM_TUNED_CONFIG_FOLDER": None,
        "VLLM_LORA_ENABLE_DUAL_STREAM": False,
        "VLLM_LORA_DISABLE_PDL": False,
    }
    contents: dict[str, dict[str, Any]] = {
        "vllm": {"__path__": []},
        "vllm.envs": envs,
        "vllm.logger": {"init_logger": lambda name: SimpleNamespace(info_once=none, warning_once=none)},
        "vllm.platforms": {"current_platform": platform},
        "vllm.triton_utils": {"tl": tl, "triton": triton},
        "vllm.utils": {"__path__": []},
        "vllm.utils.math_utils": {"next_power_of_2": triton.next_power_of_2},
        "vllm.utils.torch_utils": {"async_tensor_h2d": to_device, "direct_register_custom_op": no_custom_op},
        "vllm.lora": {"__path__": []},
        "vllm.lora.ops": {"__path__": []},
        PACKAGE: {"__path__": [str(folder)]},
    }
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "vllm"}
    for name in before:
        del sys.modules[name]
    for name, attributes in contents.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        sys.modules[name] = module
    vars(sys.modules["vllm"])["envs"] = sys.modules["vllm.envs"]
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
            del sys.modules[name]
        sys.modules.update(before)
