"""Where a daemon's words go."""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TextIO

LARGEST_LOG = 1 << 20


def log_to_stderr(kept: Path | None = None) -> None:
    """Line by line, by a descriptor of our own. Where it leads to the file `kept`, that begins anew when it is full,
    and the one before it stays.
    """
    logging.raiseExceptions = False  # a full disk is no bug
    stream = os.fdopen(os.dup(2), "w", buffering=1)
    handler = _Kept(stream, kept) if kept is not None and _leads_to(stream.fileno(), kept) else None
    logging.basicConfig(
        format="%(asctime)s %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        level=logging.INFO,
        handlers=[handler or logging.StreamHandler(stream)],
    )


def _leads_to(descriptor: int, path: Path) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


class _Kept(logging.StreamHandler[TextIO]):
    """To a file of at most LARGEST_LOG bytes. It is copied and emptied: descriptors 1 and 2 of this process, and of the
    checks', are the same file, opened to append.
    """

    def __init__(self, stream: TextIO, path: Path) -> None:
        super().__init__(stream)
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        with suppress(OSError):
            if os.fstat(self.stream.fileno()).st_size >= LARGEST_LOG:
                self._begin_anew()

    def _begin_anew(self) -> None:
        earlier = self._path.with_name(f"{self._path.name}.1")
        try:
            shutil.copy2(self._path, earlier)
        except OSError:  # the disk is full: what is in the way goes
            earlier.unlink(missing_ok=True)
        os.ftruncate(self.stream.fileno(), 0)
