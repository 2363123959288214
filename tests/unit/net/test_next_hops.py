"""From the kernel's answers to the record of a next hop, and what of it is bad news."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdplb.net.next_hops import (
    NO_MAC,
    Interface,
    Neighbour,
    NeighbourKey,
    NextHopState,
    Nud,
    Route,
    resolve,
    trouble,
    within,
)

BACKEND = ip_address("10.0.0.11")
GATEWAY = ip_address("10.0.0.254")
HERE = ip_address("10.0.0.1")
OUR_MAC, ITS_MAC, OTHER_MAC = (
    bytes.fromhex("020000000001"),
    bytes.fromhex("020000000011"),
    bytes.fromhex("020000000012"),
)
ETH = Interface(index=3, name="eth1", mac=OUR_MAC, mtu=1500, kind="", up=True, carrier=True)
ON_LINK = Route(ifindex=3, gateway=None, source=HERE, mtu=None)


def neighbour(state: Nud, mac: bytes | None = ITS_MAC) -> Neighbour:
    return Neighbour(NeighbourKey(3, BACKEND), state, mac)


def test_on_link_and_reachable() -> None:
    record = resolve(BACKEND, ON_LINK, ETH, neighbour(Nud.REACHABLE))
    assert (record.ifindex, record.ifname, record.source_mac, record.dest_mac) == (3, "eth1", OUR_MAC, ITS_MAC)
    assert (record.state, record.via, record.source_address, record.mtu) == (
        NextHopState.REACHABLE,
        BACKEND,
        HERE,
        1500,
    )


def test_a_gateway_is_the_way() -> None:
    assert resolve(BACKEND, replace(ON_LINK, gateway=GATEWAY), ETH, None).via == GATEWAY


@pytest.mark.parametrize(
    ("of_route", "of_link", "expected"), [(None, 1500, 1500), (1400, 1500, 1400), (9000, 1500, 1500)]
)
def test_the_smaller_mtu_counts(of_route: int | None, of_link: int, expected: int) -> None:
    assert resolve(BACKEND, replace(ON_LINK, mtu=of_route), replace(ETH, mtu=of_link), None).mtu == expected


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (Nud.INCOMPLETE, NextHopState.RESOLVING),
        (Nud(0), NextHopState.RESOLVING),
        (Nud.REACHABLE, NextHopState.REACHABLE),
        (Nud.STALE, NextHopState.REACHABLE),
        (Nud.DELAY, NextHopState.REACHABLE),
        (Nud.PROBE, NextHopState.REACHABLE),
        (Nud.PERMANENT, NextHopState.REACHABLE),
        (Nud.NOARP, NextHopState.REACHABLE),
        (Nud.FAILED, NextHopState.FAILED),
    ],
)
def test_neighbour_states(state: Nud, expected: NextHopState) -> None:
    assert resolve(BACKEND, ON_LINK, ETH, neighbour(state)).state is expected


def test_what_cannot_be_reached() -> None:
    nowhere = resolve(BACKEND, None, None, None)
    assert (nowhere.state, nowhere.ifindex, nowhere.source_mac, nowhere.mtu) == (NextHopState.NO_ROUTE, 0, NO_MAC, 0)
    dark = resolve(BACKEND, ON_LINK, replace(ETH, carrier=False), neighbour(Nud.REACHABLE))
    assert dark.state is NextHopState.NO_CARRIER
    assert resolve(HERE, replace(ON_LINK, local=True), ETH, None).state is NextHopState.LOCAL
    tunnel = resolve(BACKEND, ON_LINK, replace(ETH, mac=b""), neighbour(Nud.NOARP, None))
    assert (tunnel.state, tunnel.dest_mac) == (NextHopState.FAILED, None)


def test_a_neighbour_that_falls_silent_keeps_its_mac() -> None:
    good = resolve(BACKEND, ON_LINK, ETH, neighbour(Nud.REACHABLE))
    flushed = resolve(BACKEND, ON_LINK, ETH, None, good)
    assert (flushed.state, flushed.dest_mac) == (NextHopState.RESOLVING, ITS_MAC)
    back = resolve(BACKEND, ON_LINK, ETH, neighbour(Nud.REACHABLE, OTHER_MAC), flushed)
    assert (back.state, back.dest_mac) == (NextHopState.REACHABLE, OTHER_MAC)


def test_the_mac_of_another_way_is_not_kept() -> None:
    good = resolve(BACKEND, ON_LINK, ETH, neighbour(Nud.REACHABLE))
    assert resolve(BACKEND, replace(ON_LINK, gateway=GATEWAY), ETH, None, good).dest_mac is None
    assert resolve(BACKEND, replace(ON_LINK, ifindex=4), replace(ETH, index=4), None, good).dest_mac is None


def test_failed_stays_failed_while_the_kernel_retries() -> None:
    failed = resolve(BACKEND, ON_LINK, ETH, neighbour(Nud.FAILED, None))
    retrying = resolve(BACKEND, ON_LINK, ETH, neighbour(Nud.INCOMPLETE, None), failed)
    assert retrying == failed
    assert resolve(BACKEND, ON_LINK, ETH, neighbour(Nud.REACHABLE), retrying).state is NextHopState.REACHABLE


def test_trouble_is_told_once_and_names_the_cause() -> None:
    good = resolve(BACKEND, ON_LINK, ETH, neighbour(Nud.REACHABLE))
    failed = resolve(BACKEND, ON_LINK, ETH, neighbour(Nud.FAILED, None), good)
    dark = resolve(BACKEND, ON_LINK, replace(ETH, carrier=False), None, good)
    gone = resolve(BACKEND, None, None, None, good)
    assert trouble(good, failed) == "10.0.0.11 does not answer on eth1"
    assert trouble(good, dark) == "eth1 has no carrier"
    assert trouble(good, gone) == "no route to 10.0.0.11 any more"
    for before, after in [(None, failed), (failed, dark), (failed, good), (good, replace(good, mtu=1400))]:
        assert trouble(before, after) is None


@given(st.lists(st.ip_addresses(v=4)), st.integers(0, 32), st.ip_addresses(v=4))
def test_within_agrees_with_asking_each_address(found: list[IPv4Address], length: int, base: IPv4Address) -> None:
    network = IPv4Network((int(base), length), strict=False)
    addresses = sorted({*found, base, network.network_address, network.broadcast_address})
    assert list(within(addresses, network)) == [address for address in addresses if address in network]


def test_within_ipv6() -> None:
    network = ip_network("fd00::/64")
    assert isinstance(network, IPv6Network)
    addresses = [ip_address(text) for text in ("fcff::1", "fd00::", "fd00::ffff", "fd00:0:0:1::")]
    assert list(within(addresses, network)) == addresses[1:3]
