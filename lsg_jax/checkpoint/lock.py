"""An exclusive lock on a folder that names its owner."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from lsg_jax.errors import BusyError, InputError, LsgError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """The text of a lock file. A field is None where somebody else wrote the file."""

    pid: int | None
    host: str | None
    started: str | None

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host} since {self.started}"


class FolderLock:
    """Holds `folder/lock` inside a `with` block.

    The lock is an flock: the kernel drops it however the process ends. The text in the file only names the owner, so a name in
    a free lock is stale. If it names another machine, the file system may not share locks between machines: then the lock is
    taken only with `take_over`, which says that the other machine is gone.
    """

    def __init__(self, folder: str | Path, *, take_over: bool = False):
        self.folder = Path(folder)
        self.path = self.folder / "lock"
        self._take_over = take_over
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        return self._descriptor is not None

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(self, *unused: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Takes the lock or raises at once.

        Raises:
            BusyError: someone else holds it.
            InputError: the folder cannot be made or written.
            LsgError: the system has no locks (Windows).
        """
        if self._descriptor is not None:
            raise BusyError(f"{self.folder}: already locked by this process")
        descriptor = self._open_locked()
        try:
            self._check_previous(_read_owner(descriptor))
            _write_owner(descriptor, Owner(os.getpid(), socket.gethostname(), _now()))
        except OSError as error:
            os.close(descriptor)
            raise InputError(f"{self.path}: cannot be written: {error.strerror}") from None
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def release(self) -> None:
        """Empties the file and frees the lock. The file stays: removing it would allow two owners."""
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        try:
            os.ftruncate(descriptor, 0)
        finally:
            os.close(descriptor)

    def _open_locked(self) -> int:
        """Descriptor of the locked file."""
        try:
            import fcntl
        except ImportError:
            raise LsgError(f"{self.folder}: cannot be locked: Windows has no fcntl; use Linux, macOS or WSL") from None
        while True:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except OSError as error:
                raise InputError(f"{self.folder}: cannot be written: {error.strerror}; choose another output") from None
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                owner = _wait_for_owner(descriptor)
                os.close(descriptor)
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise self._busy(owner) from None
                raise InputError(f"{self.path}: this file system cannot lock files: {error.strerror}") from None
            # If the file was deleted between open and flock, the lock is on a file that nobody else sees.
            try:
                if os.fstat(descriptor).st_ino == os.stat(self.path).st_ino:
                    return descriptor
            except FileNotFoundError:
                pass
            os.close(descriptor)

    def _check_previous(self, owner: Owner | None) -> None:
        if owner is None:
            return
        if owner.host != socket.gethostname() and not self._take_over:
            raise BusyError(
                f"{self.folder}: locked by pid {owner.pid} on another machine ({owner.host}) since "
                f"{owner.started}; if that machine is gone, delete {self.path}"
            )
        logger.warning("%s: taking over the lock of %s, which ended without releasing it", self.folder, owner)

    def _busy(self, owner: Owner | None) -> BusyError:
        return BusyError(f"{self.folder}: in use by {owner or 'another process'}; wait or choose another output")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _read_owner(descriptor: int) -> Owner | None:
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return None
    return Owner(owner.get("pid"), owner.get("host"), owner.get("started")) if isinstance(owner, dict) else None


def _write_owner(descriptor: int, owner: Owner) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(vars(owner)).encode(), 0)
    os.fsync(descriptor)


def _wait_for_owner(descriptor: int) -> Owner | None:
    """The owner; waits up to 0.2 s for one that has locked the file and not yet written its name."""
    for _ in range(10):
        if (owner := _read_owner(descriptor)) is not None:
            return owner
        time.sleep(0.02)
    return None
