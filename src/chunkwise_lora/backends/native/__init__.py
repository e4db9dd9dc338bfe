"""The C kernels of `kernels.c`, compiled on first use where a C compiler is at hand.

On a CPU, PyTorch's products of one row with a skinny matrix cost more in calls than in arithmetic, and its attention of
one token over a half-precision cache runs far from memory speed and reads no INT8. Without a compiler PyTorch does it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from ctypes import POINTER, Array, Structure, byref, c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.c")
DEFINES = {torch.float32: [], torch.bfloat16: ["-DBFLOAT16"]}
"""Element types that the kernels know."""
FLAGS: tuple[list[str], ...] = (["-march=native", "-fopenmp"], ["-fopenmp"], [])
"""Tried in this order, since not every compiler knows every one."""
SERIAL_WORK = 100_000
"""Numbers to read below which a second thread costs more than it brings."""


class Pools(Structure):
    """Where a layer's keys or values lie; see `kernels.c`."""

    _fields_ = [(name, c_void_p) for name in ("hot", "codes", "scales", "others")]


class Shape(Structure):
    """Shape of an attention call; see `kernels.c`."""

    _fields_ = [
        *((name, c_int64) for name in ("batch", "heads", "group", "width")),
        *((name, c_int64) for name in ("hot", "hot_room", "cold", "cold_room", "int8_heads")),
        ("places", c_void_p),
    ]


class Slice(Structure):
    """One module of a layer that computes several at once; see `kernels.c`."""

    _fields_ = [*((name, c_void_p) for name in ("down", "up", "ranks")), ("out", c_int64), ("offset", c_int64)]


class Layer(Structure):
    """What one adapter has in a layer; see `kernels.c`."""

    _fields_ = [("slices", POINTER(Slice)), ("count", c_int64)]


class Part(Structure):
    """The tokens of a pass that one adapter runs for; see `kernels.c`."""

    _fields_ = [
        *((name, c_void_p) for name in ("weights", "rows")),
        *((name, c_int64) for name in ("rung", "rungs", "tokens")),
    ]


class Kernels:
    """The kernels for one element type. All tensors are contiguous and on the CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._add_adapter = library.add_adapter
        self._add_adapter.argtypes = [*[c_void_p] * 6, *[c_int64] * 4, c_int]
        self._add_adapter.restype = None
        self._add_parts = library.add_parts
        self._add_parts.argtypes = [c_void_p, c_void_p, POINTER(Layer), POINTER(Part), *[c_int64] * 3, c_int]
        self._add_parts.restype = None
        self._multiply = library.multiply
        self._multiply.argtypes = [*[c_void_p] * 4, *[c_int64] * 3, c_int]
        self._multiply.restype = None
        self._attend = library.attend
        self._attend.argtypes = [
            *(c_void_p, c_void_p, POINTER(Pools), POINTER(Pools), c_void_p, c_int64, c_float),
            *(POINTER(Shape), c_int64, c_int),
        ]
        self._attend.restype = c_int

    def add_adapter(
        self, y: Tensor, x: Tensor, down: Tensor, up: Tensor, gates: Tensor | None, rows: Tensor | None
    ) -> None:
        """In place, y (..., out) += (x (..., in) @ down.T * gates) @ up, for the tokens in `rows` or for all.

        `down` is (k, in), `up` (k, out), `gates` (tokens, k) in float32, `rows` (tokens,) in int64.
        """
        width_in, width_out = x.shape[-1], y.shape[-1]
        self._add_adapter(
            y.data_ptr(),
            x.data_ptr(),
            down.data_ptr(),
            up.data_ptr(),
            None if gates is None else gates.data_ptr(),
            None if rows is None else rows.data_ptr(),
            x.numel() // width_in if rows is None else len(rows),
            width_in,
            width_out,
            len(down),
            torch.get_num_threads(),
        )

    def add_parts(self, y: Tensor, x: Tensor, layers: Array[Layer], parts: Array[Part]) -> None:
        """In place, y (tokens, width) += what the adapters of a pass add to one layer for x (tokens, in).

        `layers` says what the adapter of each part has there. No token is in two parts.
        """
        self._add_parts(
            y.data_ptr(), x.data_ptr(), layers, parts, len(parts), x.shape[1], y.shape[1], torch.get_num_threads()
        )

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(..., out) x (..., in) in float32 times weight (out, in) transposed, plus bias (out,)."""
        width_out, width_in = weight.shape
        y = weight.new_empty((*x.shape[:-1], width_out))
        x = x.contiguous()
        self._multiply(
            y.data_ptr(),
            x.data_ptr(),
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            x.numel() // width_in,
            width_in,
            width_out,
            torch.get_num_threads(),
        )
        return y

    def attend(
        self, query: Tensor, keys: Pools, values: Pools, shape: Shape, mask: Tensor | None, scaling: float
    ) -> Tensor:
        """(batch, 1, heads, width) attention of query (batch, heads, 1, width) over a layer's cold and hot slots.

        `mask` (batch, 1, 1, slots) tells which slots count.
        """
        batch, heads, _, width = query.shape
        query = query.contiguous()
        output = query.new_empty((batch, 1, heads, width))
        work = shape.batch * shape.heads * (shape.hot + shape.cold) * shape.width
        threads = torch.get_num_threads() if work > SERIAL_WORK else 1
        failed = self._attend(
            output.data_ptr(),
            query.data_ptr(),
            byref(keys),
            byref(values),
            None if mask is None else mask.data_ptr(),
            0 if mask is None else mask.stride(0),
            scaling,
            byref(shape),
            threads,
            threads,
        )
        if failed:
            raise MemoryError("no memory for the attention of a decode step")
        return output


@cache
def kernels(dtype: torch.dtype) -> Kernels | None:
    """The kernels for `dtype`, None where it is not known, no compiler works, or CHUNKWISE_KERNELS=0 is set."""
    if dtype not in DEFINES or os.environ.get("CHUNKWISE_KERNELS") == "0":
        return None
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        logger.info("no C compiler: decode steps run on PyTorch alone, more slowly")
        return None
    try:
        return Kernels(_compiled(shlex.split(compiler), DEFINES[dtype]))
    except (OSError, subprocess.CalledProcessError) as error:
        why = error.stderr.strip()[-500:] if isinstance(error, subprocess.CalledProcessError) else error
        logger.warning("the C kernels cannot be had, so decode steps run more slowly: %s", why)
        return None


def _compiled(compiler: list[str], defines: list[str]) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(prefix="chunkwise-") as folder:
        library = str(Path(folder) / "kernels.so")
        for last, flags in zip((False, False, True), FLAGS, strict=True):
            options = ["-O3", "-fno-math-errno", "-shared", "-fPIC", *flags, *defines]
            command = [*compiler, *options, str(SOURCE), "-o", library, "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, check=last)
            if not done.returncode:
                break
        return ctypes.CDLL(library)  # stays mapped when the file is gone


def give_memory_back() -> None:
    """Let the system have what has been freed: glibc keeps pieces between others that are still in use."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


@cache
def emulates(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether PyTorch's matrix products in `dtype` run far below float32's on `device`: half precision on a CPU
    without instructions for it."""
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16) or not torch.backends.mkldnn.is_available():
        return False
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{'bf16' if dtype == torch.bfloat16 else 'fp16'}_supported")
    return not supported()
