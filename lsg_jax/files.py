"""Files and folders that appear whole or not at all, whatever stops the command, and outputs that are refused beforehand."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lsg_jax.errors import BusyError, InputError


def check_output(path: Path, *, folder: bool) -> None:
    """Refuses an output folder or file that cannot be written, before any work is done for it.

    Raises:
        InputError: it, or a folder above it, is of the other kind or not writable.
    """
    try:
        _try_output(path, folder=folder)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}; choose another output") from None


def _try_output(path: Path, *, folder: bool) -> None:
    """`check_output`, with an OSError where the system refuses. It tries: root may write anywhere by the permissions."""
    if path.exists() and path.is_dir() != folder:
        found, needed = ("a file", "a folder") if folder else ("a folder", "a file")
        raise InputError(f"{path}: is {found}, and {needed} is written; choose another output")
    above = next(each for each in (path, *path.absolute().parents) if each.exists())
    if above != path and not above.is_dir():
        raise InputError(f"{path}: cannot be written: {above} is a file; choose another output")
    if above.is_file():
        os.close(os.open(above, os.O_WRONLY | os.O_CLOEXEC))
        above = above.parent
    elif not above.is_dir():  # a device or pipe, such as /dev/stdout
        return
    tried = above / ".lsg.tmp"  # always the same name: the next command removes what a kill leaves
    try:
        descriptor = _open_locked(tried)
        try:
            os.write(descriptor, b"0")
        finally:
            os.close(descriptor)
    finally:
        tried.unlink(missing_ok=True)


def check_only(folder: Path, known: frozenset[str], what: str) -> None:
    """Refuses an output folder that holds something else than `known` names, settings and logs.

    Args:
        what: what the folder is to be, for the error.

    Raises:
        InputError: it does.
    """
    notes = lambda name: name.startswith(".") or name.endswith((".toml", ".log", ".txt"))
    names = sorted(each.name for each in folder.iterdir()) if folder.is_dir() else []
    others = [name for name in names if name not in known and not notes(name)]
    if others:
        listed = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise InputError(f"{folder}: holds {listed} and is no {what}; choose another output")


def check_inside(names: Iterable[str], where: object) -> None:
    """Refuses names of files that lead out of the folder they are to be in.

    Raises:
        InputError: one is absolute, empty, or holds `..` or a NUL byte; `where` says which file names it.
    """
    for name in names:
        if not name or "\0" in name or name.startswith("/") or ".." in name.replace("\\", "/").split("/"):
            raise InputError(f"{where}: names a file outside of its folder: {name[:80]!r}")


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file through `.NAME.tmp` beside it: a crash leaves the old content or the new, never a part.

    The next write of the same file takes over what a crash left. A device or pipe, such as /dev/stdout, is written to directly.

    Raises:
        OSError: the old content is kept.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        path.write_bytes(data)
        return
    temporary = path.with_name(f".{path.name}.tmp")
    descriptor = _open_locked(temporary)
    try:
        with naming(path):
            os.ftruncate(descriptor, 0)
            left = memoryview(data)
            while left:
                left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    sync_folder(path.parent)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of the block names the file, as those of writes do not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or os.fspath(path)
        raise


def _open_locked(path: Path) -> int:
    """Descriptor of the file, made if it is not there; of two writers the second waits."""
    while True:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), 0o666)
        _lock(descriptor, wait=True)
        if _is_at(descriptor, path):
            return descriptor
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still that of the path: the writer before this one may have renamed it before it let go."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _lock(descriptor: int, *, wait: bool) -> bool:
    """Whether the lock could be taken; without locks (Windows, some network file systems) it counts as taken."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """The folder `.NAME.tmp` beside `out`, which becomes `out` if the block succeeds and is removed if it fails.

    What a killed command left there is removed first.

    Raises:
        InputError: `out` is not empty or cannot be written. An OSError of the block becomes an InputError too.
        BusyError: another command is writing it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists and is not empty; choose a new folder")
    with scratch_folder(out, "tmp") as temporary:
        try:
            yield temporary
            temporary.replace(out)  # replaces an empty folder
            sync_folder(out.absolute().parent)
        except OSError as error:
            raise InputError(f"{out}: cannot be written: {error.strerror or error}") from None


@contextlib.contextmanager
def scratch_folder(out: Path, purpose: str) -> Iterator[Path]:
    """An empty folder `.NAME.PURPOSE` beside `out`, removed after the block.

    Its name is always the same, so that the next command with this output takes over what a killed one left.

    Raises:
        InputError: it cannot be written.
        BusyError: another command is using it.
    """
    temporary = out.absolute().parent / f".{out.absolute().name}.{purpose}"
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0))
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror or error}") from None
    try:
        if not _lock(descriptor, wait=False) or not _is_at(descriptor, temporary):
            raise BusyError(f"{out}: another command is writing it; wait, or choose another output")
        try:
            for left in temporary.iterdir():
                _remove(left)
            yield temporary
        finally:
            _remove(temporary)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_regular(path: Path, *, limit: int | None = None) -> bytes:
    """The content of a regular file. A FIFO or device, which could block or never end, is not read.

    Args:
        limit: largest size in bytes; None for any.

    Raises:
        InputError: it is missing, cannot be read, is no regular file, or is larger.
    """
    with open_regular(path) as file:
        if limit is None:
            return file.read()
        size = os.fstat(file.fileno()).st_size
        data = file.read(min(size, limit + 1))  # a read allocates what it asks for, so the limit alone would cost its memory
        while len(data) <= limit and (more := file.read(1 << 16)):  # a file that grows, or below /proc, holds more
            data += more
        if len(data) > limit:
            raise InputError(f"{path}: larger than {limit >> 20} MiB, not the file it should be")
        return data


def is_file(path: Path) -> bool:
    """Whether there is a regular file of that name; False for a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """A regular file, open for reading; see `read_regular`. An OSError of the block becomes an InputError too."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            os.close(descriptor)
            if stat.S_ISDIR(mode):
                raise InputError(f"{path}: is a folder, and a file is read; give a file")
            raise InputError(f"{path}: no regular file but a pipe, socket or device; give a file")
        with open(descriptor, "rb") as file:
            yield file
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise InputError(f"{path}: no regular file but a pipe, socket or device; give a file") from None
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        if "\0" not in str(path) and not isinstance(error, UnicodeEncodeError):
            raise
        raise InputError(f"{str(path)[:200]!r}: no file can have this name") from None


def read_toml(path: Path, *, limit: int = 16 << 20) -> dict[str, Any]:
    """The tables of a TOML file. Raises InputError as `read_regular` does, or if it is no TOML."""
    try:
        return tomllib.loads(read_regular(path, limit=limit).decode("utf-8"))
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError, and a number of thousands of digits
        raise InputError(f"{path}: not valid TOML: {error}") from None
