"""Locks on folders. The system releases a lock when its process ends, even if it is killed. There are no lock files."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no fcntl
    fcntl = None  # type: ignore[assignment]

PATIENCE = 60.0
"""Seconds to wait for another writer. Writers hold a folder only while they put files in place."""


class OpenFolder:
    """An open folder, which can be locked and distinguished from another folder that took its place.

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
        """Time in nanoseconds when an entry of the folder was last added, removed or replaced."""
        return (os.stat(self.path) if self._handle is None else os.fstat(self._handle)).st_mtime_ns

    def lock(self, shared: bool = False) -> bool | None:
        """Try to lock the folder. Returns whether it worked, or None if the file system has no locks.

        Any number of holders can have a shared lock at a time. A lock that is not shared excludes all others.
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
        """Return whether the path still names this folder."""
        if self._handle is None:
            return True
        try:
            return os.path.samestat(os.fstat(self._handle), os.stat(self.path))
        except OSError:
            return False

    def is_unchanged(self) -> bool:
        """Return whether it is in place, and no entry was added, removed or replaced since it was opened.

        File times have a resolution of some milliseconds, so two changes in quick succession may look like one.
        """
        try:
            return self.is_in_place() and self._last_change() == self._changed
        except OSError:
            return False

    def sync(self) -> None:
        """Wait until the folder's entries are on the disk."""
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
    """Hold a lock that excludes all others on the folder that `path` names, if the file system has locks.

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
        time.sleep(random.uniform(1e-4, 5e-4) if waited < 2 else 5e-3)  # short, because waiting processes form no queue
