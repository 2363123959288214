"""A ping check: one ICMP echo request (RFC 792, RFC 4443 section 4).

    L3OK      the reply came           L3TOUT    none came in time
    L3CON     ICMP, or this host's own routing, says that no way leads there

All pings share one raw socket for each IP family, so that a ping takes no descriptor, and no privilege but theirs.
"""

from __future__ import annotations

import ipaddress
import os
import select
import socket
import struct
from contextlib import suppress
from typing import Protocol

from xdplb.checks.attempt import Attempt, CheckFailed, NotAble, Steps, Verdict
from xdplb.checks.endpoint import Endpoint, Layer
from xdplb.checks.loop import Loop
from xdplb.model import Address

_ECHO = struct.Struct("!BBHHH")
_PAYLOAD = b"xdplb health check"
_SOL_RAW, _ICMP_FILTER, _ICMPV6_FILTER = 255, 1, 1
_ANSWERED, _UNREACHABLE = select.EPOLLIN, select.EPOLLERR
_RECEIVE = 2048


class _Family(Protocol):
    """What differs between ICMP and ICMPv6."""

    request: int
    reply: int
    unreachable: int

    def open(self) -> socket.socket: ...
    def message(self, packet: bytes) -> bytes: ...
    def quoted(self, message: bytes) -> bytes: ...
    def checksum(self, message: bytes) -> int: ...


class _V4:
    request, reply, unreachable = 8, 0, 3

    def open(self) -> socket.socket:
        opened = socket.socket(socket.AF_INET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_ICMP)
        refused = 0xFFFFFFFF & ~(1 << self.reply | 1 << self.unreachable)
        opened.setsockopt(_SOL_RAW, _ICMP_FILTER, struct.pack("=I", refused))
        return opened

    def message(self, packet: bytes) -> bytes:
        return packet[4 * (packet[0] & 0xF) :]

    def quoted(self, message: bytes) -> bytes:
        """The message that an error is about: behind the error's own eight bytes and the IP header."""
        return message[8 + 4 * (message[8] & 0xF) :] if len(message) > 8 else b""

    def checksum(self, message: bytes) -> int:
        """RFC 1071."""
        total: int = sum(struct.unpack(f"!{len(message) // 2}H", message))
        while total > 0xFFFF:
            total = (total & 0xFFFF) + (total >> 16)
        return ~total & 0xFFFF


class _V6:
    request, reply, unreachable = 128, 129, 1

    def open(self) -> socket.socket:
        opened = socket.socket(socket.AF_INET6, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_ICMPV6)
        refused = [0xFFFFFFFF] * 8
        for kind in (self.reply, self.unreachable):
            refused[kind // 32] &= ~(1 << kind % 32)
        opened.setsockopt(socket.IPPROTO_ICMPV6, _ICMPV6_FILTER, struct.pack("=8I", *refused))
        return opened

    def message(self, packet: bytes) -> bytes:
        return packet

    def quoted(self, message: bytes) -> bytes:
        return message[8 + 40 :]

    def checksum(self, message: bytes) -> int:
        return 0  # the kernel's business


_FAMILIES: dict[int, _Family] = {4: _V4(), 6: _V6()}


class Pinger:
    """The sockets of all pings. To open them takes CAP_NET_RAW, to use them takes none.

    `refusals` are the reasons why there is none of an IP version.
    """

    def __init__(self) -> None:
        self._sockets: dict[int, socket.socket] = {}
        self.refusals: dict[int, str] = {}
        self._number = int.from_bytes(os.urandom(4), "big")
        self._waiting: dict[tuple[Address, int], Attempt] = {}
        for version, family in _FAMILIES.items():
            try:
                self._sockets[version] = family.open()
            except OSError as error:
                self.refusals[version] = (error.strerror or str(error)).lower()

    def close(self) -> None:
        for opened in self._sockets.values():
            opened.close()

    def attach(self, loop: Loop) -> None:
        """Replies resume the attempts of this loop from now on."""
        self._loop = loop
        for version, opened in self._sockets.items():
            loop.listen(opened.fileno(), lambda _, version=version: self._hear(version))  # type: ignore[misc]

    def send(self, attempt: Attempt) -> int:
        """Returns the number by which to `forget` it."""
        address = attempt.endpoint.address
        family, opened = _FAMILIES[address.version], self._sockets.get(address.version)
        if opened is None:
            raise NotAble(f"no raw socket for pings: {self.refusals[address.version]} (CAP_NET_RAW)")
        self._number = number = (self._number + 1) & 0xFFFFFFFF
        identifier, sequence = number >> 16, number & 0xFFFF
        checksum = family.checksum(_ECHO.pack(family.request, 0, 0, identifier, sequence) + _PAYLOAD)
        packet = _ECHO.pack(family.request, 0, checksum, identifier, sequence) + _PAYLOAD
        self._waiting[address, number] = attempt
        try:
            opened.sendto(packet, (str(address), 0))
        except BaseException:
            self.forget(attempt, number)
            raise
        return number

    def forget(self, attempt: Attempt, number: int) -> None:
        self._waiting.pop((attempt.endpoint.address, number), None)

    def _hear(self, version: int) -> None:
        family, opened = _FAMILIES[version], self._sockets[version]
        with suppress(BlockingIOError):
            while True:
                packet, (sender, *_) = opened.recvfrom(_RECEIVE)
                self._take(family, family.message(packet), packet, sender)

    def _take(self, family: _Family, message: bytes, packet: bytes, sender: str) -> None:
        if len(message) < _ECHO.size:
            return
        if message[0] == family.reply:
            self._wake(ipaddress.ip_address(sender.partition("%")[0]), message, _ANSWERED)
        elif message[0] == family.unreachable:
            quoted = family.quoted(message)
            if len(quoted) >= _ECHO.size and quoted[0] == family.request:
                self._wake(_destination(message[8:]), quoted, _UNREACHABLE)

    def _wake(self, address: Address, message: bytes, outcome: int) -> None:
        _, _, _, identifier, sequence = _ECHO.unpack_from(message)
        attempt = self._waiting.get((address, identifier << 16 | sequence))
        if attempt is not None:
            self._loop.resume(attempt, outcome)


def _destination(packet: bytes) -> Address:
    """Of an IP header; it is whole where a message of it follows."""
    return ipaddress.ip_address(packet[16:20] if packet[0] >> 4 == 4 else packet[24:40])


class PingCheck:
    def __init__(self, endpoint: Endpoint, pinger: Pinger) -> None:
        self._pinger = pinger

    def __call__(self, attempt: Attempt) -> Steps:
        attempt.layer = Layer.L3
        number = self._pinger.send(attempt)
        try:
            outcome = yield
        finally:
            self._pinger.forget(attempt, number)
        if outcome == _UNREACHABLE:
            raise CheckFailed("host unreachable, says a router")
        return Verdict(True, "L3OK")
