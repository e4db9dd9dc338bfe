"""Reads the header of a GGUF file: its fields, and the shapes of its tensors.

`gguf.GGUFReader` makes several objects for each token of the vocabulary, which takes seconds, and a damaged length can
keep it busy for ever. Here lists are skipped, and every length is checked against the file.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFValueType

from chunkwise_lora.errors import LadderError

VERSIONS = (2, 3)

FORMATS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
"""Formats of the module `struct`."""

LIST = "a list"
"""Stands for the value of every field that is a list."""


@dataclass(frozen=True)
class GgufHeader:
    """The header of a GGUF file."""

    fields: dict[str, Any]
    """Values by key. A list is replaced by `LIST`."""
    shapes: dict[str, tuple[int, ...]]
    """Shapes by tensor name, (out, in) for a linear module."""

    @classmethod
    def read(cls, path: Path) -> GgufHeader:
        """Read the header of the file `path`.

        Raises:
            LadderError: The file cannot be read, or is not a GGUF file.
        """
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _header(_Cursor(data))
        except (OSError, ValueError, struct.error) as cause:
            raise LadderError(
                f"{path}: is not a GGUF file that can be read ({cause}); download or convert it again"
            ) from None


class _Cursor:
    """A place in the file that moves on as values are read. Raises a ValueError or struct.error past the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def skip(self, size: int) -> int:
        """Move on by `size` bytes, and return the old place."""
        old, self._at = self._at, self._at + size
        if self._at > len(self._data):
            raise ValueError("it ends within its header")
        return old

    def number(self, kind: str) -> Any:
        layout = f"<{kind}"
        return struct.unpack_from(layout, self._data, self.skip(struct.calcsize(layout)))[0]

    def text(self) -> str:
        start = self.skip(self.number("Q"))
        return self._data[start : self._at].decode(errors="replace")

    def value(self) -> Any:
        kind = GGUFValueType(self.number("I"))
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind != GGUFValueType.ARRAY:
            return self.number(FORMATS[kind])
        kind, length = GGUFValueType(self.number("I")), self.number("Q")
        if kind == GGUFValueType.ARRAY:
            raise ValueError("it has a list of lists")
        if kind != GGUFValueType.STRING:
            self.skip(length * struct.calcsize(FORMATS[kind]))
            return LIST
        for _ in range(length):
            self.skip(self.number("Q"))
        return LIST


def _header(cursor: _Cursor) -> GgufHeader:
    if cursor.number("4s") != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = cursor.number("I")
    if version not in VERSIONS:
        raise ValueError(f"its version is {version}, not one of {VERSIONS}, or it is for big-endian machines")
    tensors, fields = cursor.number("Q"), cursor.number("Q")
    values = {}
    for _ in range(fields):
        name = cursor.text()
        values[name] = cursor.value()
    shapes = {}
    for _ in range(tensors):
        name, dimensions = cursor.text(), cursor.number("I")
        if dimensions > 4:
            raise ValueError(f"a tensor has {dimensions} dimensions")
        shapes[name] = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
        cursor.skip(struct.calcsize("<IQ"))  # number format and place
    return GgufHeader(values, shapes)
