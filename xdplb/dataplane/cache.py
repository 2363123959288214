"""Compiled programs in files, so that each is compiled once: by what they were made of, and checked when read.

A file is believed where only root can have written it, and holds, whole, what its name says.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import stat
import tempfile
import zlib
from contextlib import suppress
from pathlib import Path

from xdplb.paths import make_directory

log = logging.getLogger(__name__)

KEPT = 128
"""Files. A host needs a few, for each configuration that it had lately."""
_FAST, _SEAL = 1, hashlib.sha256().digest_size
_NAME = re.compile(r"[0-9a-f]{64}\.(xdp|[a-z0-9_]+\.new)")


class Cache:
    """Of texts, by a digest of what they were made of. No trouble with it is an error: it is logged."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def get(self, digest: str) -> bytes | None:
        """None where there is none to be believed."""
        path = self._path(digest)
        try:
            content = self._read(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("%s is not used: %s", path, error.strerror or error)
            return None
        seal, packed = content[:_SEAL], content[_SEAL:]
        if seal != _seal(digest, packed):
            log.warning("%s is not used: it is damaged", path)
            return None
        with suppress(OSError):
            os.utime(path)  # the longest unused go first
        return zlib.decompress(packed)

    def put(self, digest: str, text: bytes) -> None:
        try:
            self._make_directory()
            packed = zlib.compress(text, _FAST)
            self._write(self._path(digest), _seal(digest, packed) + packed)
            self._prune()
        except OSError as error:
            log.warning(
                "compiled programs cannot be kept in %s, so each start compiles: %s",
                self._directory,
                error.strerror or error,
            )

    def _path(self, digest: str) -> Path:
        return self._directory / f"{digest}.xdp"

    def _read(self, path: Path) -> bytes:
        _check(self._directory.stat())
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            _check(status)
            if not stat.S_ISREG(status.st_mode):
                raise OSError("it is no file")
            return file.read()

    def _make_directory(self) -> None:
        make_directory(self._directory.parent)
        with suppress(FileExistsError):
            self._directory.mkdir(mode=0o700)
        _check(self._directory.stat())

    def _write(self, path: Path, content: bytes) -> None:
        """Whole or not at all, whatever happens meanwhile, a power cut too."""
        descriptor, fresh = tempfile.mkstemp(prefix=f"{path.stem}.", suffix=".new", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(fresh).replace(path)
        except BaseException:
            Path(fresh).unlink(missing_ok=True)
            raise

    def _prune(self) -> None:
        """What a killed process left half written counts as well, and goes in its turn."""
        ages = []
        for path in self._directory.iterdir():
            if _NAME.fullmatch(path.name):
                with suppress(FileNotFoundError):
                    ages.append((path.lstat().st_mtime_ns, path))
        for _, path in sorted(ages, reverse=True)[KEPT:]:
            path.unlink(missing_ok=True)


def _seal(digest: str, packed: bytes) -> bytes:
    """A file that was cut off, or was renamed, has another."""
    return hashlib.sha256(digest.encode() + b"\0" + packed).digest()


def _check(status: os.stat_result) -> None:
    if status.st_uid != os.geteuid():
        raise OSError("it belongs to another user")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError("others may write it")
