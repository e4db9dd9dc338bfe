"""Memory of the process."""

from __future__ import annotations

import ctypes


def give_memory_back() -> None:
    """Return freed memory to the system. glibc keeps free pieces between pieces that are still in use."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
