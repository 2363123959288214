"""`xdplb up -d`: the daemon in the background, and the terminal kept until it is known whether it works.

    terminal ── fork ──► middle (new session) ── fork ──► daemon
       │ ◄──────────────── pipe: pid, then exit code ────────┤
       │ ◄──────────────── READY=1 (notify.py) ──────────────┤
       └─ prints what is new in the log ◄────── stdout, stderr

The daemon's words go to the log from the beginning; the terminal reads them there. The end of the pipe says that the
daemon is gone.
"""

from __future__ import annotations

import io
import os
import selectors
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from xdplb.errors import XdplbError
from xdplb.paths import Instance, make_directory

_LOOK_AT_LOG_S = 0.1
_FIRST_WORDS = 4096


def start(instance: Instance, serve: Callable[[], int]) -> int:
    """Runs `serve` in a daemon. Returns 0 as soon as that is ready, or else what it exits with.

    Only in the terminal's process does this return; the daemon's ends with `serve`.
    """
    make_directory(instance.runtime)
    mailbox = instance.runtime / f"notify.{os.getpid()}.sock"
    with _listen(mailbox) as notifications, _open_log(instance.log) as log:
        log_start = log.tell()
        sys.stdout.flush()
        sys.stderr.flush()
        end, other_end = os.pipe()
        middle = os.fork()
        if middle == 0:
            os.close(end)
            _become_daemon(other_end, log.fileno(), notifications, serve)
        os.close(other_end)
        os.waitpid(middle, 0)
        with os.fdopen(end, "rb", buffering=0) as pipe, instance.log.open("rb") as words:
            words.seek(log_start)
            pid = pipe.readline().strip()
            if not pid.isdigit():
                raise _died(instance)
            try:
                return _wait(pipe, notifications, words, instance)
            except KeyboardInterrupt:
                os.kill(int(pid), signal.SIGINT)
                pipe.read()
                _echo(words)
                raise


def _become_daemon(pipe: int, log: int, notifications: socket.socket, serve: Callable[[], int]) -> None:
    """Never returns. Until the daemon itself takes over, nothing of the terminal's process may be unwound here."""
    os.setsid()
    if os.fork():
        os._exit(0)
    os.write(pipe, f"{os.getpid()}\n".encode())
    os.environ["NOTIFY_SOCKET"] = notifications.getsockname()
    notifications.close()
    os.chdir("/")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    code = serve()
    os.write(pipe, f"{code}\n".encode())
    sys.exit(code)


def _wait(pipe: BinaryIO, notifications: socket.socket, words: BinaryIO, instance: Instance) -> int:
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        selector.register(notifications, selectors.EVENT_READ)
        while True:
            ready = [key.fileobj for key, _ in selector.select(_LOOK_AT_LOG_S)]
            _echo(words)
            if notifications in ready and b"READY=1" in notifications.recv(4096).split(b"\n"):
                _echo(words)
                return 0
            if pipe in ready:
                code = pipe.readline().strip()
                _echo(words)
                if not code.isdigit():
                    raise _died(instance)
                return int(code)


def _died(instance: Instance) -> XdplbError:
    hint = f"It was killed, or crashed in a library. The last it said is in {instance.log}."
    return XdplbError(f"the daemon on {instance.name} died while it started", hint)


def _echo(words: BinaryIO) -> None:
    with suppress(OSError):  # they are in the log all the same
        sys.stderr.buffer.write(words.read())
        sys.stderr.buffer.flush()


@contextmanager
def _open_log(path: Path) -> Iterator[BinaryIO]:
    with path.open("ab", buffering=0) as log:
        path.chmod(0o640)
        _make_sure_of_room(log, path)
        yield log


def _make_sure_of_room(log: BinaryIO, path: Path) -> None:
    """On a full disk the daemon would end without a word."""
    end = log.tell()
    try:
        os.posix_fallocate(log.fileno(), end, _FIRST_WORDS)
        os.ftruncate(log.fileno(), end)
    except OSError as error:
        raise XdplbError(f"{path} cannot be written: {error.strerror}", f"look at the disk: df -h {path}") from error


@contextmanager
def _listen(path: Path) -> Iterator[socket.socket]:
    """A datagram socket that only this user can write to, gone when left."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifications:
        before = os.umask(0o177)
        try:
            notifications.bind(str(path))
        finally:
            os.umask(before)
        try:
            yield notifications
        finally:
            path.unlink(missing_ok=True)
