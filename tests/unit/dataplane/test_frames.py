"""Frames for questions: what is built is valid, and what is read is what was built, inside of tunnels too."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

from xdplb.dataplane import frames
from xdplb.dataplane.frames import Endpoint, Flow, Headers, Outer
from xdplb.model import Protocol

TO, FROM = bytes.fromhex("020000000001"), bytes(6)
ports = st.integers(1, 65535)
V4, V6 = st.integers(0, (1 << 32) - 1).map(IPv4Address), st.integers(0, (1 << 128) - 1).map(IPv6Address)
flows = st.one_of(
    st.builds(Flow, st.builds(Endpoint, a, ports), st.builds(Endpoint, a, ports), st.sampled_from(Protocol))
    for a in (V4, V6)
)


@given(flows)
def test_what_is_built_is_valid_and_read_back(flow: Flow) -> None:
    frame = frames.build(flow, FROM, TO)
    assert reference.faults(frame) == []
    mac = "02:00:00:00:00:01"
    assert frames.read(frame) == Headers("00:00:00:00:00:00", mac, None, flow.source, flow.destination, 64)


@given(flows)
def test_a_connection_is_open_and_a_datagram_empty(flow: Flow) -> None:
    transport = frames.build(flow, FROM, TO)[14 + (20 if flow.source.address.version == 4 else 40) :]
    if flow.protocol is Protocol.TCP:
        assert (len(transport), transport[13]) == (20, 0x10)
    else:
        assert (len(transport), transport[4:6]) == (8, b"\0\x08")
        assert transport[6:8] != bytes(2), "a checksum of 0 is none"


def wrapped(flow: Flow, outer: str, gue: bool) -> bytes:
    """Built by hand, as RFC 2003 and GUE variant 1 have it."""
    inner = frames.build(flow, FROM, TO)[14:]
    if gue:
        inner = struct.pack(">HHHH", 50000, 6080, 8 + len(inner), 0) + inner
    protocol = 17 if gue else 4 if flow.source.address.version == 4 else 41
    source, destination = ip_address(outer).packed, (ip_address(outer) + 1).packed
    if len(source) == 4:
        header = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(inner), 0, 0, 63, protocol, 0)
        return TO + FROM + b"\x08\x00" + header + source + destination + inner
    return (
        TO + FROM + b"\x86\xdd" + struct.pack(">IHBB", 6 << 28, len(inner), protocol, 63) + source + destination + inner
    )


@pytest.mark.parametrize("outer", ["10.0.0.1", "fd00::1"])
@pytest.mark.parametrize("gue", [False, True])
@given(flow=flows)
def test_a_tunnel_is_seen_through(flow: Flow, outer: str, gue: bool) -> None:
    headers = frames.read(wrapped(flow, outer, gue), gue)
    address = ip_address(outer)
    assert headers.outer == Outer(address, address + 1, 63, (50000, 6080) if gue else None)
    assert (headers.source, headers.destination, headers.ttl) == (flow.source, flow.destination, 64)


def test_a_datagram_is_no_tunnel_where_there_is_none() -> None:
    flow = Flow(Endpoint(IPv4Address("192.0.2.9"), 53), Endpoint(IPv4Address("203.0.113.1"), 6080), Protocol.UDP)
    assert frames.read(frames.build(flow, FROM, TO)).outer is None


@pytest.mark.parametrize(
    ("endpoint", "text"),
    [
        (Endpoint(IPv4Address("192.0.2.9"), 80), "192.0.2.9:80"),
        (Endpoint(IPv6Address("2001:db8::9"), 80), "[2001:db8::9]:80"),
    ],
)
def test_endpoints_are_written_as_people_write_them(endpoint: Endpoint, text: str) -> None:
    assert str(endpoint) == text
