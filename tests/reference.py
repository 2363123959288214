"""The packet path once more, slowly and from scratch: hash, table look-up, checksums, outer headers.

Written from the RFCs and from the comments of bpf/, on bytes and Python integers, so that it shares no code with what
it is compared with.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

ETH_IPV4, ETH_IPV6 = 0x0800, 0x86DD
TAG_TYPES = (0x8100, 0x88A8)
ICMP, IPIP, TCP, UDP, IPV6, FRAGMENT, ICMPV6 = 1, 4, 6, 17, 41, 44, 58
HEADERS_WITH_LENGTH = (0, 43, 60)
Words = TypeVar("Words", NDArray[np.uint64], np.uint64)
_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def ones_complement_sum(data: bytes) -> int:
    """The 16-bit one's complement sum of RFC 1071, of big-endian words."""
    total = sum(struct.unpack(f">{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def checksum(data: bytes) -> int:
    return 0xFFFF ^ ones_complement_sum(data)


def pseudo_header(source: bytes, destination: bytes, protocol: int, length: int) -> bytes:
    if len(source) == 4:
        return source + destination + struct.pack(">BBH", 0, protocol, length)
    return source + destination + struct.pack(">IxxxB", length, protocol)


def aged(words: Words, ticks: int) -> Words:
    """Words of the flow cache (bpf/flow_cache.h), as if they had been written so many ticks earlier: their 12 bits of
    time go round, and what the clock says now does not matter.
    """
    time = words >> np.uint64(2) & np.uint64(0xFFF)
    earlier = time + np.uint64(-ticks % 4096) & np.uint64(0xFFF)
    return words & ~np.uint64(0xFFF << 2) | earlier << np.uint64(2)


@dataclass(frozen=True, slots=True)
class Hash:
    """The keyed hash of flows."""

    seed: int
    factor: int

    def mix(self, value: int, word: int) -> int:
        value = _fold(value ^ word) * self.factor & _WORD
        return _fold(value)

    def address(self, address: str) -> int:
        """Under which an address is looked up."""
        return _fold(self._address(address) * _GOLDEN & _WORD)

    def _address(self, address: str) -> int:
        packed = ip_address(address).packed
        wire = packed if len(packed) == 16 else bytes(10) + b"\xff\xff" + packed
        hi, lo = struct.unpack("<QQ", wire)
        return self.mix(self.mix(self.seed, hi), lo)

    def flow(self, client: str, client_port: int, service_port: int, use_ports: bool = True) -> int:
        """Of a packet from `client` to a service; fragments and source-hash services leave the ports out."""
        ports = int.from_bytes(struct.pack(">HH", client_port, service_port), "little") if use_ports else 0
        mixed = self.mix(self._address(client), ports)
        return _fold(mixed * _GOLDEN & _WORD)


def _fold(value: int) -> int:
    return value ^ (value >> 32)


def choose(hasher: Hash, flow_hash: int, table: Sequence[int], up: set[int], tries: int) -> int | None:
    """The id of the backend that takes the flow: its slot's; hashed to another slot as long as that one is down."""
    for attempt in range(1, tries + 1):
        candidate = int(table[flow_hash % (1 << 32) % len(table)])
        if candidate in up:
            return candidate
        flow_hash = hasher.mix(flow_hash, attempt)
    return None


def gue_source_port(flow_hash: int) -> int:
    """One of the dynamic ports, by bits 16 to 29 of the hash."""
    return 0xC000 + (flow_hash >> 16 & 0x3FFF)


def flow_label(flow_hash: int) -> int:
    return flow_hash & 0xFFFFF


def spread_source(prefix: str, spread_bits: int, flow_hash: int) -> str:
    """The outer source: its last `spread_bits` (at most 32) are those of the hash, as laid out in memory."""
    address = bytearray(ip_address(prefix).packed)
    mask = ((1 << spread_bits) - 1).to_bytes(4, "big")
    for i, (bits, value) in enumerate(zip(mask, (flow_hash & 0xFFFFFFFF).to_bytes(4, "little"), strict=True)):
        address[len(address) - 4 + i] |= bits & value
    return str(ip_address(bytes(address)))


def faults(frame: bytes, gue_port: int = 6080) -> list[str]:
    """Everything wrong with a frame's IP headers, lengths and checksums, tunnels and quotations included."""
    offset = 12
    while int.from_bytes(frame[offset : offset + 2], "big") in TAG_TYPES:
        offset += 4
    ether_type = int.from_bytes(frame[offset : offset + 2], "big")
    if ether_type not in (ETH_IPV4, ETH_IPV6):
        return []
    return list(_ip_faults(frame[offset + 2 :], 4 if ether_type == ETH_IPV4 else 6, gue_port))


def _ip_faults(data: bytes, version: int, gue_port: int) -> Iterator[str]:
    if not data or data[0] >> 4 != version:
        yield f"not IPv{version}"
        return
    yield from (_ipv4_faults if version == 4 else _ipv6_faults)(data, gue_port)


def _ipv4_faults(data: bytes, gue_port: int) -> Iterator[str]:
    header_length, total = (data[0] & 15) * 4, int.from_bytes(data[2:4], "big")
    if header_length < 20 or not header_length <= total <= len(data):
        yield f"IPv4 lengths {header_length}, {total} in {len(data)} bytes"
        return
    if ones_complement_sum(data[:header_length]) != 0xFFFF:
        yield "IPv4 header checksum"
    if int.from_bytes(data[6:8], "big") & 0x3FFF:
        return
    yield from _transport_faults(data[9], data[12:16], data[16:20], data[header_length:total], gue_port)


def _ipv6_faults(data: bytes, gue_port: int) -> Iterator[str]:
    end = 40 + int.from_bytes(data[4:6], "big")
    if end > len(data):
        yield f"IPv6 length {end} in {len(data)} bytes"
        return
    protocol, offset = data[6], 40
    while protocol in HEADERS_WITH_LENGTH or protocol == FRAGMENT:
        if protocol == FRAGMENT and int.from_bytes(data[offset + 2 : offset + 4], "big") & 0xFFF9:
            return
        length = 8 if protocol == FRAGMENT else 8 + 8 * data[offset + 1]
        protocol, offset = data[offset], offset + length
    yield from _transport_faults(protocol, data[8:24], data[24:40], data[offset:end], gue_port)


def _transport_faults(protocol: int, source: bytes, destination: bytes, payload: bytes, gue_port: int) -> Iterator[str]:
    pseudo = pseudo_header(source, destination, protocol, len(payload))
    if protocol == TCP:
        if ones_complement_sum(pseudo + payload) != 0xFFFF:
            yield "TCP checksum"
    elif protocol == UDP:
        length = int.from_bytes(payload[4:6], "big")
        if length != len(payload):
            yield f"UDP length {length} of {len(payload)}"
        if payload[6:8] != bytes(2) and ones_complement_sum(pseudo + payload) != 0xFFFF:
            yield "UDP checksum"
        if int.from_bytes(payload[2:4], "big") == gue_port:
            yield from _ip_faults(payload[8:], payload[8] >> 4, gue_port)
    elif protocol == ICMP:
        if ones_complement_sum(payload) != 0xFFFF:
            yield "ICMP checksum"
        yield from _quotation_faults(payload, {3, 4, 11, 12})
    elif protocol == ICMPV6:
        if ones_complement_sum(pseudo + payload) != 0xFFFF:
            yield "ICMPv6 checksum"
        yield from _quotation_faults(payload, {1, 2, 3, 4})
    elif protocol in (IPIP, IPV6):
        yield from _ip_faults(payload, 4 if protocol == IPIP else 6, gue_port)


def _quotation_faults(payload: bytes, errors: set[int]) -> Iterator[str]:
    """Of a quoted IPv4 packet the header's checksum can be checked, however much of it was cut off."""
    if payload[0] not in errors or len(payload) < 28 or payload[8] >> 4 != 4:
        return
    header_length = (payload[8] & 15) * 4
    if ones_complement_sum(payload[8 : 8 + header_length]) != 0xFFFF:
        yield "quoted IPv4 header checksum"
