"""Locks on folders. They end with the process that holds them, however it ends, and leave no file behind."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: without locks
    fcntl = None  # type: ignore[assignment]

PATIENCE = 60.0
"""Seconds to wait for another writer. Writers hold a folder only while they put files in place."""


class OpenFolder:
    """A folder held open, so that it can be locked and told from another folder that took its place.

    Raises:
        OSError: There is no folder at `path`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None if fcntl is None else os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        if self._handle is None:
            os.scandir(path).close()
        self._changed = self._last_change()

    def _last_change(self) -> int:
        """When an entry of the folder last came, went or was replaced."""
        return (os.stat(self.path) if self._handle is None else os.fstat(self._handle)).st_mtime_ns

    def lock(self, shared: bool = False) -> bool | None:
        """Lock the folder if no other holder did: whether it worked, or None where the file system has no locks.

        Any number of holders may share it, but not with one that does not share.
        """
        if self._handle is None:
            return None
        try:
            fcntl.flock(self._handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return None
        return True

    def is_in_place(self) -> bool:
        """Whether the folder still is what its path names."""
        if self._handle is None:
            return True
        try:
            return os.path.samestat(os.fstat(self._handle), os.stat(self.path))
        except OSError:
            return False

    def is_unchanged(self) -> bool:
        """Whether it is in place, and no entry came, went or was replaced since it was opened.

        Times have a grain of some milliseconds, so two changes right after each other may look like one.
        """
        try:
            return self.is_in_place() and self._last_change() == self._changed
        except OSError:
            return False

    def sync(self) -> None:
        """Wait until the disk has the folder's entries."""
        if self._handle is not None:
            os.fsync(self._handle)

    def close(self) -> None:
        """Unlock and close. A child process that inherited the folder does not keep the lock."""
        if self._handle is not None:
            with suppress(OSError):
                fcntl.flock(self._handle, fcntl.LOCK_UN)
            os.close(self._handle)
            self._handle = None


@contextmanager
def locked_folder(path: Path, patience: float = PATIENCE) -> Iterator[None]:
    """Hold the folder that `path` names alone, as far as the file system has locks.

    Raises:
        TimeoutError: Another process held it for `patience` seconds.
        OSError: There is no folder at `path`.
    """
    start = time.monotonic()
    while True:
        folder = OpenFolder(path)
        try:
            locked = folder.lock()
            if locked is not False and folder.is_in_place():
                yield
                return
        finally:
            folder.close()
        waited = time.monotonic() - start
        if waited > patience:
            raise TimeoutError(f"another process has been writing it for {patience:.0f} seconds")
        time.sleep(random.uniform(1e-4, 5e-4) if waited < 2 else 5e-3)  # short, since all who wait have equal chances
