"""Two operations that Python's `os` lacks: exchange two paths in one step, and rename without replacing."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

AT_FDCWD = -100
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
"""Flags of Linux' renameat2(2)."""
RENAME_SWAP, RENAME_EXCL = 2, 4
"""Flags of macOS' renamex_np(2)."""


def exchange(first: Path, second: Path) -> None:
    """Exchange two files or folders in one step, so that no program finds one of the paths missing.

    Raises:
        OSError: With ENOSYS, EINVAL or EOPNOTSUPP if the system or file system cannot do it; otherwise as rename(2).
    """
    _rename(first, second, linux=RENAME_EXCHANGE, mac=RENAME_SWAP)


def rename_new(old: Path, new: Path) -> None:
    """Rename `old` to `new`, but do not replace an existing file or folder.

    If the system cannot do this in one step, the function first checks that `new` does not exist, and then renames.

    Raises:
        FileExistsError: `new` exists.
        OSError: As rename(2).
    """
    try:
        _rename(old, new, linux=RENAME_NOREPLACE, mac=RENAME_EXCL)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
            raise
        if os.path.lexists(new):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new)) from None
        os.rename(old, new)


def _rename(old: Path, new: Path, linux: int, mac: int) -> None:
    call, flags = _system_call(), mac if sys.platform == "darwin" else linux
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if call(os.fsencode(old), os.fsencode(new), flags):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(old), None, str(new))


@cache
def _system_call() -> Callable[[bytes, bytes, int], int] | None:
    """Return a function (old, new, flags) -> 0 if it works, or None if the system has no such call."""
    if sys.platform == "win32":
        return None
    library = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin":
        return getattr(library, "renamex_np", None)
    renameat2 = getattr(library, "renameat2", None)
    return renameat2 and (lambda old, new, flags: renameat2(AT_FDCWD, old, AT_FDCWD, new, flags))
