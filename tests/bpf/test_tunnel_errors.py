"""Routers' reports that an encapsulated packet was too big: what is learned from them, and from what nothing is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network, ip_address

import pytest
from packets import BACKEND_MAC, CLIENT, ERRORS, FRONT_MAC, TAGS, ErrorKind, Flow, Verdict, frame, icmp, raw, udp
from scapy.packet import Packet
from world import MODES, OWN, Mode, World

from xdplb.abi import TUNNEL_MTU_TICKS
from xdplb.daemon.tunnel_mtus import TunnelMtus
from xdplb.dataplane.clock import clock
from xdplb.dataplane.tunnel_map import Report, TunnelMap
from xdplb.model import Address, BackendKey

TUNNELS = [mode for mode in MODES if mode.forward.encapsulates]
ROUTER = {4: "10.0.7.1", 6: "fd00:7::1"}


def outer_version(mode: Mode) -> int:
    return ip_address(mode.backend).version


def too_big(version: int, mtu: int) -> ErrorKind:
    return (3, 4, mtu) if version == 4 else (2, 0, mtu)


class Learning:
    """The daemon's part, and what it says is known."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.map = TunnelMap(world.plane)
        self.known: Mapping[Address, int] = {}
        self.time = 0.0
        self.mtus = TunnelMtus(lambda: world.engine, self._tell, lambda: self.time)
        self.mtus.look(world.engine)
        for mode in TUNNELS:
            self.forget(mode)

    def _tell(self, known: Mapping[Address, int]) -> None:
        self.known = known

    def forget(self, mode: Mode, report: Report | None = None) -> None:
        """As if that was the last report."""
        address = ip_address(mode.backend)
        self.map.enter(address, ip_address(OWN[address.version]), 0, report)

    def sent(self, mode: Mode) -> bytes:
        """An encapsulated packet, without its Ethernet header."""
        return self.world.run(frame(udp(bytes(100))(mode.flow("udp"))))[1][14:]

    def hears(self, error: Packet, arrives: str = "back") -> None:
        """The kernel gets it, whatever is learned."""
        assert self.world.run(error, arrives) == (Verdict.PASS, raw(error))
        self.mtus.look(self.world.engine)

    def mtu(self, mode: Mode) -> int | None:
        return self.known.get(ip_address(mode.backend))


@pytest.fixture
def learning(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[Learning]:
    monkeypatch.setattr(world.engine, "clock", clock(world.plane.features.times.tick_shift))
    learned = Learning(world)
    yield learned
    for mode in TUNNELS:
        learned.forget(mode)


def about(sent: bytes, kind: ErrorKind, to: str | None = None) -> Packet:
    """A router's report about a packet to that packet's source."""
    version = sent[0] >> 4
    return frame(icmp(Flow(ROUTER[version], to or OWN[version]), kind, sent), BACKEND_MAC, FRONT_MAC)


@pytest.mark.parametrize("mode", TUNNELS, ids=lambda mode: mode.name)
@pytest.mark.parametrize("quoted", [8, 48, None], ids=lambda n: f"{n or 'all'} bytes quoted")
def test_the_tunnel_learns_what_its_way_carries(learning: Learning, mode: Mode, quoted: int | None) -> None:
    sent, version = learning.sent(mode), outer_version(mode)
    header = 20 if version == 4 else 40
    learning.hears(about(sent[: header + quoted] if quoted else sent, too_big(version, 1400)))
    assert learning.known == {ip_address(mode.backend): 1400}


@pytest.mark.parametrize("mode", TUNNELS, ids=lambda mode: mode.name)
def test_the_next_packet_that_does_not_fit_is_answered(world: World, mode: Mode) -> None:
    key = BackendKey(mode.service("udp"), "a")
    before = world.engine.statuses.get(key)
    large = frame(udp(bytes(1400))(mode.flow("udp")))
    assert world.run(large)[1][14:] != raw(large)[14:]
    world.engine.update(key, replace(before, path_mtu=1400))
    world.engine.apply_service(key.service)
    try:
        out = world.run(large)[1]
    finally:
        world.engine.update(key, before)
        world.engine.apply_service(key.service)
    room = (20 if outer_version(mode) == 4 else 40) + (8 if mode.forward == "gue" else 0)
    at = 14 + (20 if mode.version == 4 else 40)
    assert (out[at], int.from_bytes(out[at + 4 : at + 8], "big")) == (3 if mode.version == 4 else 2, 1400 - room)


@pytest.mark.parametrize(
    ("version", "reported", "learned"),
    [(4, 0, 552), (4, 68, 552), (4, 551, 552), (4, 553, 553), (6, 0, 1280), (6, 1279, 1280), (6, 1281, 1281)],
)
def test_no_report_makes_packets_smaller_than_a_host_would(
    learning: Learning, version: int, reported: int, learned: int
) -> None:
    for mode in TUNNELS:
        if outer_version(mode) == version:
            learning.hears(about(learning.sent(mode), too_big(version, reported)))
            assert learning.mtu(mode) == learned


@pytest.mark.parametrize("mode", [TUNNELS[0], TUNNELS[6]], ids=lambda mode: mode.name)
def test_of_several_routers_the_smallest_counts(learning: Learning, mode: Mode) -> None:
    for reported, counts in ((1450, 1450), (1400, 1400), (1450, 1400), (1420, 1400), (1399, 1399)):
        learning.hears(about(learning.sent(mode), too_big(outer_version(mode), reported)))
        assert learning.mtu(mode) == counts


@pytest.mark.parametrize("mode", [TUNNELS[0], TUNNELS[6]], ids=lambda mode: mode.name)
def test_a_report_holds_for_ten_minutes(learning: Learning, mode: Mode) -> None:
    now = learning.world.engine.clock.tick
    learning.hears(about(learning.sent(mode), too_big(outer_version(mode), 1300)))
    learning.forget(mode, Report(1300, now - TUNNEL_MTU_TICKS + 10))
    learning.hears(about(learning.sent(mode), too_big(outer_version(mode), 1400)))
    assert learning.mtu(mode) == 1300
    learning.forget(mode, Report(1300, now - TUNNEL_MTU_TICKS))
    learning.hears(about(learning.sent(mode), too_big(outer_version(mode), 1400)))
    assert learning.mtu(mode) == 1400


def test_what_does_not_hold_any_more_is_let_go(learning: Learning) -> None:
    mode, engine = TUNNELS[0], learning.world.engine
    learning.forget(mode, Report(1300, engine.clock.tick - TUNNEL_MTU_TICKS + 1))
    later = Learning.__new__(Learning)
    later.known = {}
    mtus = TunnelMtus(lambda: engine, later._tell)
    mtus.look(engine)
    assert later.known == {ip_address(mode.backend): 1300}
    learning.forget(mode, Report(1300, engine.clock.tick - TUNNEL_MTU_TICKS))
    learning.hears(about(learning.sent(TUNNELS[1]), too_big(outer_version(TUNNELS[1]), 1400)))
    assert learning.mtu(mode) is None


def test_more_reports_than_are_remembered_by_name(learning: Learning) -> None:
    first, second = TUNNELS[0], TUNNELS[1]
    error = about(learning.sent(first), too_big(4, 1400))
    learning.world.run(about(learning.sent(second), too_big(6, 1450)))
    for _ in range(100):
        learning.world.run(error)
    learning.mtus.look(learning.world.engine)
    assert (learning.mtu(first), learning.mtu(second)) == (1400, 1450)


@pytest.mark.parametrize("mode", [TUNNELS[0], TUNNELS[6]], ids=lambda mode: mode.name)
def test_what_is_no_report_of_that_teaches_nothing(learning: Learning, mode: Mode) -> None:
    version, sent = outer_version(mode), learning.sent(mode)
    kind = too_big(version, 1400)
    header = 20 if version == 4 else 40
    source, destination = (12, 16) if version == 4 else (8, 24)
    width = 4 if version == 4 else 16
    stranger = ip_address({4: "10.0.1.77", 6: "fd00:1::77"}[version]).packed
    protocol = 9 if version == 4 else 6
    for name, wrong in {
        "not sent from here": sent[:source] + stranger + sent[source + width :],
        "to no tunnel's end": sent[:destination] + stranger + sent[destination + width :],
        "of TCP": sent[:protocol] + b"\x06" + sent[protocol + 1 :],
        "cut off within its header": sent[: header - 1],
    }.items():
        learning.hears(about(wrong, kind))
        assert learning.known == {}, name
    learning.hears(about(sent, kind, to={4: "10.0.1.253", 6: "fd00:1::fd"}[version]))
    for error in ERRORS[version].values():
        if error[:2] != kind[:2]:
            learning.hears(about(sent, error))
    assert learning.known == {}


@pytest.mark.parametrize("mode", [TUNNELS[0], TUNNELS[6]], ids=lambda mode: mode.name)
def test_a_report_in_tags(learning: Learning, mode: Mode) -> None:
    version = outer_version(mode)
    error = about(learning.sent(mode), too_big(version, 1400))
    learning.hears(frame(raw(error)[14:], BACKEND_MAC, FRONT_MAC, TAGS["QinQ tags"]))
    assert learning.mtu(mode) == 1400


def test_any_source_that_flows_have_is_known(learning: Learning) -> None:
    world = learning.world
    prefixes = {"tunnel_source4": IPv4Network("172.16.0.0/12"), "tunnel_source6": IPv6Network("fd77::/64")}
    world.engine.adopt_config(replace(world.config, **prefixes))
    world.engine.apply_all()
    try:
        learning.time += 10
        learning.mtus.look(world.engine)
        for mode in TUNNELS:
            version, sent = outer_version(mode), learning.sent(mode)
            source = ip_address(sent[12:16] if version == 4 else sent[8:24])
            assert source in prefixes[f"tunnel_source{version}"]
            learning.hears(about(sent, too_big(version, 1400), str(source)))
            assert learning.mtu(mode) == 1400
        outside = {4: "172.32.0.1", 6: "fd78::1"}
        for mode in (TUNNELS[0], TUNNELS[6]):
            version, sent = outer_version(mode), learning.sent(mode)
            packed = ip_address(outside[version]).packed
            at = 12 if version == 4 else 8
            wrong = sent[:at] + packed + sent[at + len(packed) :]
            learning.hears(about(wrong, too_big(version, 1300), outside[version]))
            assert learning.mtu(mode) == 1400
    finally:
        world.engine.adopt_config(world.config)
        world.engine.apply_all()


def test_errors_about_a_clients_packets_stay_theirs(learning: Learning) -> None:
    """One about a packet of a service goes to its backend, in a tunnel too."""
    for mode in TUNNELS:
        answer = raw(udp()(mode.flow("udp").back()))
        error = icmp(Flow(CLIENT[mode.version], mode.vip), too_big(mode.version, 1400), answer)
        verdict, out = learning.world.run(frame(error))
        assert verdict is Verdict.TX and out != raw(frame(error))
    learning.mtus.look(learning.world.engine)
    assert learning.known == {}
