"""A udp check: one datagram, and what comes back.

L7OK      an answer came, with the expected bytes where there are some     L7RSP   it came without them
L4OK      `expect: no-refusal`: nothing refused the datagram within the time-out
L4CON     ICMP says that the port is closed, or that no way leads there
L7TOUT    no answer within the time-out
"""

from __future__ import annotations

import socket
from collections.abc import Generator
from contextlib import suppress

from xdplb.checks.attempt import Attempt, CheckFailed, OutOfTime, Steps, Verdict, excerpt
from xdplb.checks.connect import connect
from xdplb.checks.endpoint import Endpoint, Layer

_DATAGRAM = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
_RECEIVE = 65_536


class UdpCheck:
    def __init__(self, endpoint: Endpoint) -> None:
        self._exchange = Exchange(endpoint)
        check = endpoint.check
        self._payload, self._answer, self._silence_is_fine = check.send, check.answer, check.silence_is_fine

    def __call__(self, attempt: Attempt) -> Steps:
        with self._exchange.opened(attempt) as connection:
            yield from self._exchange.send(connection, self._payload)
            if self._silence_is_fine:
                with suppress(OutOfTime):
                    yield from self._exchange.receive(connection)
                return Verdict(True, "L4OK")
            attempt.layer = Layer.L7
            data = yield from self._exchange.receive(connection)
        if self._answer is not None and self._answer not in data:
            raise CheckFailed(f"answer without the expected bytes: '{excerpt(data)}'")
        return Verdict(True, "L7OK")


class Exchange:
    """Datagrams to and from one endpoint. A connected socket, because only that hears of ICMP errors."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._family = socket.AF_INET6 if endpoint.address.version == 6 else socket.AF_INET
        self._endpoint = endpoint

    def opened(self, attempt: Attempt) -> socket.socket:
        connection = socket.socket(self._family, _DATAGRAM)
        try:
            if error := connect(connection, self._endpoint):
                raise OSError(error, "connect")
            attempt.watch(connection.fileno())
        except BaseException:
            connection.close()
            raise
        return connection

    def send(self, connection: socket.socket, payload: bytes) -> Generator[None, int, None]:
        while True:
            try:
                connection.send(payload)
                return
            except BlockingIOError:
                yield

    def receive(self, connection: socket.socket) -> Generator[None, int, bytes]:
        """CheckFailed where ICMP tells that the port is closed."""
        while True:
            try:
                return connection.recv(_RECEIVE)
            except BlockingIOError:
                yield
            except ConnectionRefusedError:
                raise CheckFailed("port unreachable", Layer.L4.failure) from None
