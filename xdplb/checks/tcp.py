"""A tcp check: L4OK where the backend accepts a connection. It is reset at once; not a byte is sent."""

from __future__ import annotations

import errno
import select
import socket
import struct
from collections.abc import Generator

from xdplb.checks.attempt import Attempt, Steps, Verdict
from xdplb.checks.connect import connect
from xdplb.checks.endpoint import Endpoint

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
"""struct linger {on, 0 s}: close() resets. Otherwise whoever closes first keeps the connection in TIME_WAIT for a
minute; at thousands of checks a second that would be the gateway. HAProxy ends its checks in the same way."""

_DECIDED = select.EPOLLOUT | select.EPOLLERR | select.EPOLLHUP
_STREAM = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC


class TcpCheck:
    def __init__(self, endpoint: Endpoint) -> None:
        self._connect = Connector(endpoint)

    def __call__(self, attempt: Attempt) -> Steps:
        connection = yield from self._connect(attempt)
        connection.close()
        return Verdict(True, "L4OK")


class Connector:
    """Opens connections to one endpoint."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._family = socket.AF_INET6 if endpoint.address.version == 6 else socket.AF_INET
        self._endpoint = endpoint

    def __call__(self, attempt: Attempt) -> Generator[None, int, socket.socket]:
        """A connected socket that resets when it is closed, and whose events resume the attempt."""
        connection = socket.socket(self._family, _STREAM)
        try:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            error = connect(connection, self._endpoint)
            if error == errno.EINPROGRESS:
                attempt.watch(connection.fileno())
                events = yield
                while not events & _DECIDED:
                    events = yield
                error = 0
                if events & (select.EPOLLERR | select.EPOLLHUP):
                    error = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            elif not error:
                attempt.watch(connection.fileno())
            if error:
                raise OSError(error, "connect")
        except BaseException:
            connection.close()
            raise
        return connection
