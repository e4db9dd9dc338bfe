"""Reads and writes files so that an error names the file, and a failed write does not damage it."""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

from chunkwise_lora.errors import ChunkWiseError


def read_text(path: Path, error: type[ChunkWiseError]) -> str:
    """Return the text of `path`, without a byte order mark. If that fails, raise `error`, which names the file."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as cause:  # ValueError: not UTF-8, or a NUL in the path
        raise error(f"{path}: cannot be read ({cause})") from None


def write_new(path: Path, content: bytes) -> None:
    """Create the file `path` with mode 0666 minus the umask, and wait until it is on the disk.

    Raises:
        FileExistsError: `path` exists.
        OSError: The file cannot be written.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, content: bytes, error: type[ChunkWiseError] = ChunkWiseError) -> None:
    """Write a temporary file in the folder of `path`, then rename it to `path`.

    An interrupted write leaves the old file unchanged. A new file has the mode 0666 minus the umask; a replaced file
    keeps its mode. A device or a pipe, such as `/dev/stdout`, is written to directly. If `path` is a symbolic link, the
    file that it points to is replaced.

    If writing fails, `error` is raised, which names the path.
    """
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return
        target = path.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(8)}.tmp")
        try:
            write_new(temporary, content)
            if target.exists():
                os.chmod(temporary, target.stat().st_mode & 0o777)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except (OSError, ValueError) as cause:  # ValueError: a NUL in the path
        raise error(f"{path}: cannot be written ({cause})") from None


def user_cache_folder() -> Path:
    """Return the folder in which this package keeps what it can make again. It may not exist.

    It is `CHUNKWISE_CACHE_DIR`, or else in the platform's cache folder: `$XDG_CACHE_HOME/chunkwise-lora`,
    `~/.cache/chunkwise-lora`, or on macOS `~/Library/Caches/chunkwise-lora`.

    Raises:
        FileNotFoundError: There is no home folder.
    """
    try:
        if chosen := os.environ.get("CHUNKWISE_CACHE_DIR"):
            return Path(chosen).expanduser().absolute()
        home = Path.home()
    except RuntimeError:
        raise FileNotFoundError("there is no home folder; set CHUNKWISE_CACHE_DIR to a folder") from None
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "chunkwise-lora"
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    # Its specification says that relative paths are ignored.
    return (Path(chosen) if os.path.isabs(chosen) else home / ".cache") / "chunkwise-lora"
