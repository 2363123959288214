"""Packets for the tests of the packet path: who speaks, how a packet is built, and the case that a test is.

A packet is built twice, as the client sends it and as the backend must get it, each time from scratch by scapy; what
the packet path does by incremental changes must come out equal, byte by byte.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from typing import Any

import reference
from scapy.layers.inet import IP, TCP, UDP, IPOption
from scapy.layers.inet6 import (
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.l2 import Dot1AD, Dot1Q, Ether
from scapy.packet import Packet, Raw

CLIENT = {4: "192.0.2.9", 6: "2001:db8:c::9"}
ROUTER = {4: "192.0.2.254", 6: "2001:db8:c::fe"}
BEHIND_ROUTER = {4: "198.51.100.7", 6: "2001:db8:f::7"}
CLIENT_MAC, ROUTER_MAC = "02:00:00:00:00:c1", "02:00:00:00:00:c2"
FRONT_MAC, BACK_MAC = "02:00:00:00:00:01", "02:00:00:00:00:02"
BACKEND_MAC = "02:00:00:00:00:b1"

Tags = tuple[Packet, ...]
TAGS: Mapping[str, Tags] = {
    "no tag": (),
    "a VLAN tag": (Dot1Q(vlan=5, prio=3),),
    "a priority tag": (Dot1Q(vlan=0, prio=5),),
    "a priority tag in a service tag": (Dot1AD(vlan=7), Dot1Q(vlan=0, prio=1)),
    "QinQ tags": (Dot1AD(vlan=7), Dot1Q(vlan=5)),
}


class Verdict(enum.IntEnum):
    ABORTED = 0
    DROP = 1
    PASS = 2
    TX = 3
    REDIRECT = 4


@dataclass(frozen=True)
class Case:
    """One packet and all that must come of it. `out` None: the frame leaves as it came.

    `counts` are exactly the counters that change, beside the verdict's. `before` are packets that pass earlier,
    `arrives` is the interface. `faulty`: the packet has wrong checksums or lengths from the start.
    """

    title: str
    packet: Packet | bytes
    verdict: Verdict
    out: Packet | bytes | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    before: tuple[Packet | bytes, ...] = ()
    arrives: str = "front"
    faulty: bool = False

    def __str__(self) -> str:
        return self.title


def raw(packet: Packet | bytes) -> bytes:
    return packet if isinstance(packet, bytes) else bytes(packet)


@dataclass(frozen=True)
class Flow:
    """The ends of a packet, and what its IP header says beside them."""

    source: str
    destination: str
    source_port: int = 40000
    port: int = 80
    ttl: int = 64
    traffic_class: int = 0
    options: bytes = b""
    extensions: tuple[Packet, ...] = ()

    @property
    def version(self) -> int:
        return ip_address(self.destination).version

    def back(self) -> Flow:
        """The other direction."""
        return replace(
            self,
            source=self.destination,
            destination=self.source,
            source_port=self.port,
            port=self.source_port,
        )

    def hop(self) -> Flow:
        """One router further."""
        return replace(self, ttl=self.ttl - 1)


Build = Callable[[Flow], Packet]
"""Makes the IP packet of a flow."""


def network(flow: Flow, **fields: Any) -> Packet:
    """The IP header, with options or extension headers. `fields` are IPv4's or IPv6's own."""
    if flow.version == 4:
        options = [IPOption(flow.options)] if flow.options else []
        header = {
            "src": flow.source,
            "dst": flow.destination,
            "ttl": flow.ttl,
            "tos": flow.traffic_class,
            "id": 7,
            "options": options,
        }
        return IP(**(header | fields))
    header = {"src": flow.source, "dst": flow.destination, "hlim": flow.ttl, "tc": flow.traffic_class, "fl": 0xABCDE}
    packet = IPv6(**(header | fields))
    for extension in flow.extensions:
        packet = packet / extension.copy()
    return packet


def tcp(flags: str = "S", payload: bytes = b"", **fields: Any) -> Build:
    return lambda flow: (
        network(flow)
        / TCP(sport=flow.source_port, dport=flow.port, flags=flags, **({"seq": 1000, "ack": 2000} | fields))
        / Raw(payload)
    )


def udp(payload: bytes = b"question", **fields: Any) -> Build:
    return lambda flow: network(flow) / UDP(sport=flow.source_port, dport=flow.port, **fields) / Raw(payload)


TRANSPORTS: Mapping[str, Build] = {"tcp": tcp("PA", b"GET / HTTP/1.1"), "udp": udp()}

_ROUTER_ALERT = b"\x94\x04\x00\x00"
OPTIONS: Mapping[str, bytes] = {"router alert": _ROUTER_ALERT, "40 bytes of options": _ROUTER_ALERT * 10}

EXTENSIONS: Mapping[str, tuple[Packet, ...]] = {
    "hop-by-hop options": (IPv6ExtHdrHopByHop(),),
    "a routing header": (IPv6ExtHdrRouting(segleft=0, addresses=["2001:db8::77"]),),
    "destination options": (IPv6ExtHdrDestOpt(),),
    "an atomic fragment header": (IPv6ExtHdrFragment(id=9),),
    "four extension headers": (
        IPv6ExtHdrHopByHop(),
        IPv6ExtHdrDestOpt(),
        IPv6ExtHdrRouting(segleft=0, addresses=["2001:db8::77"]),
        IPv6ExtHdrFragment(id=9),
    ),
    "six extension headers": (IPv6ExtHdrHopByHop(), *(IPv6ExtHdrDestOpt(),) * 5),
}


def fragments(build: Build, identity: int = 77, size: int = 24, count: int = 3) -> tuple[Build, ...]:
    """The first `count` fragments of `build`'s packet, of `size` bytes of IP payload each (a multiple of 8)."""

    def payload(flow: Flow) -> tuple[int, bytes]:
        whole = build(replace(flow, options=b"", extensions=()))
        return (whole.proto if flow.version == 4 else whole.nh), raw(whole)[20 if flow.version == 4 else 40 :]

    def piece(offset: int) -> Build:
        def cut(flow: Flow) -> Packet:
            protocol, data = payload(flow)
            more = offset + size < len(data)
            part = Raw(data[offset : offset + size])
            if flow.version == 4:
                header = network(flow, proto=protocol, flags="MF" if more else 0, frag=offset // 8, id=identity)
                return header / part
            return network(flow) / IPv6ExtHdrFragment(nh=protocol, offset=offset // 8, m=more, id=identity) / part

        return cut

    return tuple(piece(index * size) for index in range(count))


# type, code, second word
ErrorKind = tuple[int, int, int]
ERRORS: Mapping[int, Mapping[str, ErrorKind]] = {
    4: {
        "port unreachable": (3, 3, 0),
        "fragmentation needed": (3, 4, 1400),
        "source quench": (4, 0, 0),
        "time exceeded": (11, 0, 0),
        "parameter problem": (12, 0, 0x14000000),
    },
    6: {
        "port unreachable": (1, 4, 0),
        "packet too big": (2, 0, 1400),
        "time exceeded": (3, 0, 0),
        "parameter problem": (4, 1, 40),
    },
}


def icmp(flow: Flow, kind: ErrorKind, body: bytes) -> Packet:
    """An ICMP or ICMPv6 message from the source to the destination of `flow`."""
    protocol = reference.ICMP if flow.version == 4 else reference.ICMPV6
    message = struct.pack(">BBHI", kind[0], kind[1], 0, kind[2]) + body
    pseudo = b""
    if flow.version == 6:
        source, destination = ip_address(flow.source).packed, ip_address(flow.destination).packed
        pseudo = reference.pseudo_header(source, destination, protocol, len(message))
    check = reference.checksum(pseudo + message)
    message = message[:2] + check.to_bytes(2, "big") + message[4:]
    header = network(flow, proto=protocol) if flow.version == 4 else network(flow)
    last = header.lastlayer()
    if flow.version == 6:
        last.nh = protocol
    return header / Raw(message)


def quotation(build: Build, flow: Flow, transport_bytes: int | None) -> bytes:
    """The packet as an ICMP error quotes it: its headers and so many bytes of transport, or all of it."""
    packet = raw(build(flow))
    if transport_bytes is None:
        return packet
    headers = raw(network(flow))
    return packet[: len(headers) + transport_bytes]


def frame(packet: Packet | bytes, source: str = CLIENT_MAC, destination: str = FRONT_MAC, tags: Tags = ()) -> Packet:
    """In Ethernet, with tags. The type of what bytes hold is read from their version."""
    link: Packet = Ether(src=source, dst=destination)
    for tag in tags:
        link = link / tag.copy()
    if isinstance(packet, bytes):
        link.lastlayer().type = reference.ETH_IPV4 if packet[0] >> 4 == 4 else reference.ETH_IPV6
        return link / Raw(packet)
    return link / packet


def drop(reason: str, service: str = "none") -> dict[str, int]:
    return {f"{service}.drops.{reason}": 1}
