"""An address on the wire: is it taken by another host, where is its host now, and from now on it is here.

Frames go out as they stand here, past this host's own tables. Functions block; they are for threads.

Questions: RFC 826, RFC 4861 7.2.2. Their answers are for the kernel, which keeps the tables.
Probes: RFC 5227 2.1.1 (ARP from nobody), RFC 4862 5.4 (neighbour solicitation from the unspecified address).
Announcements: RFC 5227 2.3 (ARP of both sides the same), RFC 4861 7.2.6 (unsolicited neighbour advertisement).
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack
from ipaddress import IPv4Address, IPv6Address

from xdplb.model import Address
from xdplb.net.next_hops import Interface

ETH_P_ARP, ETH_P_IPV6 = 0x0806, 0x86DD
ARP_REQUEST = 1
NEIGHBOUR_SOLICITATION, NEIGHBOUR_ADVERTISEMENT = 135, 136
NA_OVERRIDE = 0x20000000
SOURCE_LINK_LAYER_ADDRESS, TARGET_LINK_LAYER_ADDRESS = 1, 2
ICMP6_FILTER = 1
SO_BINDTODEVICE = 25
BROADCAST = b"\xff" * 6
ALL_NODES = IPv6Address("ff02::1")
NOBODY = bytes(6)
BURST, BURST_PAUSE_S = 64, 0.005
"""A switch learns from these frames; thousands at once would be lost."""
PROBES, PROBE_EVERY_S = 2, 0.15

_ARP = struct.Struct("!HHBBH6s4s6s4s")


def announce(interface: Interface, addresses: Iterable[Address]) -> None:
    """Tells all hosts on the link that these addresses are at the interface's MAC. Raises OSError."""
    _send(interface, [_announcement(interface.mac, address) for address in addresses])


def ask(interface: Interface, source: Address, neighbours: Iterable[Address]) -> None:
    """Asks the whole link where these neighbours are, in the name of `source`, of the same family. Raises OSError."""
    _send(interface, [_question(interface.mac, source, neighbour) for neighbour in neighbours])


def owners(interface: Interface, addresses: Collection[Address]) -> dict[Address, bytes]:
    """Which of the addresses another host on the link answers for, with its MAC. Takes 0.3 s. Raises OSError."""
    probes = [_probe(interface.mac, address) for address in addresses]
    found: dict[Address, bytes] = {}
    with ExitStack() as stack:
        listeners = list(_listeners(stack, interface, {address.version for address in addresses}))
        for _ in range(PROBES):
            _send(interface, probes)
            _listen(listeners, time.monotonic() + PROBE_EVERY_S, found)
    return {address: mac for address, mac in found.items() if address in addresses and mac != interface.mac}


def _send(interface: Interface, frames: list[bytes]) -> None:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as wire:
        wire.bind((interface.name, 0))
        for number, frame in enumerate(frames, 1):
            wire.send(frame)
            if number % BURST == 0:
                time.sleep(BURST_PAUSE_S)


def _announcement(mac: bytes, address: Address) -> bytes:
    if isinstance(address, IPv4Address):
        return _arp(mac, address, address)
    option = struct.pack("!BB6s", TARGET_LINK_LAYER_ADDRESS, 1, mac)
    body = struct.pack("!I16s", NA_OVERRIDE, address.packed) + option
    return _icmp6(mac, address, ALL_NODES, NEIGHBOUR_ADVERTISEMENT, body)


def _question(mac: bytes, source: Address, address: Address) -> bytes:
    if isinstance(address, IPv4Address):
        return _arp(mac, IPv4Address(source), address)
    option = struct.pack("!BB6s", SOURCE_LINK_LAYER_ADDRESS, 1, mac)
    return _solicitation(mac, IPv6Address(source), address, option)


def _probe(mac: bytes, address: Address) -> bytes:
    if isinstance(address, IPv4Address):
        return _arp(mac, IPv4Address(0), address)
    return _solicitation(mac, IPv6Address(0), address)


def _solicitation(mac: bytes, source: IPv6Address, address: IPv6Address, option: bytes = b"") -> bytes:
    solicited = IPv6Address(int(IPv6Address("ff02::1:ff00:0")) | int(address) & 0xFFFFFF)
    return _icmp6(mac, source, solicited, NEIGHBOUR_SOLICITATION, struct.pack("!I16s", 0, address.packed) + option)


def _arp(mac: bytes, sender: IPv4Address, target: IPv4Address) -> bytes:
    body = _ARP.pack(1, 0x0800, 6, 4, ARP_REQUEST, mac, sender.packed, NOBODY, target.packed)
    return (BROADCAST + mac + struct.pack("!H", ETH_P_ARP) + body).ljust(60, b"\0")


def _icmp6(mac: bytes, source: IPv6Address, destination: IPv6Address, kind: int, body: bytes) -> bytes:
    """To a multicast group, from the link itself: hop limit 255."""
    message = struct.pack("!BBH", kind, 0, 0) + body
    pseudo = source.packed + destination.packed + struct.pack("!II", len(message), socket.IPPROTO_ICMPV6)
    message = message[:2] + struct.pack("!H", _checksum(pseudo + message)) + message[4:]
    header = struct.pack("!IHBB", 6 << 28, len(message), socket.IPPROTO_ICMPV6, 255)
    ethernet = b"\x33\x33" + destination.packed[-4:] + mac + struct.pack("!H", ETH_P_IPV6)
    return ethernet + header + source.packed + destination.packed + message


def _checksum(data: bytes) -> int:
    """RFC 1071, of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _listeners(stack: ExitStack, interface: Interface, versions: Collection[int]) -> Iterator[socket.socket]:
    if 4 in versions:
        arp = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, 0))
        arp.bind((interface.name, ETH_P_ARP))
        yield arp
    if 6 in versions:
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        icmp = stack.enter_context(socket.socket(socket.AF_INET6, kind, socket.IPPROTO_ICMPV6))
        wanted = bytearray(b"\xff" * 32)
        wanted[NEIGHBOUR_ADVERTISEMENT // 8] &= ~(1 << NEIGHBOUR_ADVERTISEMENT % 8)
        icmp.setsockopt(socket.IPPROTO_ICMPV6, ICMP6_FILTER, bytes(wanted))
        icmp.setsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, interface.name.encode())
        yield icmp


def _listen(listeners: list[socket.socket], deadline: float, found: dict[Address, bytes]) -> None:
    while (left := deadline - time.monotonic()) > 0:
        for ready in select.select(listeners, [], [], left)[0]:
            packet = ready.recv(2048)
            answer = _arp_sender(packet) if ready.family == socket.AF_PACKET else _advertised(packet)
            if answer is not None:
                found[answer[0]] = answer[1]


def _arp_sender(packet: bytes) -> tuple[Address, bytes] | None:
    """Whoever speaks for an address has it, whether it asks or answers."""
    if len(packet) < _ARP.size:
        return None
    _, protocol, mac_size, address_size, _, mac, sender, _, _ = _ARP.unpack_from(packet)
    return (IPv4Address(sender), mac) if (protocol, mac_size, address_size) == (0x0800, 6, 4) else None


def _advertised(packet: bytes) -> tuple[Address, bytes] | None:
    """The target and its MAC: of the option, or unknown where there is none."""
    if len(packet) < 24 or packet[0] != NEIGHBOUR_ADVERTISEMENT:
        return None
    option = packet[24:32]
    known = len(option) == 8 and option[0] == TARGET_LINK_LAYER_ADDRESS
    return IPv6Address(packet[8:24]), option[2:8] if known else NOBODY
