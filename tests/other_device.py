"""A device that stands for a GPU on machines without one, and that finds a missing `.to(device)`.

Its tensors hold CPU tensors, so it computes what a CPU computes. But they can neither be mixed with tensors on the CPU
nor be read as one, where CUDA refuses that, too. `register` changes the process for good: run it in a process of its
own, as `in_another_process` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "other"
_ATEN = torch.ops.aten
_COPIES = (_ATEN.copy_.default, _ATEN._to_copy.default)
_INDEXED = (_ATEN.index.Tensor, _ATEN.index_put.default, _ATEN.index_put_.default, _ATEN._index_put_impl_.default)


class Mixed(RuntimeError):
    """An operation got tensors on different devices."""


class OtherTensor(Tensor):
    """A tensor on the device. `inner` holds its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, requires_grad: bool = False) -> OtherTensor:
        inner = inner.inner if isinstance(inner, OtherTensor) else inner
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            inner.stride(),
            inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
            requires_grad=requires_grad,
        )
        made.inner = inner
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OtherTensor({self.inner})"

    def __deepcopy__(self, memo: dict[int, Any]) -> OtherTensor:
        made = memo[id(self)] = OtherTensor(self.inner.clone(), self.requires_grad)
        vars(made)["_is_param"] = getattr(self, "_is_param", False)
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.data_ptr, Tensor.untyped_storage, Tensor.tolist):  # which such tensors do not have
            return func(args[0].inner)
        if func is Tensor.new_tensor:
            return func(args[0].inner, *args[1:], **(kwargs or {})).to(args[0].device)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Made(TorchFunctionMode):
    """Lets `torch.tensor` make tensors on the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device") if func in (torch.tensor, torch.as_tensor) else None
        if device is None or torch.device(device).type != NAME:
            return func(*args, **kwargs)
        return func(*args, **kwargs | {"device": "cpu"}).to(device)


class _Module:
    """What PyTorch and its users look for in `torch.other`."""

    is_available = staticmethod(lambda: False)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    get_rng_state = staticmethod(lambda device=0: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=0: None)
    manual_seed_all = manual_seed = staticmethod(lambda seed: None)
    _is_in_bad_fork = staticmethod(lambda: False)
    is_initialized = staticmethod(lambda: True)
    get_amp_supported_dtype = staticmethod(list)


@torch.inference_mode(False)  # in which PyTorch refuses views of such tensors
def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation that gets or makes tensors on the device.

    Raises:
        Mixed: CUDA would refuse it.
    """
    if func is _ATEN._fused_sdp_choice.default:
        return 0  # attention as plain products
    given = tree_leaves((args, kwargs))
    tensors = [one for one in given if isinstance(one, Tensor)]
    asked = kwargs.get("device")
    changes = func._schema.is_mutable
    if changes:
        is_here = isinstance(tensors[0], OtherTensor)
    else:
        is_here = any(isinstance(one, OtherTensor) for one in tensors) if asked is None else _is_here(asked)
    checked = [] if func in _COPIES else tensors
    if func in _INDEXED and isinstance(args[0], OtherTensor):  # its indices may lie on the CPU
        checked = tree_leaves((args[:1], args[2:]))
    kinds = {isinstance(one, OtherTensor) for one in checked if isinstance(one, Tensor) and one.ndim}
    if len(kinds) > 1 or (is_here and any(isinstance(one, torch.Generator) for one in given)):
        raise Mixed(f"{func} gets tensors or a generator on the CPU and tensors on another device")
    args_there, kwargs_there = tree_map(lambda one: one.inner if isinstance(one, OtherTensor) else one, (args, kwargs))
    found = func(*args_there, **kwargs_there | ({} if asked is None else {"device": torch.device("cpu")}))
    if not is_here:
        return args[0] if changes else found
    found = tree_map(lambda one: OtherTensor(one) if isinstance(one, Tensor) else one, found)
    return return_and_correct_aliasing(func, args, kwargs, found)


def _is_here(device: Any) -> bool:
    return torch.device(device).type == NAME


def register() -> None:
    """Make the device known to this process."""
    torch.set_num_threads(1)
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), "PrivateUse1")
    register.kept = library, _Made()  # type: ignore[attr-defined]
    register.kept[1].__enter__()  # type: ignore[attr-defined]


@contextmanager
def in_another_process() -> Iterator[Callable[..., Any]]:
    """A function that calls a function of a test module in a process that has the device.

    The process is a new one, because PyTorch learns about devices at its first backward pass.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), register) as processes:
        yield lambda function, *args: processes.submit(function, *args).result()
