"""An http or https check: one GET on a fresh connection; the status line decides, and nothing after it is read.

    L7OK/200    the status is among those that `expect` names
    L7STS/500   it is not: the server answers, and says that it is faulty
    L7RSP       what came back begins with no status line, or the connection broke
    L7TOUT      connected, but no status within the time-out
    L6RSP       https: the TLS handshake failed             L6TOUT  or did not end in time
    L4CON       the connection was refused, or no way leads there             L4TOUT  nothing came back

Each is one result. How many of them in a row make a backend DOWN or UP is decided in core/health.py.

The status line is read as leniently as curl does. What follows it (long, odd or broken headers, a body that contradicts
them) does not matter to clients that ask for something else, so it does not matter here.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Generator
from socket import socket

from xdplb import __version__
from xdplb.checks.attempt import Attempt, CheckFailed, Steps, Verdict, excerpt
from xdplb.checks.endpoint import Endpoint, Layer
from xdplb.checks.tcp import Connector
from xdplb.checks.tls import Handshake
from xdplb.model import CheckType

MAX_LINE = 65_536
"""Bytes before a line end. A server that sends more has no status line."""
MAX_INTERIM = 1 << 20
"""Bytes of interim answers before the final one."""

_STATUS_LINE = re.compile(rb"HTTP/[0-9](?:\.[0-9])?[ \t]+([1-9][0-9]{2})(?![0-9])(.*)", re.DOTALL | re.IGNORECASE)
_BEGINNING = b"HTTP/"
_DEFAULT_PORT = {CheckType.HTTP: 80, CheckType.HTTPS: 443}
_UNSENDABLE = re.compile(r"[\x00-\x20\x7f]")
_RECEIVE = 16_384


class HttpCheck:
    def __init__(self, endpoint: Endpoint) -> None:
        self._connect = Connector(endpoint)
        self._handshake = Handshake(endpoint) if endpoint.check.type is CheckType.HTTPS else None
        self._request = request(endpoint)
        self._expect = endpoint.check.expect

    def __call__(self, attempt: Attempt) -> Steps:
        connection = yield from self._connect(attempt)
        if self._handshake is not None:
            attempt.layer = Layer.L6
            connection = yield from self._handshake(connection)
        attempt.layer = Layer.L7
        with connection:
            yield from send(connection, self._request)
            status, phrase = yield from _final_status(connection)
        if any(low <= status <= high for low, high in self._expect):
            return Verdict(True, f"L7OK/{status}")
        return Verdict(False, f"L7STS/{status}", f"answered {status} {phrase}".rstrip())


def request(endpoint: Endpoint) -> bytes:
    """The target goes out as it was written: what it means is the server's business. ValueError for what cannot."""
    host = endpoint.host
    if host is None:
        standard = endpoint.port == _DEFAULT_PORT[endpoint.check.type]
        host = endpoint.literal if standard else f"{endpoint.literal}:{endpoint.port}"
    for part in (endpoint.check.path, host):
        if _UNSENDABLE.search(part):
            raise ValueError(f"{part!r} cannot be sent")
    lines = [
        f"GET {endpoint.check.path} HTTP/1.1",
        f"Host: {host}",
        f"User-Agent: xdplb/{__version__}",
        "Accept: */*",
        "Connection: close",
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def send(connection: socket, data: bytes) -> Generator[None, int, None]:
    """All of it, or as much as the other side takes before it closes: what it had to say may be there to be read."""
    while data:
        try:
            data = data[connection.send(data) :]
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            yield
        except BrokenPipeError:
            return


def receive(connection: socket) -> Generator[None, int, bytes]:
    """Some bytes; none where the other side has closed."""
    while True:
        try:
            return connection.recv(_RECEIVE)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            yield


def _final_status(connection: socket) -> Generator[None, int, tuple[int, str]]:
    """Of the first answer that is not interim (1xx): the status and its phrase."""
    received, interim = b"", 0
    while True:
        line, end, rest = received.partition(b"\n")
        if not end:
            _refuse(line)
            more = yield from receive(connection)
            if not more:
                raise CheckFailed(_cut_off(received, interim))
            received += more
            continue
        status, phrase = _status_line(line)
        if status == 101 or not 100 <= status <= 199:
            return status, phrase
        before = len(received)
        received = yield from _after_header(connection, rest)
        interim += max(1, before - len(received))
        if interim > MAX_INTERIM:
            raise CheckFailed("interim answers without end")


def _after_header(connection: socket, received: bytes) -> Generator[None, int, bytes]:
    """What comes after the empty line that ends a header."""
    while True:
        line, end, rest = received.partition(b"\n")
        if end and not line.rstrip(b"\r"):
            return rest
        if end:
            received = rest
        elif len(received) > MAX_LINE:
            raise CheckFailed(f"header line of more than {MAX_LINE} bytes in an interim answer")
        else:
            more = yield from receive(connection)
            if not more:
                raise CheckFailed("connection closed in an interim answer")
            received += more


def _status_line(line: bytes) -> tuple[int, str]:
    match = _STATUS_LINE.fullmatch(line)
    if match is None:
        raise CheckFailed(_no_status_line(line))
    return int(match[1]), excerpt(match[2].strip())


def _refuse(beginning: bytes) -> None:
    """Ends a check early whose answer cannot become a status line any more."""
    word = beginning[: len(_BEGINNING)].upper()
    if not _BEGINNING.startswith(word) or len(beginning) > MAX_LINE:
        raise CheckFailed(_no_status_line(beginning))


def _no_status_line(line: bytes) -> str:
    line = line.rstrip(b"\r")
    if len(line) > 200:
        return f"line of {len(line)} bytes is no status line: '{excerpt(line)}'"
    return f"answer is no HTTP: '{excerpt(line)}'" if line else "answer begins with an empty line"


def _cut_off(received: bytes, interim: int) -> str:
    if received:
        return f"connection closed after '{excerpt(received)}'"
    return "connection closed after an interim answer" if interim else "connection closed without an answer"
