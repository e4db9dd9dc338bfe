"""Compile the C kernels once per machine, compiler and CPU, and keep the library in the user's cache folder.

The library is in `kernels`, in the user's cache folder (`files.user_cache_folder`).

A file name is `kernels-KEY-DIGEST.so`. KEY is a hash of everything that the library depends on (C source, flags,
compiler, CPU), so that a library never runs on a CPU that it was not compiled for. DIGEST is the SHA-256 of the file,
checked before the file is loaded. Files are written under another name and renamed, so that processes can share the
folder. Libraries that nobody has used for 90 days are removed when a new one is stored.

A folder that other users could write to is not used. Then, or if nothing can be stored, each process compiles its own
library in a private temporary folder.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from chunkwise_lora.errors import ChunkWiseError
from chunkwise_lora.files import user_cache_folder

logger = logging.getLogger(__name__)

SOURCES = [Path(__file__).with_name(name) for name in ("kernels.c", "typed.h", "bfloat16_dot.h")]
"""The first is compiled and includes the others."""
OPTIONS = ["-O3", "-fno-math-errno", "-shared", "-fPIC"]
FLAGS: list[list[str]] = [
    ["-march=native", "-fopenmp"],
    ["-march=native", "-fopenmp-simd"],  # one thread: the compiler has no OpenMP library
    ["-fopenmp"],
    [],
]
"""Tried in this order until a library works, since not every compiler knows every flag."""
COMPILE_SECONDS = 60.0
"""The compiler is stopped after this time, over all flags."""
UNUSED_DAYS = 90
"""Cached libraries that nobody has used for this number of days are removed."""
DAY = 86400.0
SUFFIX = ".so"


class BuildError(ChunkWiseError):
    """There is no compiler, or none of its libraries works."""


class _NoCacheError(Exception):
    """Compiled libraries cannot be stored, for a reason that the message gives."""


def load(
    works: Callable[[ctypes.CDLL], bool], sources: Sequence[Path] | None = None, options: Sequence[str] = ()
) -> ctypes.CDLL:
    """Return the compiled kernels: from the cache folder, or compiled now and stored there.

    Args:
        works: Tests a loaded library. A library that fails is neither used nor kept.
        sources: The files of another library. The first is compiled and includes the others.
        options: Further options of the compiler for that library.

    Raises:
        BuildError: There is no compiler, or it fails, takes too long, or none of its libraries works.
    """
    compiler, sources = [*find_compiler(), *options], sources or SOURCES
    name = f"kernels-{_key(compiler, sources)}"
    folder = None
    try:
        folder = cache_folder()
        for path in _stored(folder, name):
            if (library := _loaded(path, works)) is not None:
                return library
    except (_NoCacheError, OSError) as error:
        logger.info("the compiled kernels are not kept for the next process: %s", error)
    return _compiled(compiler, sources[0], folder, name, works)


def find_compiler() -> list[str]:
    """Return the command of the C compiler: `CC`, which may have options, or else cc, gcc or clang.

    Raises:
        BuildError: There is none.
    """
    named = os.environ.get("CC", "").strip()
    if not named:
        for program in ("cc", "gcc", "clang"):
            if (found := shutil.which(program)) is not None:
                return [found]
        raise BuildError("no C compiler was found")
    try:
        command = shlex.split(named)
    except ValueError as error:
        raise BuildError(f"CC is {named!r}, which is not a command: {error}") from error
    if shutil.which(command[0]) is None:
        raise BuildError(f"CC is {named!r}, and there is no program {command[0]!r}")
    return command


def cache_folder() -> Path:
    """Return the folder of compiled libraries. It is created if needed. Only this user can write to it.

    Raises:
        _NoCacheError: Another user could put a library there.
        OSError: It cannot be created.
    """
    if os.name != "posix":
        raise _NoCacheError(f"this is not supported on {sys.platform}")
    folder = user_cache_folder() / "kernels"
    for path in (*reversed(folder.parents), folder):
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode):
        raise _NoCacheError(f"{folder} is not a folder, or a symbolic link")
    if facts.st_uid != os.geteuid():
        raise _NoCacheError(f"{folder} belongs to another user")
    if facts.st_mode & 0o022:
        raise _NoCacheError(f"other users can write to {folder}; run `chmod go-w` on it")
    # Anyone who can write to a parent folder can replace the folder. In a sticky one, such as /tmp, only its owner can.
    for path in {*folder.parents, *folder.resolve().parents}:
        above = path.stat()
        if above.st_uid not in (0, os.geteuid()):
            raise _NoCacheError(f"{path} belongs to another user")
        if above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX:
            raise _NoCacheError(f"all users can write to {path}")
    return folder


def _key(compiler: list[str], sources: Sequence[Path] | None = None) -> str:
    """Return a hash of everything that the library depends on, without running a program."""
    source = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sources or SOURCES]
    programs = []
    for word in compiler:  # the compiler, and, with CC="ccache gcc", the program that it runs
        if (found := shutil.which(word)) is not None:
            path = Path(found).resolve()
            facts = path.stat()
            programs.append([str(path), facts.st_size, facts.st_mtime_ns])
    depends_on = [source, OPTIONS, FLAGS, compiler, programs, _cpu(), sys.platform, ctypes.sizeof(ctypes.c_void_p)]
    return hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:32]


def _cpu() -> list[str]:
    """Return what differs between CPUs for which `-march=native` gives different code."""
    names = {"vendor_id", "cpu family", "model", "model name", "stepping", "flags", "features", "isa", "cpu", "uarch"}
    lines = set()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            field = line.partition(":")[0].strip().lower()
            if field in names or field.startswith("cpu "):
                lines.add(line)
    lines = {line for line in lines if not line.lower().startswith(("cpu mhz", "cpu cores"))}
    # If the system does not describe the CPU, a library is for this machine only.
    return [platform.machine(), *(sorted(lines) or [platform.processor(), platform.node()])]


def _stored(folder: Path, name: str) -> list[Path]:
    """Return the stored libraries of this key whose content is intact. Damaged ones are removed."""
    whole = []
    for path in sorted(folder.glob(f"{name}-*{SUFFIX}")):
        with suppress(OSError):
            if _is_whole(path):
                whole.append(path)
                if time.time() - path.stat().st_mtime > DAY:
                    os.utime(path)  # it is in use
            else:
                logger.info("%s is damaged and is compiled again", path)
                path.unlink()
    return whole


def _is_whole(path: Path) -> bool:
    """Return whether a stored library belongs to this user and matches the digest in its name."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        facts = os.fstat(file.fileno())
        ours = stat.S_ISREG(facts.st_mode) and facts.st_uid == os.geteuid() and not facts.st_mode & 0o022
        return ours and path.stem.endswith(f"-{_digest(file.read())}")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _loaded(path: Path, works: Callable[[ctypes.CDLL], bool]) -> ctypes.CDLL | None:
    """Return the library at `path`, or None if it cannot be loaded or computes wrong results."""
    try:
        library = ctypes.CDLL(str(path))
        if works(library):
            return library
        logger.info("the compiled kernels compute wrong results: %s", path)
    except (OSError, AttributeError, ValueError, ChunkWiseError, MemoryError) as error:  # a kernel may be missing
        logger.info("the compiled kernels do not work: %s", error)
    return None


def _compiled(
    compiler: list[str], source: Path, folder: Path | None, name: str, works: Callable[[ctypes.CDLL], bool]
) -> ctypes.CDLL:
    """Compile with the first flags that give a working library, and store it in `folder`, if there is one."""
    end = time.monotonic() + COMPILE_SECONDS
    complaint = "its library does not work"
    with tempfile.TemporaryDirectory(prefix="chunkwise-", ignore_cleanup_errors=True) as temporary:
        for number, flags in enumerate(FLAGS):
            built = Path(temporary) / f"kernels-{number}{SUFFIX}"
            if (said := _compile([*compiler, *OPTIONS, *flags, str(source)], built, end)) is not None:
                complaint = said
                continue
            stored = None if folder is None else _store(folder, name, built)
            for path in (stored, built):  # one of these folders may not allow running programs
                if path is not None and (library := _loaded(path, works)) is not None:
                    return library
            if stored is not None:
                stored.unlink(missing_ok=True)
    raise BuildError(f"`{shlex.join(compiler)}` gave no working library: {complaint}")


def _compile(command: list[str], built: Path, end: float) -> str | None:
    """Run the compiler. Returns its error message, or None if it worked.

    Raises:
        BuildError: The time limit is reached, or the compiler cannot be started.
    """
    with tempfile.TemporaryFile() as output:
        try:
            # A new session, so that the programs that a compiler starts can be stopped with it.
            process = subprocess.Popen(
                [*command, "-o", str(built), "-lm"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        except OSError as error:
            raise BuildError(f"the C compiler cannot be started: {error}") from error
        try:
            status = process.wait(max(0.0, end - time.monotonic()))
        except BaseException as error:
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise BuildError(f"`{command[0]}` did not finish within {COMPILE_SECONDS:.0f} s") from error
        output.seek(0)
        said = output.read().decode(errors="replace").strip()[-500:]
    if status:
        return said or f"it ended with status {status}"
    return None if built.is_file() else "it wrote no file"


def _store(folder: Path, name: str, built: Path) -> Path | None:
    """Put a complete library into the cache folder, and return its path, or None if that fails."""
    try:
        content = built.read_bytes()
        path = folder / f"{name}-{_digest(content)}{SUFFIX}"
        descriptor, temporary = tempfile.mkstemp(prefix=".new-", dir=folder)
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        logger.info("the compiled kernels are not kept for the next process: %s", error)
        return None
    _remove_unused(folder)
    return path


def _remove_unused(folder: Path) -> None:
    """Remove libraries that have not been used for a long time, and temporary files of killed processes."""
    now = time.time()
    for pattern, days in ((f"kernels-*{SUFFIX}", UNUSED_DAYS), (".new-*", 1)):
        for path in folder.glob(pattern):
            with suppress(OSError):
                if now - path.lstat().st_mtime > days * DAY:
                    path.unlink()
