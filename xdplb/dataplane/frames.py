"""Frames made up for a question, and the headers of what became of them. Pure.

Made are the plainest packets of a flow: a TCP segment with ACK alone, as an open connection sends it, or an empty UDP
datagram; with valid checksums (RFC 1071) and a TTL of 64.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import ip_address

from xdplb.model import Address, Protocol

TTL = 64
_ETHER_TYPES = {4: 0x0800, 6: 0x86DD}
_IPIP, _UDP, _IPV6 = 4, 17, 41
_TCP_ACK = 0x10
_WINDOW = 0xFFFF


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An address and a port, as people write them."""

    address: Address
    port: int

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if self.address.version == 6 else f"{self.address}:{self.port}"


@dataclass(frozen=True, slots=True)
class Flow:
    """Who sends what to whom."""

    source: Endpoint
    destination: Endpoint
    protocol: Protocol

    def __str__(self) -> str:
        return f"{self.source} -> {self.destination}/{self.protocol}"


@dataclass(frozen=True, slots=True)
class Outer:
    """What stands in front of an encapsulated packet. `ports` are those of GUE's UDP header; None: there is none."""

    source: Address
    destination: Address
    ttl: int
    ports: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Headers:
    source_mac: str
    destination_mac: str
    outer: Outer | None
    source: Endpoint
    destination: Endpoint
    ttl: int


def build(flow: Flow, source_mac: bytes, destination_mac: bytes) -> bytes:
    """One packet of the flow, in Ethernet."""
    source, destination = flow.source.address.packed, flow.destination.address.packed
    protocol = flow.protocol.number
    transport = struct.pack(">HH", flow.source.port, flow.destination.port)
    if flow.protocol is Protocol.TCP:
        transport += struct.pack(">IIBBHHH", 1, 1, 5 << 4, _TCP_ACK, _WINDOW, 0, 0)
        at = 16
    else:
        transport += struct.pack(">HH", 8, 0)
        at = 6
    pseudo = source + destination + struct.pack(">HH", len(transport), protocol)
    transport = _with_checksum(transport, at, pseudo)
    version = flow.destination.address.version
    link = destination_mac + source_mac + struct.pack(">H", _ETHER_TYPES[version])
    if version == 6:
        return link + struct.pack(">IHBB", 6 << 28, len(transport), protocol, TTL) + source + destination + transport
    header = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(transport), 0, 0x4000, TTL, protocol, 0)
    return link + _with_checksum(header + source + destination, 10) + transport


def _with_checksum(data: bytes, at: int, pseudo: bytes = b"") -> bytes:
    """`data` with its checksum in place; the sum is also over `pseudo`. All lengths are even. UDP's is never 0."""
    total = sum(struct.unpack(f">{(len(pseudo) + len(data)) // 2}H", pseudo + data))
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return data[:at] + struct.pack(">H", (0xFFFF ^ total) or 0xFFFF) + data[at + 2 :]


def read(frame: bytes, gue: bool = False) -> Headers:
    """The headers of such a frame; `gue`: a UDP header in front is one of GUE (variant 1: an IP packet follows it)."""
    packet = frame[14:]
    source, destination, ttl, protocol, payload = _ip(packet)
    outer = None
    if protocol in (_IPIP, _IPV6) or (gue and protocol == _UDP):
        ports = _ports(payload) if protocol == _UDP else None
        outer = Outer(source, destination, ttl, ports)
        source, destination, ttl, protocol, payload = _ip(payload[8:] if ports else payload)
    source_port, port = _ports(payload)
    return Headers(
        source_mac=frame[6:12].hex(":"),
        destination_mac=frame[:6].hex(":"),
        outer=outer,
        source=Endpoint(source, source_port),
        destination=Endpoint(destination, port),
        ttl=ttl,
    )


def _ip(packet: bytes) -> tuple[Address, Address, int, int, bytes]:
    """Source, destination, TTL, protocol and payload of an IP packet without options or extension headers."""
    if packet[0] >> 4 == 4:
        return ip_address(packet[12:16]), ip_address(packet[16:20]), packet[8], packet[9], packet[20:]
    return ip_address(packet[8:24]), ip_address(packet[24:40]), packet[7], packet[6], packet[40:]


def _ports(transport: bytes) -> tuple[int, int]:
    source, destination = struct.unpack(">HH", transport[:4])
    return source, destination
