"""Replaces the files of a folder in one step, and reads a folder that other processes may write.

A writer creates a new folder, `.NAME.<token>.chunkwise-tmp`, next to the old one, and then exchanges the two in one
step (Linux: renameat2, macOS: renamex_np). If the writer is killed at any time, the folder holds the old files or the
new ones. The next writer removes the temporary folder of a killed writer, which it recognises by the missing
lock.

Files and folders that are not ours move to the new folder: files as hard links before the exchange, the others by a
rename after it. If a writer is killed in between, the next writer moves them. They are never deleted.

Some folders cannot be exchanged: the current folder of the process, a mount point, a folder whose parent is not
writable, a folder on Windows or on a file system such as NFS. Their files are replaced one by one. The most important
file is removed first and written last. If a writer is killed in between, the remaining files are refused when they are
read; a mixture of old and new files never loads. Readers wait for the writer if the file system has locks.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from chunkwise_lora.errors import ChunkWiseError, LadderError
from chunkwise_lora.files import write_new
from chunkwise_lora.ladder.folder_lock import PATIENCE, OpenFolder, locked_folder
from chunkwise_lora.ladder.renames import exchange, rename_new

SUFFIX = ".chunkwise-tmp"
TOKEN = r"[0-9a-f]{16}"
STAGED = re.compile(rf"\.staged\.{TOKEN}{re.escape(SUFFIX)}")
TRIES = 1000
"""How often a step is tried again after another process has interfered."""

CANNOT_EXCHANGE = {
    getattr(errno, name)
    for name in ("ENOSYS", "EINVAL", "EOPNOTSUPP", "EXDEV", "EBUSY", "EPERM", "EACCES", "EROFS")
    if hasattr(errno, name)
}
"""Error numbers that mean that a folder cannot be exchanged."""

Owned = Callable[[Path], Sequence[str]]
"""Returns the names of the files in a folder that are ours, in the order in which they may be removed."""

Read = TypeVar("Read")


def write_folder(folder: Path, files: Mapping[str, bytes], owned: Owned) -> None:
    """Replace our files in `folder` by `files` in one step; the module's docstring describes the guarantees.

    New files have the mode 0666 minus the umask, a new folder 0777 minus the umask. A replaced folder keeps its mode.
    If `folder` is a symbolic link, the folder that it points to is replaced.

    Args:
        folder: The folder to write. It is created with its parents if it does not exist.
        files: Contents by file name. The last one is the most important one, without which the others are refused.
        owned: Returns which files of a folder are ours and may be removed, the most important one first.

    Raises:
        OSError: The files cannot be written. The old files are still there.
    """
    target = Path(os.path.realpath(folder))
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        remove_leftovers(target, owned)
        if _is_current(target):
            _write_in_place(target, files, owned)  # after an exchange, a shell would stay in the old folder
            return
    try:
        staging, lock = _new_staging(target)
    except OSError as error:
        if error.errno not in CANNOT_EXCHANGE or not target.is_dir():
            raise
        _write_in_place(target, files, owned)
        return
    try:
        for name, content in files.items():
            write_new(staging / name, content)
        lock.sync()
        exchanged = _put_in_place(staging, target, files, owned)
    finally:
        with suppress(OSError):  # the next writer removes what is left
            _dispose(staging, target, owned)
        lock.close()
    if not exchanged:
        _write_in_place(target, files, owned)


def read_folder(folder: Path, read: Callable[[], Read], self_checking: bool) -> Read:
    """Call `read` and return its result, which comes from one state of the folder even if others write it.

    Writers wait until `read` is done, so `read` should only read the files and not process them.

    Args:
        folder: The folder that `read` reads. It need not exist.
        read: Reads the files. It is called again if a writer has interfered.
        self_checking: Whether `read` itself refuses files that do not belong together.

    Raises:
        ChunkWiseError: `read` raised it, and no writer has interfered.
        LadderError: Writers interfered for too long.
    """
    end = time.monotonic() + PATIENCE
    while True:
        before = _opened(folder)
        # While a reader holds this lock, no writer exchanges the folder or changes it in place.
        locked = before is not None and before.lock(shared=True) is True and before.is_in_place()
        try:
            result = read()
            if self_checking or locked or _undisturbed(before, folder):
                return result
        except ChunkWiseError:
            if locked or _undisturbed(before, folder):
                raise
        finally:
            if before is not None:
                before.close()
        if time.monotonic() > end:
            raise LadderError(
                f"{folder}: other processes have been writing it for {PATIENCE:.0f} seconds; try again later"
            )
        time.sleep(random.uniform(1e-4, 1e-3))


def _opened(folder: Path) -> OpenFolder | None:
    try:
        return OpenFolder(folder)
    except (OSError, ValueError):
        return None


def _undisturbed(before: OpenFolder | None, folder: Path) -> bool:
    """Whether no writer has changed the folder since, as far as this can be seen without a lock."""
    if before is None:
        return not os.path.isdir(folder)
    with suppress(OSError):
        return before.is_unchanged() and not any(STAGED.fullmatch(entry.name) for entry in _entries(folder))
    return False


def remove_leftovers(target: Path, owned: Owned) -> None:
    """Remove the temporary folders of killed writers. Their files that are not ours move to `target`."""
    ours = re.compile(re.escape(_prefix(target)) + TOKEN + re.escape(SUFFIX))
    with os.scandir(target.parent) as entries:
        leftovers = [Path(entry.path) for entry in entries if ours.fullmatch(entry.name)]
    for path in leftovers:
        with suppress(OSError):  # its writer has just moved it, or we may not remove it
            leftover = OpenFolder(path)
            try:
                if leftover.lock() and leftover.is_in_place():
                    _dispose(path, target, owned)
            finally:
                leftover.close()


def _prefix(target: Path) -> str:
    name = target.name
    if len(os.fsencode(name)) > 200:  # names have at most 255 bytes
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return f".{name}."


def _new_staging(target: Path) -> tuple[Path, OpenFolder]:
    """Create a temporary folder next to the target, and lock it."""
    for _ in range(TRIES):
        path = target.with_name(f"{_prefix(target)}{secrets.token_hex(8)}{SUFFIX}")
        os.mkdir(path)
        try:
            folder = OpenFolder(path)
        except FileNotFoundError:  # another writer took it for a leftover before it was locked
            continue
        if folder.lock() is not False and folder.is_in_place():
            return path, folder
        folder.close()
    raise TimeoutError("no temporary folder can be created next to it")


def _put_in_place(staging: Path, target: Path, files: Mapping[str, bytes], owned: Owned) -> bool:
    """Move `staging` to the place of `target`. Returns whether the file system can do it."""
    for _ in range(TRIES):
        if not os.path.lexists(target):
            try:
                os.rename(staging, target)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                continue  # another writer was faster
            _sync(target.parent)
            remove_leftovers(target, owned)
            return True
        with suppress(FileNotFoundError), locked_folder(target):
            return _exchange(staging, target, files, owned)
        time.sleep(0.001)  # somebody removed the target
    raise TimeoutError("other processes create and remove it all the time")


def _is_current(folder: Path) -> bool:
    try:
        return os.path.samefile(folder, os.curdir)
    except OSError:  # the current folder was removed
        return False


def _refuse_folders(target: Path, names: Iterable[str]) -> None:
    for name in names:
        if (target / name).is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder; move it away", str(target / name))


def _exchange(staging: Path, target: Path, files: Mapping[str, bytes], owned: Owned) -> bool:
    _refuse_folders(target, files)
    old = os.stat(target)
    os.chmod(staging, stat.S_IMODE(old.st_mode))
    if hasattr(os, "chown"):
        with suppress(OSError):
            os.chown(staging, old.st_uid, old.st_gid)
    ours = {*owned(target), *files}
    for entry in _entries(target):
        if entry.name not in ours and not entry.is_dir(follow_symlinks=False):
            with suppress(OSError, NotImplementedError):  # then it is renamed after the exchange
                os.link(entry.path, staging / entry.name, follow_symlinks=False)
    _sync(staging)
    try:
        exchange(staging, target)
    except OSError as error:
        if error.errno not in CANNOT_EXCHANGE:
            raise
        return False
    with suppress(OSError):  # the next writer removes what is left
        _give_back_all(staging, target, owned(staging))
        _sync(target.parent)
        _dispose(staging, target, owned)
    return True


def _dispose(old: Path, target: Path, owned: Owned) -> None:
    """Remove a temporary or replaced folder. Its files that are not ours move to `target`."""
    if not os.path.isdir(old):
        return
    for _ in range(TRIES):
        ours = owned(old)
        _give_back_all(old, target, ours)
        for name in ours:
            _unlink(old / name)
        try:
            os.rmdir(old)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            continue  # another process has just added a file
        return


def _give_back_all(old: Path, target: Path, ours: Sequence[str]) -> None:
    for entry in _entries(old):
        if STAGED.fullmatch(entry.name):
            shutil.rmtree(entry.path, ignore_errors=True)
        elif entry.name not in ours or entry.is_dir(follow_symlinks=False):
            with suppress(FileNotFoundError):
                _give_back(Path(entry.path), target / entry.name)


def _give_back(path: Path, place: Path) -> None:
    """Move `path` to `place`, or to another name next to it if `place` is taken."""
    state = os.lstat(path)
    if os.path.lexists(place) and os.path.samestat(state, os.lstat(place)):
        _unlink(path)  # a hard link: it is in its place already
        return
    for number in range(TRIES):
        try:
            rename_new(path, place if number == 0 else place.with_name(f"{place.name}.recovered-{number}"))
        except FileExistsError:
            continue
        return


def _write_in_place(target: Path, files: Mapping[str, bytes], owned: Owned) -> None:
    """Replace the files one by one, with the folder locked."""
    with locked_folder(target):
        _refuse_folders(target, files)
        for entry in _entries(target):
            if STAGED.fullmatch(entry.name):
                shutil.rmtree(entry.path, ignore_errors=True)
        staged = target / f".staged.{secrets.token_hex(8)}{SUFFIX}"
        os.mkdir(staged)
        try:
            for name, content in files.items():
                write_new(staged / name, content)
            for name in owned(target):
                _unlink(target / name)
            _sync(target)
            for name in files:
                os.replace(staged / name, target / name)
            _sync(target)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        yield from list(entries)


def _unlink(path: Path) -> None:
    with suppress(FileNotFoundError, IsADirectoryError):
        os.unlink(path)


def _sync(folder: Path) -> None:
    opened = OpenFolder(folder)
    try:
        opened.sync()
    finally:
        opened.close()
