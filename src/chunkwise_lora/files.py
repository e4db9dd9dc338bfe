"""Reading and writing files so that a failure names the file and never damages it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from chunkwise_lora.errors import ChunkWiseError


def read_text(path: Path, error: type[ChunkWiseError]) -> str:
    """The text of `path`, without a byte order mark; raises `error` naming it when that fails."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as cause:
        raise error(f"{path}: cannot be read ({cause})") from None


def write_atomically(path: Path, content: bytes, error: type[ChunkWiseError] = ChunkWiseError) -> None:
    """Write beside `path`, then rename over it: an interrupted write leaves the old file whole.

    A device or a pipe, such as `/dev/stdout`, is written to as it is.
    Raises `error` naming the path when it cannot be written.
    """
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as cause:
        raise error(f"{path}: cannot be written ({cause})") from None
