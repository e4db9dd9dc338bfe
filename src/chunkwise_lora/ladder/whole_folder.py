"""Writes the files of a folder all at once, and reads a folder beside a writer.

A writer makes a new folder beside the old one, `.NAME.<token>.chunkwise-tmp`, and then exchanges the two in one step
(Linux: renameat2, macOS: renamex_np). So, whenever the writer is killed, the folder holds the old files or the new
ones. What a killed writer leaves beside the folder, the next writer removes; locks tell it that the writer is dead.

Files and folders that are not ours move along: files as hard links before the exchange, the rest by renaming after it.
If a writer is killed in between, the next writer moves them. They are never deleted.

Some folders cannot be exchanged: the current folder of the process, a mount point, a folder whose parent is not
writable, a folder on Windows or on a file system such as NFS. Their files are replaced one by one, the most important
one is removed first and comes back last. Then a writer that is killed while it does this leaves files that are refused
when read. They are never a mixture that loads. Readers wait for the writer as far as the file system has locks.
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
"""Times that a step is tried again because another process came between."""

CANNOT_EXCHANGE = {
    getattr(errno, name)
    for name in ("ENOSYS", "EINVAL", "EOPNOTSUPP", "EXDEV", "EBUSY", "EPERM", "EACCES", "EROFS")
    if hasattr(errno, name)
}

Owned = Callable[[Path], Sequence[str]]
"""The names of the files in a folder that are ours, in the order in which they may be removed."""

Read = TypeVar("Read")


def write_folder(folder: Path, files: Mapping[str, bytes], owned: Owned) -> None:
    """Replace our files in `folder` by `files`, all at once; the module's docstring says what this guarantees.

    New files have the mode 0666 less the umask, a new folder 0777 less the umask. A folder that is replaced keeps its
    mode, and a symbolic link to a folder stays one.

    Args:
        folder: Made where it does not exist, with its parents.
        files: Contents by file name. The last one is the one without which the others are of no use.
        owned: Tells which files of a folder are ours and may be removed, the most important one first.

    Raises:
        OSError: The files cannot be written. The old ones are still there.
    """
    target = Path(os.path.realpath(folder))
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        remove_leftovers(target, owned)
        if _is_current(target):
            _write_in_place(target, files, owned)  # else programs such as a shell would stay in the old folder
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
        with suppress(OSError):  # what is still there, the next writer removes
            _dispose(staging, target, owned)
        lock.close()
    if not exchanged:
        _write_in_place(target, files, owned)


def read_folder(folder: Path, read: Callable[[], Read], self_checking: bool) -> Read:
    """What `read` returns, from one state of the folder, while others may write it.

    A reader that comes between two writers keeps the second one waiting until it is done, so `read` should only read.

    Args:
        folder: What `read` reads from. It need not exist.
        read: Reads the files. It is called again where a writer came between.
        self_checking: Whether `read` itself refuses files that do not belong together.

    Raises:
        ChunkWiseError: `read` raised it, and no writer came between.
        LadderError: A writer did not come to an end.
    """
    end = time.monotonic() + PATIENCE
    while True:
        before = _opened(folder)
        # While a reader holds this lock, no writer exchanges the folder or changes it in place.
        alone = before is not None and before.lock(shared=True) is True and before.is_in_place()
        try:
            result = read()
            if self_checking or alone or _undisturbed(before, folder):
                return result
        except ChunkWiseError:
            if alone or _undisturbed(before, folder):
                raise
        finally:
            if before is not None:
                before.close()
        if time.monotonic() > end:
            raise LadderError(f"{folder}: has been written for {PATIENCE:.0f} seconds; read it again later")
        time.sleep(random.uniform(1e-4, 1e-3))


def _opened(folder: Path) -> OpenFolder | None:
    try:
        return OpenFolder(folder)
    except (OSError, ValueError):
        return None


def _undisturbed(before: OpenFolder | None, folder: Path) -> bool:
    """Whether the folder is what it was, and not written in place, as far as this can be seen without a lock."""
    if before is None:
        return not os.path.isdir(folder)
    with suppress(OSError):
        return before.is_unchanged() and not any(STAGED.fullmatch(entry.name) for entry in _entries(folder))
    return False


def remove_leftovers(target: Path, owned: Owned) -> None:
    """Remove what killed writers of the folder left beside it, and give back what was not theirs."""
    ours = re.compile(re.escape(_prefix(target)) + TOKEN + re.escape(SUFFIX))
    with os.scandir(target.parent) as entries:
        leftovers = [Path(entry.path) for entry in entries if ours.fullmatch(entry.name)]
    for path in leftovers:
        with suppress(OSError):  # a live writer took it away meanwhile, or it is not ours to remove
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
    """A new, locked folder beside the target."""
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
    raise TimeoutError("no folder could be made beside it")


def _put_in_place(staging: Path, target: Path, files: Mapping[str, bytes], owned: Owned) -> bool:
    """Make `staging` the target; whether the file system can do it."""
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
    raise TimeoutError("it appears and disappears all the time")


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
    with suppress(OSError):  # what is still there, the next writer removes
        _give_back_all(staging, target, owned(staging))
        _sync(target.parent)
        _dispose(staging, target, owned)
    return True


def _dispose(old: Path, target: Path, owned: Owned) -> None:
    """Remove a folder beside the target. What in it is not ours moves into the target."""
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
            continue  # something came into it meanwhile
        return


def _give_back_all(old: Path, target: Path, ours: Sequence[str]) -> None:
    for entry in _entries(old):
        if STAGED.fullmatch(entry.name):
            shutil.rmtree(entry.path, ignore_errors=True)
        elif entry.name not in ours or entry.is_dir(follow_symlinks=False):
            with suppress(FileNotFoundError):
                _give_back(Path(entry.path), target / entry.name)


def _give_back(path: Path, place: Path) -> None:
    """Move `path` to `place`, or beside it if something else is there."""
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
    """Replace the files one by one, while no other writer does."""
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
