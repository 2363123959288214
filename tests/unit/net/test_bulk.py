"""Which notifications of neighbours say something new: bytes as the kernel writes them, in their order."""

from __future__ import annotations

import socket
import struct
from ipaddress import ip_address

import pytest

from xdplb.net import bulk, rtnl
from xdplb.net.bulk import KnownNeighbours, attribute
from xdplb.net.next_hops import Nud

MAC, OTHER = bytes.fromhex("02000000000a"), bytes.fromhex("02000000000b")


def told(
    state: Nud,
    mac: bytes | None = MAC,
    *,
    address: str = "10.0.0.1",
    ifindex: int = 3,
    kind: int = bulk.RTM_NEWNEIGH,
    managed: bool = True,
    ours: bool = True,
    age: int = 0,
) -> memoryview:
    """A notification as neigh_fill_info of net/core/neighbour.c writes it."""
    to = ip_address(address)
    family = socket.AF_INET if to.version == 4 else socket.AF_INET6
    body = struct.pack("=BBHiHBB", family, 0, 0, ifindex, state, 0, 1) + attribute(bulk.NDA_DST, to.packed)
    if mac is not None:
        body += attribute(bulk.NDA_LLADDR, mac)
    body += attribute(4, struct.pack("=I", age)) + attribute(3, struct.pack("=4I", age, age, age, 1))
    if ours:
        body += attribute(bulk.NDA_PROTOCOL, bytes([rtnl.NEIGHBOUR_PROTOCOL]))
    if managed:
        body += attribute(bulk.NDA_FLAGS_EXT, struct.pack("=I", rtnl.NTF_EXT_MANAGED))
    return memoryview(struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body)


def news(*messages: memoryview) -> list[bool]:
    known = KnownNeighbours()
    return [not known.repeated_by(message) for message in messages]


@pytest.mark.parametrize("address", ["10.0.0.1", "2001:db8::1"])
def test_a_neighbour_that_is_confirmed_again_and_again_is_told_once(address: str) -> None:
    rounds = [Nud.REACHABLE, Nud.STALE, Nud.DELAY, Nud.PROBE, Nud.REACHABLE, Nud.STALE]
    messages = [told(state, address=address, age=age) for age, state in enumerate(rounds)]
    assert news(*messages) == [True] + 5 * [False]


@pytest.mark.parametrize("address", ["10.0.0.1", "2001:db8::1"])
@pytest.mark.parametrize(
    "between",
    [
        {"state": Nud.REACHABLE, "mac": OTHER},
        {"state": Nud.STALE, "mac": OTHER},
        {"state": Nud.FAILED, "mac": None},
        {"state": Nud.INCOMPLETE, "mac": None},
        {"state": Nud.REACHABLE, "kind": bulk.RTM_DELNEIGH},
        {"state": Nud.FAILED, "mac": None, "kind": bulk.RTM_DELNEIGH},
        {"state": Nud.PERMANENT},
        {"state": Nud.REACHABLE, "managed": False},
        {"state": Nud.REACHABLE, "ours": False},
    ],
)
def test_what_is_otherwise_is_told_and_so_is_what_follows(address: str, between: dict[str, object]) -> None:
    usual = told(Nud.REACHABLE, address=address)
    other = told(**{"address": address, **between})  # type: ignore[arg-type]
    assert news(usual, other, usual, usual) == [True, True, True, False]


def test_one_that_the_kernel_does_not_ask_again_is_told_when_it_is_stale() -> None:
    states = [Nud.REACHABLE, Nud.DELAY, Nud.STALE, Nud.STALE, Nud.REACHABLE, Nud.PROBE]
    assert news(*(told(state, managed=False) for state in states)) == [True, False, True, True, True, False]


def test_neighbours_are_told_apart_by_address_and_interface() -> None:
    messages = [
        told(Nud.REACHABLE),
        told(Nud.REACHABLE, ifindex=4),
        told(Nud.REACHABLE, address="10.0.0.2"),
        told(Nud.REACHABLE, address="::a00:1"),
    ]
    assert news(*messages, *messages) == 4 * [True] + 4 * [False]


def test_what_is_no_neighbour_is_told() -> None:
    link = memoryview(struct.pack("=IHHII", 32, 16, 0, 0, 0) + bytes(16))
    short = memoryview(struct.pack("=IHHII", 16, bulk.RTM_NEWNEIGH, 0, 0, 0))
    bridge = memoryview(bytes(told(Nud.REACHABLE))[:16] + b"\x07" + bytes(told(Nud.REACHABLE))[17:])
    assert news(link, link, short, short, bridge, bridge) == 6 * [True]
