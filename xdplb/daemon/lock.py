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


@contextmanager
def locked(
    path: Path, what: str, hint: str, patience_s: float = 0.0, while_waiting: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Holds the lock in `path`, whose directory may come and go with its holders.

    XdplbError, which names the holder, after `patience_s`.
    """
    deadline = time.monotonic() + patience_s
    while (file := _acquired(path)) is None:
        if time.monotonic() >= deadline:
            with suppress(FileNotFoundError):
                holder = path.read_text().strip() or "unknown"
                raise XdplbError(f"{what} (process {holder})", hint)
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
        file = path.open("a+")
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
