"""A packet in a frame for another host's MAC address is left alone, as ip_rcv would drop it, whatever it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
from packets import (
    BACK_MAC,
    BACKEND_MAC,
    CLIENT,
    CLIENT_MAC,
    ERRORS,
    FRONT_MAC,
    OPTIONS,
    ROUTER,
    TAGS,
    Case,
    Flow,
    Packet,
    Verdict,
    fragments,
    frame,
    icmp,
    quotation,
    tcp,
    udp,
)
from world import DOWN, MODES, NAT, World

from xdplb.core import link_facts
from xdplb.core.link_facts import LinkFacts

VIRTUAL = "00:00:5e:00:01:07"
"""VRRP's, of a macvlan that stands on `front`."""
STRANGERS = {
    "another host": "02:00:00:00:00:99",
    "a host whose MAC differs in the first byte": "06" + FRONT_MAC[2:],
    "a host whose MAC differs in the fourth byte": "02:00:00:01:00:01",
    "another VRRP group": "00:00:5e:00:01:08",
    "another interface of this host": BACK_MAC,
    "nobody": "00:00:00:00:00:00",
}


@pytest.fixture(scope="module", autouse=True)
def known(world: World) -> Iterator[None]:
    """What the control plane tells of `front` and `back`."""
    macs = {"front": {FRONT_MAC, VIRTUAL}, "back": {BACK_MAC}}
    tell(world, macs)
    yield
    link_facts.write(world.plane.links, {})


def tell(world: World, macs: Mapping[str, set[str]]) -> None:
    facts = {
        world.interfaces[name]: LinkFacts(frozenset(bytes.fromhex(mac.replace(":", "")) for mac in them))
        for name, them in macs.items()
    }
    link_facts.write(world.plane.links, facts)


def kinds() -> Iterator[tuple[str, Packet, str]]:
    """Packets on which xdplb acts, with a frame's header to be replaced, and where they arrive."""
    for mode in MODES:
        yield f"a SYN via {mode.name}", tcp()(mode.flow("tcp")), "front"
        yield f"a datagram via {mode.name}", udp()(mode.flow("udp")), "front"
    for version in (4, 6):
        vip = DOWN[version == 6]
        to = Flow(CLIENT[version], NAT[version].vip)
        yield f"a SYN over IPv{version} that would be reset", tcp()(Flow(CLIENT[version], vip)), "front"
        yield (
            f"a fragment over IPv{version}",
            fragments(udp(bytes(60)))[1](Flow(CLIENT[version], vip, port=53)),
            "front",
        )
        reply = NAT[version].translated(NAT[version].flow("tcp"), "tcp").back()
        yield f"a reply over IPv{version}", tcp("SA")(reply), "back"
        about = quotation(udp(), Flow(NAT[version].vip, CLIENT[version], 53, 40000), None)
        error = icmp(Flow(ROUTER[version], to.destination), ERRORS[version]["time exceeded"], about)
        yield f"an ICMP error over IPv{version}", error, "front"
    yield "a SYN with options", tcp()(NAT[4].flow("tcp", options=OPTIONS["router alert"])), "front"


def cases() -> Iterator[Case]:
    for title, packet, arrives in kinds():
        for name, tags in TAGS.items():
            whole = frame(packet, destination=STRANGERS["another host"], tags=tags)
            yield Case(f"{title} with {name}, for another host, passes", whole, Verdict.PASS, arrives=arrives)
    for name, mac in STRANGERS.items():
        for version in (4, 6):
            packet = tcp()(NAT[version].flow("tcp"))
            yield Case(f"a SYN over IPv{version} for {name} passes", frame(packet, destination=mac), Verdict.PASS)


@pytest.mark.parametrize("case", [*cases()], ids=str)
def test_it_passes_untouched(world: World, case: Case) -> None:
    world.check(case)


@pytest.mark.parametrize("kind", [*kinds()], ids=lambda kind: kind[0])
def test_the_same_for_this_host_does_not(world: World, kind: tuple[str, Packet, str]) -> None:
    _, packet, arrives = kind
    own = {"front": FRONT_MAC, "back": BACK_MAC}[arrives]
    assert world.run(frame(packet, BACKEND_MAC, own), arrives)[0] is not Verdict.PASS


@pytest.mark.parametrize("version", [4, 6])
def test_frames_for_a_virtual_mac_are_this_hosts(world: World, version: int) -> None:
    packet = tcp()(NAT[version].flow("tcp"))
    virtual, own = world.run(frame(packet, CLIENT_MAC, VIRTUAL)), world.run(frame(packet, CLIENT_MAC, FRONT_MAC))
    assert virtual == own and virtual[0] is Verdict.TX


def test_where_addresses_are_not_known_all_frames_are_this_hosts(world: World) -> None:
    packet = frame(tcp()(NAT[4].flow("tcp")), destination=STRANGERS["another host"])
    try:
        tell(world, {"back": {BACK_MAC}})
        assert world.run(packet)[0] is Verdict.TX
        link_facts.write(world.plane.links, {})
        assert world.run(packet)[0] is Verdict.TX
    finally:
        tell(world, {"front": {FRONT_MAC, VIRTUAL}, "back": {BACK_MAC}})
    assert world.run(packet)[0] is Verdict.PASS


def test_an_address_that_is_not_at_hand_is_found_nevertheless(world: World) -> None:
    """Two may want one place in the directory."""
    packet = tcp()(NAT[4].flow("tcp"))
    try:
        world.plane.links.own_macs[:] = 0
        assert world.run(frame(packet, CLIENT_MAC, FRONT_MAC))[0] is Verdict.TX
        assert world.run(frame(packet, destination=STRANGERS["another host"]))[0] is Verdict.PASS
    finally:
        tell(world, {"front": {FRONT_MAC, VIRTUAL}, "back": {BACK_MAC}})


def test_many_addresses_of_one_interface_are_told_apart(world: World) -> None:
    """One VRRP group after another, of both families, as many as there can be on a link."""
    groups = [f"00:00:5e:00:0{family}:{group:02x}" for family in (1, 2) for group in range(1, 256)]
    ours = {mac for n, mac in enumerate(groups) if n % 3}
    try:
        tell(world, {"front": {FRONT_MAC, *ours}})
        for mac in groups:
            verdict, _ = world.run(frame(tcp()(NAT[4].flow("tcp")), destination=mac))
            assert verdict is (Verdict.TX if mac in ours else Verdict.PASS), mac
    finally:
        tell(world, {"front": {FRONT_MAC, VIRTUAL}, "back": {BACK_MAC}})
