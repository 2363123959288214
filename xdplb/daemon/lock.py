"""One process at a time may steer an interface; the file that says so names it."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from xdplb.errors import XdplbError
from xdplb.paths import make_directory

_RETRY_S = 0.05


class Held(XdplbError):
    """Another process has the lock."""


@contextmanager
def locked(
    path: Path, what: str, hint: str, patience_s: float = 0.0, while_waiting: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Holds the lock in `path`, whose directory may come and go with its holders.

    Held, which names the holder, after `patience_s`.
    """
    deadline = time.monotonic() + patience_s
    while (file := _acquired(path)) is None:
        if time.monotonic() >= deadline:
            with suppress(FileNotFoundError):
                pid = path.read_text().strip() or "unknown"
                raise Held(f"{what} (process {pid})", hint)
        while_waiting()
        time.sleep(_RETRY_S)
    with file:
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _acquired(path: Path) -> IO[str] | None:
    """The open, locked file. None where somebody else has the lock, or had it and removed the file just now."""
    make_directory(path.parent)
    try:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+")
        os.fchmod(file.fileno(), 0o600)  # an earlier version let everybody hold it
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    file.close()
    return None


def holder(path: Path) -> int | None:
    """The process that holds the lock, by /proc/locks; None where none does, or one of another pid namespace."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if fields[1] == "FLOCK" and fields[5] == place and int(fields[4]) > 0:
            return int(fields[4])
    return None
