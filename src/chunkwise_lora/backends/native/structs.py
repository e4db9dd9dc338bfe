"""The structures and functions of `kernels.c`, declared for ctypes. kernels.c describes the fields."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_float, c_int, c_int64, c_void_p
from typing import Any

ELEMENTS = {"float32": 1, "bfloat16": 2, "float16": 3}
"""Element types that the kernels support, and their codes."""


class Pools(Structure):
    """Addresses of a layer's keys or values."""

    _fields_ = [(name, c_void_p) for name in ("hot", "codes", "scales", "others")]


class Shape(Structure):
    """Shape of an attention call."""

    _fields_ = [
        *((name, c_int64) for name in ("batch", "heads", "group", "width")),
        *((name, c_int64) for name in ("hot", "hot_room", "cold", "cold_room", "int8_heads")),
        ("places", c_void_p),
    ]


class Slice(Structure):
    """One module of a layer. A layer may compute several modules at once, such as query, key and value."""

    _fields_ = [
        *((name, c_void_p) for name in ("down", "up", "ranks")),
        *((name, c_int64) for name in ("out", "offset", "in_features", "rank", "rungs", "element")),
    ]


class Layer(Structure):
    """The modules that one adapter has in a layer."""

    _fields_ = [("slices", POINTER(Slice)), ("count", c_int64)]


class Segment(Structure):
    """The tokens of a pass that one adapter runs for."""

    _fields_ = [
        *((name, c_void_p) for name in ("weights", "rows")),
        *((name, c_int64) for name in ("rung", "rungs", "tokens")),
    ]


class Functions:
    """The functions of a library for one element type. They take addresses, and return 0 or an error code.

    Raises:
        AttributeError, ValueError: The library lacks a function or a constant.
    """

    def __init__(self, library: ctypes.CDLL, element: str) -> None:
        def function(name: str, *arguments: Any) -> Any:
            found = library[f"{name}_{element}"]
            found.argtypes, found.restype = list(arguments), c_int
            return found

        self.has_blocks = bool(c_int.in_dll(library, f"has_blocks_{element}").value)
        address, number = c_void_p, c_int64
        self.add_segments = function("add_segments", *[address] * 4, *[number] * 4, c_int)
        self.multiply = function("multiply", *[address] * 4, *[number] * 3, c_int)
        self.attend = function(
            *("attend", address, address, POINTER(Pools), POINTER(Pools), address, number, c_float, POINTER(Shape)),
            *(number, c_int),
        )
