"""One check under way. Pure, but for the sockets that its steps hold.

A kind of check is a generator: it does what it can at once, yields where it has to wait, and returns its Verdict. It
is resumed with the epoll events of the descriptor that it watches. epoll is edge-triggered here, and a resumption may
be spurious: a step tries, and yields again where it was too early.
"""

from __future__ import annotations

import errno
import os
import ssl
from collections.abc import Generator
from typing import NamedTuple, Protocol

from xdplb.checks.endpoint import Endpoint, Layer
from xdplb.core.health import AgentWord


class Verdict(NamedTuple):
    """What a check came to. `ok` is None where this host, not the backend, was not able: that is no verdict.

    `cause` says in words why a check failed. `word` is what an agent asked for.
    """

    ok: bool | None
    reason: str
    cause: str = ""
    word: AgentWord | None = None


class CheckFailed(Exception):
    """Ends a check: the backend is at fault, with this cause. `reason` is that of the layer where it is None."""

    def __init__(self, cause: str, reason: str | None = None) -> None:
        super().__init__(cause)
        self.cause = cause
        self.reason = reason


class NotAble(Exception):
    """Ends a check: this host lacks something. The text says what."""


class OutOfTime(Exception):
    """Thrown into a check when its time is up. A kind that takes silence for an answer catches it."""


Steps = Generator[None, int, Verdict]


class Runner(Protocol):
    """What an attempt asks of the loop that runs it."""

    def watch(self, attempt: Attempt, fd: int) -> None: ...
    def reap(self, child: int) -> None: ...


class Attempt:
    """`layer` is the layer at work."""

    __slots__ = ("_runner", "deadline", "endpoint", "fd", "layer", "number", "started", "steps")

    def __init__(self, number: int, endpoint: Endpoint, runner: Runner) -> None:
        self.number = number
        self.endpoint = endpoint
        self.layer = Layer.L4
        self.fd = -1
        self.started = 0.0
        self.deadline = 0.0
        self.steps: Steps
        self._runner = runner

    def watch(self, fd: int) -> None:
        """Events of this descriptor resume the check from now on. One for each check."""
        self._runner.watch(self, fd)

    def reap(self, child: int) -> None:
        """Takes the exit status of a process that was killed, when there is one."""
        self._runner.reap(child)


class Kind(Protocol):
    """The checks of one endpoint. Made once, so that what is the same for all of them is done once."""

    def __call__(self, attempt: Attempt) -> Steps: ...


_OWN_TROUBLE = {
    errno.EADDRNOTAVAIL: "no local port or address is left to connect from",
    errno.EMFILE: "too many open files in this process (ulimit -n)",
    errno.ENFILE: "too many open files on this host (fs.file-max)",
    errno.ENOBUFS: "no buffer space on this host",
    errno.ENOMEM: "no memory on this host",
    errno.EPERM: "this host's firewall or policy forbids it",
    errno.EAFNOSUPPORT: "this host does not speak this IP family",
    errno.EAGAIN: "no local port, process or route is left on this host",
}
_WORDS = {
    errno.ECONNREFUSED: "connection refused",
    errno.ECONNRESET: "connection reset",
    errno.EPIPE: "connection closed by the backend",
    errno.EHOSTUNREACH: "host unreachable",
    errno.ENETUNREACH: "network unreachable",
    errno.ETIMEDOUT: "no answer to any packet",
    errno.EACCES: "forbidden on the way there",
}


def failed(error: OSError, layer: Layer) -> Verdict:
    """What an error of the network comes to."""
    if isinstance(error, ssl.SSLError):  # its errno is OpenSSL's, not the system's
        return Verdict(False, layer.failure, (error.reason or str(error)).replace("_", " ").lower())
    number = error.errno or 0
    if number in _OWN_TROUBLE:
        return Verdict(None, "SOCKERR", _OWN_TROUBLE[number])
    cause = _WORDS.get(number) or (os.strerror(number).lower() if number else str(error))
    return Verdict(False, layer.timeout if number == errno.ETIMEDOUT else layer.failure, cause)


_AWAITED = {Layer.L4: "connection", Layer.L6: "TLS handshake", Layer.PROC: "end of the program"}


def too_late(endpoint: Endpoint, layer: Layer) -> Verdict:
    return Verdict(False, layer.timeout, f"no {_AWAITED.get(layer, 'answer')} within {endpoint.check.timeout_s:g}s")


def excerpt(data: bytes, length: int = 40) -> str:
    """The beginning of what somebody sent, for a line of text; nothing of it can be a control sequence."""
    text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in data[: length + 1])
    return f"{text[: length - 3]}..." if len(text) > length else text
