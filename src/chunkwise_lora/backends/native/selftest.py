"""A short test of a loaded library. It uses no PyTorch, because autocast and other modes of PyTorch could change it."""

from __future__ import annotations

import ctypes
from ctypes import byref

import numpy as np

from chunkwise_lora.backends.native.structs import ELEMENTS, Functions, Layer, Pools, Segment, Shape, Slice

_X = np.array([[1, 2, 0, 1], [2, 0, 1, 2]], np.float32)
_DOWN = np.array([[1, 2, 0, 1], [2, 0, 1, 2], [0, 1, 2, 0]], np.float32)
_UP = np.array([[1, 0, 2, 1], [0, 2, 1, 0], [2, 1, 0, 2]], np.float32)
_STATES = np.array([[0, 1, -2, 0.5], [0.5, -1, 2, 0]], np.float32)
_CODES = np.array([[4, -3, 2, 1]], np.int8)
_QUERY = np.array([1, 0.5, -1, 2], np.float32)


def works(library: ctypes.CDLL) -> bool:
    """Return whether a library computes two small products and an attention correctly, in every element type.

    Raises:
        AttributeError, ValueError: It lacks a kernel.
    """
    return all(
        _multiplies(library, name)
        and all(_adds(library, name, copies) for copies in (1, 50))
        and _attends(library, name)
        for name in ELEMENTS
    )


def _multiplies(library: ctypes.CDLL, element: str) -> bool:
    weight, y = _narrow(_DOWN, element), _narrow(np.zeros((2, 3)), element)
    code = Functions(library, element).multiply(y.ctypes.data, _X.ctypes.data, weight.ctypes.data, None, 2, 4, 3, 1)
    return code == 0 and np.array_equal(_wide(y, element), _X @ _DOWN.T)


def _adds(library: ctypes.CDLL, element: str, copies: int) -> bool:
    """Test one gated segment, `copies` of a token, in columns 1 to 4. All element types are exact for small whole
    numbers."""
    tokens = copies + 1
    y, x, down, up = (_narrow(array, element) for array in (np.ones((tokens, 6)), _X[[0] + [1] * copies], _DOWN, _UP))
    ranks, rows, weights = np.array([1, 3]), np.arange(1, tokens), np.ones((copies, 2), np.float32)
    module = Slice(down.ctypes.data, up.ctypes.data, ranks.ctypes.data, 4, 1, 4, 3, 2, ELEMENTS[element])
    layers = (Layer * 1)(Layer((Slice * 1)(module), 1))
    segments = (Segment * 1)(Segment(weights.ctypes.data, rows.ctypes.data, 1, 2, copies))
    code = Functions(library, element).add_segments(y.ctypes.data, x.ctypes.data, layers, segments, 1, tokens, 4, 6, 1)
    expected = np.ones((tokens, 6), np.float32)
    expected[1:, 1:5] += (_X[1] @ _DOWN.T * [2, 1, 1]) @ _UP
    return code == 0 and np.array_equal(_wide(y, element), expected)


def _attends(library: ctypes.CDLL, element: str) -> bool:
    """Test one head over one INT8 slot and two others, with the same keys and values."""
    output, query, hot = (_narrow(array, element) for array in (np.zeros(4), _QUERY, _STATES))
    scale, places = _narrow(np.ones(1), "bfloat16"), np.zeros(1, np.int32)
    pools = Pools(hot.ctypes.data, _CODES.ctypes.data, scale.ctypes.data, None)
    shape = Shape(1, 1, 1, 4, 2, 2, 1, 1, 1, places.ctypes.data)
    code = Functions(library, element).attend(
        *(output.ctypes.data, query.ctypes.data, byref(pools), byref(pools), None, 0, 0.25, byref(shape), 1, 1)
    )
    states = np.concatenate([_CODES.astype(np.float32), _STATES])
    exponentials = np.exp(0.25 * states @ _QUERY)
    return code == 0 and np.allclose(_wide(output, element), exponentials / exponentials.sum() @ states, atol=0.02)


def _narrow(numbers: np.ndarray, element: str) -> np.ndarray:
    if element == "float16":
        return numbers.astype(np.float16)
    wide = np.array(numbers, np.float32)
    return wide if element == "float32" else (wide.view(np.uint32) >> 16).astype(np.uint16)


def _wide(numbers: np.ndarray, element: str) -> np.ndarray:
    if element == "bfloat16":
        return (numbers.astype(np.uint32) << 16).view(np.float32)
    return numbers.astype(np.float32)
