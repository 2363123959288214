"""The process of the checks: takes orders from the daemon, carries them out, reports what came of them.

It has no privileges: it runs as nobody where the daemon is root. It ends with the daemon, which starts another one if
it ends alone. It imports nothing but the standard library and what is beside it, so it is there in an instant.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import resource
import select
import signal
import socket
import struct
import sys
from contextlib import closing, suppress

from xdplb.checks import frames
from xdplb.checks.attempt import Kind, Verdict
from xdplb.checks.endpoint import Endpoint
from xdplb.checks.frames import Frames, Result
from xdplb.checks.kinds import kind_of
from xdplb.checks.loop import Loop
from xdplb.checks.ping import Pinger

SPARE_DESCRIPTORS = 64
"""For everything but the sockets of checks: the loop itself, the stream to the daemon, programs that checks start."""

_NOBODY = "nobody"
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_CAPABILITY_VERSION = 0x20080522
_RECEIVE = 1 << 18


class Worker:
    """Serves one stream until the daemon closes it."""

    def __init__(self, stream: socket.socket, room: int, pinger: Pinger) -> None:
        self._stream = stream
        self._loop = Loop(self._ended, self._bug)
        self._pinger = pinger
        self._endpoints: dict[int, tuple[Endpoint, Kind]] = {}
        self._frames = Frames()
        self._results: list[Result] = []
        self._outgoing = bytearray(frames.pack_report({"room": room}))
        self._readable = False
        self._open = True
        self._blocked = False

    def serve(self) -> None:
        self._stream.setblocking(False)
        self._loop.listen(self._stream.fileno(), self._on_stream)
        self._pinger.attach(self._loop)
        try:
            while self._open:
                self._send()
                self._loop.turn(60.0)
                if self._readable:  # orders open sockets: only after all events of those that are closed by now
                    self._take_orders()
        finally:
            self._loop.close()

    def _on_stream(self, events: int) -> None:
        self._readable = bool(events & ~select.EPOLLOUT)

    def _take_orders(self) -> None:
        self._readable = False
        try:
            data = self._stream.recv(_RECEIVE)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        self._open = bool(data)
        for frame in self._frames.feed(data):
            self._carry_out(frames.orders(frame))

    def _carry_out(self, orders: frames.Orders) -> None:
        if not orders:
            self._outgoing += frames.pack_report({})
        for number, endpoint in orders.define:
            self._endpoints[number] = endpoint, kind_of(endpoint, self._pinger)
        for number in orders.forget:
            self._loop.cancel(number)
            del self._endpoints[number]
        for number in orders.start:
            if number in self._endpoints:  # else it was forgotten in the same breath
                self._loop.start(number, *self._endpoints[number])

    def _ended(self, number: int, verdict: Verdict, duration_s: float) -> None:
        result = Result(number, verdict.ok, verdict.reason, verdict.cause, round(duration_s, 6), verdict.word)
        self._results.append(result)

    def _bug(self, traceback: str) -> None:
        self._outgoing += frames.pack_report({"bug": traceback})

    def _send(self) -> None:
        while self._results:
            some, self._results = (
                self._results[: frames.RESULTS_PER_FRAME],
                self._results[frames.RESULTS_PER_FRAME :],
            )
            self._outgoing += frames.pack_report({"results": some})
        if self._outgoing:
            try:
                del self._outgoing[: self._stream.send(self._outgoing)]
            except BlockingIOError:
                pass
            except ConnectionError:
                self._open = False
        blocked = bool(self._outgoing)
        if blocked is not self._blocked:
            self._blocked = blocked
            events = select.EPOLLIN | select.EPOLLOUT if blocked else select.EPOLLIN
            self._loop.listen(self._stream.fileno(), self._on_stream, events)


def room() -> int:
    """How many checks may be under way at once, with as many descriptors as this process is allowed."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return max(1, most - SPARE_DESCRIPTORS)


def main(descriptor: int, daemon: int) -> None:
    """`descriptor` is the stream's, `daemon` the process that must not end before this one."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a service manager's, for all: the daemon decides when it is over
    pinger = Pinger()
    _drop_privileges()
    _end_with(daemon)
    with socket.socket(fileno=descriptor) as stream, closing(pinger):
        Worker(stream, room(), pinger).serve()


def _drop_privileges() -> None:
    """Of a daemon that may not change its user, the process keeps it; of capabilities it keeps none in any case."""
    import encodings.idna  # noqa: F401  # nobody may not be able to read what is loaded late

    os.chdir("/")
    with suppress(PermissionError):
        user = pwd.getpwnam(_NOBODY)
        os.setgroups([])
        os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
        os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)
    header, none = struct.pack("=Ii", _CAPABILITY_VERSION, 0), bytes(24)
    if ctypes.CDLL(None, use_errno=True).capset(header, none):
        raise OSError(ctypes.get_errno(), "capset")


def _end_with(daemon: int) -> None:
    """The kernel kills this process when the daemon ends, however it does; a change of user would undo that."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != daemon:
        with suppress(ProcessLookupError):
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
