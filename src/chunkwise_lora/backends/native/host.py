"""Returns freed memory of the process to the operating system."""

from __future__ import annotations

import ctypes


def give_memory_back() -> None:
    """Return freed memory to the system. glibc keeps free memory that lies between used memory."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
