"""The socket of a check gets its two ends: at the backend itself, or at the service's address."""

from __future__ import annotations

import errno
import socket

from xdplb.checks.attempt import NotAble
from xdplb.checks.endpoint import Endpoint, Via

SO_BINDTODEVICE = 25
_NO_WAY = (errno.ENETUNREACH, errno.ENODEV, errno.ENETDOWN)


def connect(connection: socket.socket, endpoint: Endpoint) -> int:
    """The error number, as of connect_ex. NotAble where this host lacks what leads through the service."""
    via = endpoint.via
    if via is None:
        return connection.connect_ex(endpoint.socket_address)
    try:
        _take_the_way(connection, endpoint, via)
        error = connection.connect_ex(endpoint.socket_address)
    except OSError as refused:
        error = refused.errno or 0
    if error in _NO_WAY:
        raise NotAble(f"{via.device} is missing or has no route to {via.address}")
    return error


def _take_the_way(connection: socket.socket, endpoint: Endpoint, via: Via) -> None:
    """From the address that this host has towards the backend: there the answer is on its way to this host."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    connection.setsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, via.device.encode())
    with socket.socket(connection.family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as guide:
        guide.connect((str(endpoint.address), endpoint.port))
        connection.bind((guide.getsockname()[0], via.source_port))
