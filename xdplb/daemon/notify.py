"""Telling whoever started the daemon how it is, by the protocol of sd_notify(3): systemd, or `xdplb up -d`."""

from __future__ import annotations

import os
import socket
from contextlib import suppress


def notify(state: str) -> None:
    """Sends `state` (READY=1, RELOADING=1, STOPPING=1, STATUS=...) to $NOTIFY_SOCKET; without one, nothing happens.

    Nor does a listener that is gone matter: a daemon works on without an audience.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(state.encode(), address)


def ready() -> None:
    """The packet path is attached and the control socket listens."""
    notify("READY=1")
