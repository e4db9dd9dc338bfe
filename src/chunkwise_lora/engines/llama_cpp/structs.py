"""The structures and functions of `native/graph.c`, declared for ctypes. graph.c describes the fields."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_char, c_char_p, c_int, c_int32, c_int64, c_void_p

ELEMENTS = {"float32": 0, "float16": 1, "int8": 2}
"""Element types of factors, and their codes."""
TILE = 32
"""Outputs of a tile of `up`."""
NAME_LENGTH = 64
"""Bytes of a tensor's name in ggml."""


class Factors(Structure):
    """The factors of one adapter in one module."""

    _fields_ = [(name, c_void_p) for name in ("down", "up", "scales", "ranks")] + [("rank", c_int64)]


class Pass(Structure):
    """What runs in one llama.cpp context."""

    _fields_ = [
        ("modules", c_void_p),
        *((name, c_int64) for name in ("module_count", "rungs", "rank", "element")),
        *((name, c_void_p) for name in ("z", "partials")),
        *((name, c_int64) for name in ("threads", "head_numbers", "is_off")),
        *((name, c_void_p) for name in ("tokens", "adapters", "tops", "weights")),
        ("rows", c_int64),
        *((name, c_void_p) for name in ("open", "outputs")),
        *(
            (name, c_int64)
            for name in ("room", "output_count", "first_row", "graph_rows", "graphs", "patterns", "attentions")
        ),
        ("error", c_int32),
        ("finished", c_int32),
        ("where", c_char * NAME_LENGTH),
    ]


class Module(Structure):
    """One adapted module of the model."""

    _fields_ = [
        ("running", POINTER(Pass)),
        ("name", c_char_p),
        ("inputs", c_int64),
        ("outputs", c_int64),
        ("factors", POINTER(Factors)),
    ]


class Functions:
    """The functions of a library.

    Raises:
        AttributeError: The library lacks a function.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.observe = library.observe
        self.same_layout = library.same_layout
        self.same_layout.argtypes, self.same_layout.restype = [c_void_p, c_void_p, ctypes.c_size_t, c_void_p], c_int
        self.entropy = library.entropy
        self.entropy.argtypes, self.entropy.restype = [c_void_p, c_int64], ctypes.c_float
