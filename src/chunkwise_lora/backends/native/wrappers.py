"""The C kernels as typed functions of tensors.

C gets addresses, so everything that could make it read or write out of bounds is checked. Tensors that are prepared
once (`slices_of`, `segments_of`, `AttentionPools`) are checked when they are prepared. Element type, device and layout
of a call's tensors are checked here; row numbers, rungs, columns and slots are checked in C.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Sequence
from ctypes import Array, byref
from functools import cache
from threading import Lock
from typing import Generic, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor

from chunkwise_lora.backends.native import build
from chunkwise_lora.backends.native.selftest import works
from chunkwise_lora.backends.native.structs import ELEMENTS, Functions, Layer, Pools, Segment, Shape, Slice
from chunkwise_lora.errors import EngineError

logger = logging.getLogger(__name__)

StructureT = TypeVar("StructureT", bound=ctypes.Structure)

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""Element types that the kernels support."""
SERIAL_WORK = 100_000
"""Attention that reads fewer numbers than this runs on one thread: starting a second takes longer than it saves."""
_NO_MEMORY = 1
_REFUSALS = {
    2: "a segment has rows that the input does not have",
    3: "a segment uses a rung that the adapter does not have",
    4: "a module's factors do not fit the layer's element type, input or output",
    5: "a cache layer uses slots or heads that its pools do not have",
}
"""Messages by the error code that a kernel returns."""


class Structures(Generic[StructureT]):
    """An array of C structures. It keeps alive what they point to.

    Args:
        array: The structures.
        owners: What holds the memory that they point to.
    """

    def __init__(self, array: Array[StructureT], owners: object) -> None:
        self.array = array
        self.owners = owners
        self.count = len(array)
        self.address = ctypes.addressof(array)


def slices_of(modules: Sequence[tuple[Tensor, Tensor, Tensor, int]]) -> Structures[Slice]:
    """Return one adapter's modules of a layer as C structures, which keep their tensors alive.

    Args:
        modules: For each module, its factors down (r, in) and up (r, out), its rank on each rung (rungs,) in int64, in
            ascending order, and its first column in the layer's output.

    Raises:
        EngineError: A tensor has another element type, shape or layout, or is not on the CPU.
    """
    for down, up, ranks, _ in modules:
        _check("down", down, (down.dtype,), (None, None))
        _check("up", up, (down.dtype,), (len(down), None))
        _check("ranks", ranks, (torch.int64,), (None,))
        if down.dtype not in NAMES:
            raise EngineError(f"the C kernels do not know {down.dtype}; they know {', '.join(map(str, NAMES))}")
        if not (len(ranks) and ranks[0] >= 0 and ranks[-1] <= len(down) and bool((ranks.diff() >= 0).all())):
            raise EngineError(f"ranks must ascend from 0 to at most {len(down)}, not {ranks.tolist()}")
    found = (Slice * len(modules))(
        *(
            Slice(
                *(down.data_ptr(), up.data_ptr(), ranks.data_ptr(), up.shape[1], offset),
                *(down.shape[1], len(down), len(ranks), ELEMENTS[NAMES[down.dtype]]),
            )
            for down, up, ranks, offset in modules
        )
    )
    return Structures(found, modules)


def layers_of(adapters: Sequence[Structures[Slice] | None]) -> Structures[Layer]:
    """Return for each segment of a pass the slices that its adapter has in a layer, or none."""
    layers = (Layer() if slices is None else Layer(slices.array, slices.count) for slices in adapters)
    return Structures((Layer * len(adapters))(*layers), adapters)


def segments_of(segments: Sequence[tuple[int, Tensor | None, Tensor | None]], tokens: int) -> Structures[Segment]:
    """Return the segments of a pass as C structures, which keep their tensors alive.

    Args:
        segments: For each segment, the highest rung that its tokens need, their weights over the rungs (tokens, rungs)
            in float32, or None if all use that rung with weight 1, and their rows in the pass (tokens,) in int64, or
            None for all tokens.
        tokens: Tokens of the pass.

    Raises:
        EngineError: A tensor has another element type, shape or layout, or is not on the CPU.
    """
    found = (Segment * len(segments))()
    for segment, (rung, weights, rows) in zip(found, segments, strict=True):
        segment.rung, segment.tokens = rung, tokens if rows is None else len(rows)
        if rows is not None:
            _check("rows", rows, (torch.int64,), (None,))
            segment.rows = rows.data_ptr()
        if weights is not None:
            _check("weights", weights, (torch.float32,), (segment.tokens, None))
            segment.weights, segment.rungs = weights.data_ptr(), weights.shape[1]
    return Structures(found, segments)


class PoolTensors(NamedTuple):
    """The storage of a layer's keys or values. The slots in use come first; there may be room for more."""

    hot: Tensor
    """(batch, heads, room, head_dim)"""
    codes: Tensor | None = None
    """(batch, INT8 heads, cold room, head_dim) int8; None without a cold pool, as are the next two."""
    scales: Tensor | None = None
    """(batch, INT8 heads, cold room, 1) bfloat16"""
    others: Tensor | None = None
    """(batch, other heads, cold room, head_dim)"""


class AttentionPools:
    """Keys and values of one cache layer, as addresses for `Kernels.attend`.

    It does not keep the tensors alive, so that a cache can free them. After a cache has replaced its storage, it must
    create another object before the next `attend`.

    Args:
        keys: Storage of the keys.
        values: Storage of the values, of the same shapes.
        places: (heads,) int32, the place of each head in the cold pool: p >= 0 is place p of the INT8 heads, p < 0 is
            place -1 - p of the other heads. None without a cold pool.

    Raises:
        EngineError: A tensor has another element type, shape or layout, or is not on the CPU.
    """

    def __init__(self, keys: PoolTensors, values: PoolTensors, places: Tensor | None = None) -> None:
        self.dtype = keys.hot.dtype
        batch, heads, room, width = keys.hot.shape
        self.shape = Shape(batch, heads, 1, width, 0, room)
        self.keys, self.values = Pools(), Pools()
        if places is not None and keys.codes is not None:
            _check("places", places, (torch.int32,), (heads,))
            self.shape.int8_heads, self.shape.cold_room = keys.codes.shape[1:3]
            self.shape.places = places.data_ptr()
        for kind, pools, tensors in (("keys", self.keys, keys), ("values", self.values, values)):
            _check(f"hot {kind}", tensors.hot, (self.dtype,), (batch, heads, room, width))
            pools.hot = tensors.hot.data_ptr()
            if places is None:
                continue
            codes, scales, others = tensors[1:]
            if codes is None or scales is None or others is None:
                raise EngineError(f"the cold pool of the {kind} is not complete")
            int8, slots = self.shape.int8_heads, self.shape.cold_room
            _check(f"codes of {kind}", codes, (torch.int8,), (batch, int8, slots, width))
            _check(f"scales of {kind}", scales, (torch.bfloat16,), (batch, int8, slots, 1))
            _check(f"other {kind}", others, (self.dtype,), (batch, heads - int8, slots, width))
            pools.codes, pools.scales, pools.others = codes.data_ptr(), scales.data_ptr(), others.data_ptr()


def _check(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], shape: Sequence[int | None]) -> None:
    """Refuse a tensor that is not a contiguous CPU tensor of this element type and shape (None: any size)."""
    fits = tensor.ndim == len(shape) and all(
        want in (None, size) for want, size in zip(shape, tensor.shape, strict=True)
    )
    if tensor.is_cpu and tensor.dtype in dtypes and tensor.is_contiguous() and fits:
        return
    wanted = ", ".join("any" if size is None else str(size) for size in shape)
    layout = "contiguous" if tensor.is_contiguous() else "not contiguous"
    raise EngineError(
        f"{name} must be a contiguous CPU tensor ({wanted}) in {dtypes[0]}, not {tuple(tensor.shape)} in "
        f"{tensor.dtype} on {tensor.device}, {layout}"
    )


class Kernels:
    """The kernels for one element type."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self.dtype = dtype
        functions = Functions(library, NAMES[dtype])
        self.has_blocks = functions.has_blocks
        """Whether `add_segments` is faster than PyTorch for many tokens, too, if the width of the input is even."""
        self._add_segments, self._multiply, self._attend = functions.add_segments, functions.multiply, functions.attend

    def add_segments(self, y: Tensor, x: Tensor, layers: Structures[Layer], segments: Structures[Segment]) -> None:
        """Add the adapter product of one layer for x (..., in) to y (..., width), in place.

        `layers` holds the slices of each segment's adapter in the layer. No token may be in two segments.

        Raises:
            EngineError: A tensor has another element type, shape or layout, is not on the CPU, or does not fit.
            MemoryError: There is no memory for intermediate results.
        """
        tokens, width_in, width_out = self._sizes(y, x)
        count = segments.count
        if layers.count != count:
            raise EngineError(f"there are {count} segments, but adapters for {layers.count}")
        threads = torch.get_num_threads()
        failed = self._add_segments(
            y.data_ptr(), x.data_ptr(), layers.address, segments.address, count, tokens, width_in, width_out, threads
        )
        if failed:
            _raise_for(failed)

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return (..., out): x (..., in) in float32 times weight (out, in) transposed, plus bias (out,).

        Raises:
            EngineError: A tensor has another element type or shape, is not on the CPU, or the weight is not contiguous.
        """
        width_out, width_in = weight.shape
        x = x.contiguous()
        if (
            x.dtype is not torch.float32
            or x.shape[-1] != width_in
            or not x.is_cpu
            or weight.dtype is not self.dtype
            or not weight.is_cpu
            or not weight.is_contiguous()
        ):
            _check("the input", x, (torch.float32,), (*x.shape[:-1], width_in))
            _check("the weight", weight, (self.dtype,), (width_out, width_in))
        if bias is not None and (bias.dtype is not self.dtype or bias.numel() != width_out or not bias.is_contiguous()):
            _check("the bias", bias, (self.dtype,), (width_out,))
        y = weight.new_empty((*x.shape[:-1], width_out))
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
        self, query: Tensor, pools: AttentionPools, slots: tuple[int, int], mask: Tensor | None, scaling: float
    ) -> Tensor:
        """Return (batch, 1, heads, head_dim): attention of one token per sequence over a layer's cold and hot slots.

        Args:
            query: (batch, heads, 1, head_dim); `heads` is a multiple of the pools' heads.
            pools: Keys and values.
            slots: Numbers of cold and hot slots in use.
            mask: (batch, 1, 1, slots) bool, the slots that each sequence sees; None for all.
            scaling: Factor of the scores.

        Raises:
            EngineError: A tensor has another element type, shape or layout, or is not on the CPU.
            MemoryError: There is no memory for intermediate results.
        """
        shape = pools.shape
        batch, heads, tokens, width = query.shape
        shape.cold, shape.hot = slots
        shape.group, rest = divmod(heads, shape.heads)
        if query.dtype is not self.dtype or pools.dtype is not self.dtype or not query.is_cpu or rest:
            raise EngineError(
                f"the query is {query.dtype} with {heads} heads, the cache {pools.dtype} with {shape.heads}"
            )
        if tokens != 1 or batch != shape.batch or width != shape.width:
            raise EngineError(
                f"the query is {tuple(query.shape)}, the cache for {(shape.batch, heads, 1, shape.width)}"
            )
        if mask is not None and (
            mask.dtype is not torch.bool
            or mask.shape != (batch, 1, 1, sum(slots))
            or mask.stride(3) != 1
            or not mask.is_cpu
        ):
            raise EngineError(
                f"the mask is {tuple(mask.shape)} in {mask.dtype}, not {(batch, 1, 1, sum(slots))} in bool"
            )
        query = query.contiguous()
        output = query.new_empty((batch, 1, heads, width))
        work = batch * shape.heads * sum(slots) * width
        threads = torch.get_num_threads() if work > SERIAL_WORK else 1
        failed = self._attend(
            output.data_ptr(),
            query.data_ptr(),
            byref(pools.keys),
            byref(pools.values),
            None if mask is None else mask.data_ptr(),
            0 if mask is None else mask.stride(0),
            scaling,
            byref(shape),
            threads,
            threads,
        )
        if failed:
            _raise_for(failed)
        return output

    def _sizes(self, y: Tensor, x: Tensor) -> tuple[int, int, int]:
        """Return the tokens and widths of x (..., in) and y (..., out). It runs in every layer, so it is short."""
        width_in, width_out = x.shape[-1], y.shape[-1]
        tokens = x.numel() // (width_in or 1)
        dtype = self.dtype
        if not (
            x.dtype is dtype
            and y.dtype is dtype
            and y.numel() == tokens * width_out
            and x.is_contiguous()
            and y.is_contiguous()
            and x.is_cpu
            and y.is_cpu
        ):
            _check("the input", x, (dtype,), x.shape)
            _check("the output", y, (dtype,), (*x.shape[:-1], None))
            raise EngineError(f"the output {tuple(y.shape)} does not fit the input {tuple(x.shape)}")
        return tokens, width_in, width_out


def _raise_for(code: int) -> NoReturn:
    if code == _NO_MEMORY:
        raise MemoryError("there is no memory for the intermediate results of a C kernel")
    raise EngineError(_REFUSALS.get(code, f"a C kernel failed with code {code}"))


@cache
def kernels(dtype: torch.dtype) -> Kernels | None:
    """Return the kernels for an element type, or None if they do not support it or cannot be used.

    CHUNKWISE_KERNELS=0 turns them off. The first call in a process loads the library, and compiles it if needed. If
    that fails, it logs a warning.
    """
    if dtype not in NAMES or os.environ.get("CHUNKWISE_KERNELS") == "0":
        return None
    library = _library()
    return None if library is None else Kernels(library, dtype)


_lock = Lock()
_libraries: list[ctypes.CDLL | None] = []
"""The library of this process, or None if it cannot be used; empty before the first attempt."""


def _library() -> ctypes.CDLL | None:
    with _lock:
        if not _libraries:
            try:
                _libraries.append(build.load(works))
            except (build.BuildError, OSError) as error:
                logger.warning(
                    "the C kernels cannot be used: %s. Adapter products and decode attention on the CPU run on "
                    "PyTorch, which takes up to about twice the time per token. Install gcc or set CC to a C compiler. "
                    "CHUNKWISE_KERNELS=0 silences this warning",
                    error,
                )
                _libraries.append(None)
        return _libraries[0]
