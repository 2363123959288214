"""A tcp check: L4OK where the backend accepts a connection. It is reset at once; not a byte is sent."""

from __future__ import annotations

import asyncio
import socket
import struct

from xdplb.checks.endpoint import Endpoint, Progress

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
"""struct linger {on, 0 s}: close() resets. Otherwise whoever closes first keeps the connection in TIME_WAIT for a
minute; at thousands of checks a second that would be the gateway. HAProxy ends its checks in the same way."""


async def check(endpoint: Endpoint, progress: Progress) -> tuple[bool, str]:
    """Raises OSError where there is no connection."""
    (await connect(endpoint)).close()
    return True, "L4OK"


async def connect(endpoint: Endpoint) -> socket.socket:
    """A connected socket that resets when it is closed."""
    family = socket.AF_INET6 if endpoint.address.version == 6 else socket.AF_INET
    connection = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        await asyncio.get_running_loop().sock_connect(connection, (str(endpoint.address), endpoint.port))
    except BaseException:
        connection.close()
        raise
    return connection
