"""Whose a flow at a NAT backend is: a client's through the service, or the backend's own. Two flows, one port there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import ip_address

import numpy as np
import pytest
from packets import (
    CLIENT,
    ERRORS,
    Build,
    Flow,
    Verdict,
    fragments,
    frame,
    icmp,
    quotation,
    raw,
    tcp,
    udp,
)
from reference import faults
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from test_explain_stage import a_flow, ask, told
from world import KEY, NAT, PIN_ROOT, World

from xdplb.abi import BACKEND_GONE, STATE_LAYOUT
from xdplb.daemon.handover import Handover
from xdplb.dataplane import syscall
from xdplb.dataplane.loader import remove_pins
from xdplb.dataplane.manifest import Manifest
from xdplb.dataplane.trace import Reason
from xdplb.model import BackendKey, Service

SYN, SYN_ACK, ACK, DATA, FIN, RST = (tcp(flags) for flags in ("S", "SA", "A", "PA", "FA", "R"))
QUESTION, ANSWER = udp(b"question"), udp(b"answer")
VIPS = {4: ("203.0.113.31", "203.0.113.32"), 6: ("2001:db8:a::31", "2001:db8:a::32")}
"""Two addresses of the services called `direction`, which lead to one backend of each family (world.py)."""
BACKEND = {4: "10.0.1.61", 6: "fd00:1::61"}
OUTSIDE = {4: "198.51.100.7", 6: "2001:db8:f::7"}
PORT = {"tcp": 8080, "udp": 5353}
FAMILIES = pytest.mark.parametrize("version", [4, 6], ids=["IPv4", "IPv6"])
PROTOCOLS = pytest.mark.parametrize("protocol", ["tcp", "udp"])


class Ends:
    """Client, gateway and backend of one family, for one protocol."""

    def __init__(self, world: World, version: int, protocol: str) -> None:
        self.world, self.version, self.protocol = world, version, protocol
        world.forget()

    def service(self, vip: int) -> str:
        """Its name."""
        return f"direction {('one', 'two')[vip]} {'v6 ' if self.version == 6 else ''}{self.protocol}"

    def send(self, build: Build, flow: Flow, arrives: str = "front") -> tuple[Verdict, Flow]:
        """What became of a packet, and the ends that it leaves with; its checksums are right."""
        verdict, out = self.world.run(frame(build(flow)), arrives)
        assert faults(out) == []
        return verdict, ends_of(out)

    def through(self, vip: int, build: Build, port: int = 40000, to: int | None = None) -> tuple[Verdict, Flow]:
        """A client's packet to a service."""
        flow = Flow(CLIENT[self.version], VIPS[self.version][vip], port, to or {"tcp": 80, "udp": 53}[self.protocol])
        return self.send(build, flow)

    def directly(self, build: Build, port: int = 40000) -> tuple[Verdict, Flow]:
        """A client's packet to the backend itself."""
        return self.send(build, Flow(CLIENT[self.version], BACKEND[self.version], port, PORT[self.protocol]))

    def back(self, build: Build, port: int = 40000) -> tuple[Verdict, Flow]:
        """A packet of the backend to that port of the client."""
        return self.send(build, Flow(BACKEND[self.version], CLIENT[self.version], PORT[self.protocol], port), "back")

    def out(self, build: Build, source_port: int | None = None, port: int = 443) -> tuple[Verdict, Flow]:
        """A packet of the backend to a host outside, from a port of its service."""
        flow = Flow(BACKEND[self.version], OUTSIDE[self.version], source_port or PORT[self.protocol], port)
        return self.send(build, flow, "back")

    def in_(self, build: Build, source_port: int | None = None, port: int = 443) -> tuple[Verdict, Flow]:
        """What the host outside says to that."""
        flow = Flow(OUTSIDE[self.version], BACKEND[self.version], port, source_port or PORT[self.protocol])
        return self.send(build, flow)

    def open(self, vip: int, port: int = 40000) -> int:
        """A flow through a service that the backend went on with. The client's port as the backend sees it."""
        first, answers = (SYN, (SYN_ACK, ACK)) if self.protocol == "tcp" else (QUESTION, (ANSWER,))
        verdict, flow = self.through(vip, first, port)
        assert verdict is Verdict.TX
        for answer in answers:
            self.replies(vip, answer, flow.source_port, port)
        return flow.source_port

    def replies(self, vip: int, build: Build, seen: int, port: int = 40000) -> None:
        """The backend's packet to `seen` comes to the client's port, from the service."""
        verdict, flow = self.back(build, seen)
        wanted = (VIPS[self.version][vip], {"tcp": 80, "udp": 53}[self.protocol], CLIENT[self.version], port)
        assert (verdict, (flow.source, flow.source_port, flow.destination, flow.port)) == (Verdict.REDIRECT, wanted)

    def is_own(self, build: Build, port: int = 40000) -> None:
        """The backend's packet to that port of the client is left alone."""
        flow = Flow(BACKEND[self.version], CLIENT[self.version], PORT[self.protocol], port)
        assert self.back(build, port) == (Verdict.PASS, ends_of(raw(frame(build(flow)))))


def ends_of(data: bytes) -> Flow:
    packet = Ether(data)
    network = packet[IP] if IP in packet else packet[IPv6]
    transport = packet[TCP] if TCP in packet else packet[UDP]
    return Flow(network.src, network.dst, transport.sport, transport.dport)


def passes(ends: Ends, got: tuple[Verdict, Flow], source: str, destination: str) -> None:
    assert (got[0], got[1].source, got[1].destination) == (Verdict.PASS, source, destination)


class TestWhatTheBackendOpensItself:
    @FAMILIES
    @pytest.mark.parametrize("port", [PORT["tcp"], 45000, 1025])
    def test_a_connection_is_its_own_to_the_end(self, world: World, version: int, port: int) -> None:
        """From its service's own port, and from ports of a service that has all of them."""
        ends, here, there = Ends(world, version, "tcp"), BACKEND[version], OUTSIDE[version]
        for _ in range(2):  # the second one on the same ports
            passes(ends, ends.out(SYN, port), here, there)
            passes(ends, ends.in_(SYN_ACK, port), there, here)
            for _ in range(2):
                passes(ends, ends.out(DATA, port), here, there)
                passes(ends, ends.in_(ACK, port), there, here)
            passes(ends, ends.out(FIN, port), here, there)
            passes(ends, ends.in_(FIN, port), there, here)
            passes(ends, ends.out(ACK, port), here, there)

    @FAMILIES
    def test_its_answers_may_come_another_way(self, world: World, version: int) -> None:
        ends = Ends(world, version, "tcp")
        for build in (SYN, SYN, ACK, DATA, RST):
            passes(ends, ends.out(build, 45000), BACKEND[version], OUTSIDE[version])

    @FAMILIES
    @pytest.mark.parametrize("port", [123, PORT["udp"], 45000])
    def test_a_datagram_is_its_own(self, world: World, version: int, port: int) -> None:
        """It asks a time server from the port of its own time service."""
        ends = Ends(world, version, "udp")
        for _ in range(3):
            passes(ends, ends.out(QUESTION, port, 123), BACKEND[version], OUTSIDE[version])
            passes(ends, ends.in_(ANSWER, port, 123), OUTSIDE[version], BACKEND[version])

    @FAMILIES
    def test_a_datagram_in_fragments_is_its_own(self, world: World, version: int) -> None:
        ends = Ends(world, version, "udp")
        flow = Flow(BACKEND[version], OUTSIDE[version], 123, 123)
        for piece in fragments(udp(bytes(60))):
            sent = frame(piece(flow))
            assert ends.world.run(sent, "back") == (Verdict.PASS, raw(sent))

    @FAMILIES
    @PROTOCOLS
    def test_an_error_about_it_comes_to_the_backend(self, world: World, version: int, protocol: str) -> None:
        ends = Ends(world, version, protocol)
        build = SYN if protocol == "tcp" else QUESTION
        ends.out(build, PORT[protocol], 443)
        about = Flow(BACKEND[version], OUTSIDE[version], PORT[protocol], 443)
        kind = ERRORS[version]["port unreachable"]
        error = frame(icmp(Flow(OUTSIDE[version], BACKEND[version]), kind, quotation(build, about, 8)))
        assert ends.world.run(error) == (Verdict.PASS, raw(error))

    @FAMILIES
    def test_a_client_of_the_service_on_the_same_ports_is_served_beside_it(self, world: World, version: int) -> None:
        ends = Ends(world, version, "tcp")
        ends.is_own(SYN)
        ends.directly(SYN_ACK)
        seen = ends.open(0)
        assert seen != 40000
        ends.is_own(DATA)
        ends.replies(0, DATA, seen)

    @FAMILIES
    def test_an_ended_one_leaves_its_ports_to_clients(self, world: World, version: int) -> None:
        ends = Ends(world, version, "tcp")
        ends.is_own(SYN)
        ends.is_own(FIN)
        let_pass(world, world.plane.features.times.closing + 1)
        assert ends.open(0) == 40000

    @FAMILIES
    def test_a_silent_one_is_not_forgotten(self, world: World, version: int) -> None:
        """An hour and longer, as an interactive session may be."""
        ends = Ends(world, version, "tcp")
        ends.is_own(SYN)
        ends.is_own(ACK)
        for _ in range(8):
            let_pass(world, 1000)
            world.plane.sweep()
        ends.is_own(DATA)


class TestReplies:
    @FAMILIES
    def test_a_datagram_is_one_only_to_what_came_through_the_service(self, world: World, version: int) -> None:
        ends = Ends(world, version, "udp")
        ends.is_own(ANSWER)
        ends.through(0, QUESTION)
        ends.replies(0, ANSWER, 40000)
        ends.is_own(ANSWER, 40001)

    @FAMILIES
    def test_a_shared_port_replies_only_to_what_came_through_a_service(self, world: World, version: int) -> None:
        ends = Ends(world, version, "tcp")
        for build in (SYN_ACK, DATA, FIN):
            ends.is_own(build)
        ends.is_own(SYN, 40001)

    @FAMILIES
    def test_a_backend_is_asked_only_once_it_opened_something(self, world: World, version: int) -> None:
        """Where replies name the service, nothing is remembered of it."""
        ends = Ends(world, version, "tcp")
        flow = Flow("10.0.1.1" if version == 4 else "fd00:1::1", CLIENT[version], 8080, 40000)
        for build in (SYN_ACK, DATA):
            assert ends.send(build, flow, "back")[0] is Verdict.REDIRECT
        assert not world.plane.nat_words.any() and not world.plane.nat_hints["looks"].any()
        assert ends.send(SYN, replace(flow, port=443), "back")[0] is Verdict.PASS
        assert ends.send(DATA, replace(flow, port=443), "back")[0] is Verdict.PASS
        assert ends.send(DATA, flow, "back")[0] is Verdict.REDIRECT


class TestTwoFlowsOfOnePort:
    @FAMILIES
    @PROTOCOLS
    def test_both_work_through_two_services(self, world: World, version: int, protocol: str) -> None:
        ends = Ends(world, version, protocol)
        more, answer = (DATA, DATA) if protocol == "tcp" else (QUESTION, ANSWER)
        first = ends.open(0)
        second = ends.open(1)
        assert first == 40000 != second >= 1024
        for _ in range(3):
            assert ends.through(0, more)[1].source_port == first
            assert ends.through(1, more)[1].source_port == second
            ends.replies(1, answer, second)
            ends.replies(0, answer, first)

    @FAMILIES
    def test_both_work_through_two_ports_of_one_address(self, world: World, version: int) -> None:
        ends = Ends(world, version, "tcp")
        first = ends.open(0)
        verdict, flow = ends.through(0, SYN, to=81)
        assert (verdict, first) == (Verdict.TX, 40000) and flow.source_port != first
        verdict, flow = ends.back(SYN_ACK, flow.source_port)
        assert (flow.source_port, flow.port) == (81, 40000)
        ends.replies(0, DATA, first)

    @FAMILIES
    @PROTOCOLS
    def test_a_client_of_the_backend_itself_is_served_beside_the_service(
        self, world: World, version: int, protocol: str
    ) -> None:
        """The direct connection was first."""
        ends = Ends(world, version, protocol)
        ends.directly(SYN if protocol == "tcp" else QUESTION)
        ends.is_own(SYN_ACK if protocol == "tcp" else ANSWER)
        seen = ends.open(0)
        assert seen != 40000
        ends.is_own(DATA if protocol == "tcp" else ANSWER)
        ends.replies(0, DATA if protocol == "tcp" else ANSWER, seen)

    @FAMILIES
    @PROTOCOLS
    def test_a_client_of_the_backend_itself_is_refused_while_a_service_has_its_port(
        self, world: World, version: int, protocol: str
    ) -> None:
        ends = Ends(world, version, protocol)
        assert ends.open(0) == 40000
        before = world.counters()
        flow = Flow(CLIENT[version], BACKEND[version], 40000, PORT[protocol])
        verdict, out = world.run(frame((SYN if protocol == "tcp" else QUESTION)(flow)))
        assert verdict is Verdict.TX and faults(out) == [] and out[:6] == raw(frame(SYN(flow)))[6:12]
        if protocol == "tcp":
            assert ends_of(out) == replace(flow.back()) and Ether(out)[TCP].flags == "RA"
        assert changes(world, before) == {f"{ends.service(0)}.drops.ports_in_use": 1, "verdicts.tx": 1}
        ends.replies(0, DATA if protocol == "tcp" else ANSWER, 40000)
        assert ends.directly(SYN if protocol == "tcp" else QUESTION, 40001)[0] is Verdict.PASS

    @FAMILIES
    def test_a_connection_that_is_not_remembered_survives_a_direct_syn(self, world: World, version: int) -> None:
        """The service has this backend alone. What answers the SYN is the challenge of the connection that is there."""
        ends = Ends(world, version, "tcp")
        backend = "10.0.1.1" if version == 4 else "fd00:1::1"
        direct = Flow(CLIENT[version], backend, 40000, 8080)
        assert ends.send(SYN, direct)[0] is Verdict.PASS
        for _ in range(2):
            assert ends.send(ACK, direct.back(), "back")[0] is Verdict.REDIRECT
        verdict, _ = ends.send(SYN, direct)
        assert verdict is Verdict.TX, "the next one is refused"

    @FAMILIES
    @PROTOCOLS
    def test_the_third_one_is_refused(self, world: World, version: int, protocol: str) -> None:
        """Both ports that it could have are other services'."""
        ends = Ends(world, version, protocol)
        other = (ends.open(0), ends.open(1))[1]
        ends.through(1, FIN if protocol == "tcp" else QUESTION)
        before = world.counters()
        build, port = (SYN, 80) if protocol == "tcp" else (QUESTION, 53)
        verdict, out = world.run(frame(build(Flow(CLIENT[version], VIPS[version][1], other, port))))
        assert verdict is Verdict.TX and faults(out) == []
        assert changes(world, before) == {f"{ends.service(1)}.drops.ports_in_use": 1, "verdicts.tx": 1}

    @FAMILIES
    def test_a_client_keeps_its_rights(self, world: World, version: int) -> None:
        """Servers trust ports below 1024: no client gets one that has none itself."""
        ends = Ends(world, version, "tcp")
        moved = []
        for port in range(32768, 36864):
            ends.through(0, SYN, port)
            flow = ends.through(1, SYN, port)[1]
            moved.append(flow.source_port if flow.destination == BACKEND[version] else 0)
        refused = moved.count(0)
        assert all(port == 0 or port >= 1024 for port in moved)
        assert refused <= 1024

    @FAMILIES
    @PROTOCOLS
    def test_one_that_ended_or_fell_silent_gives_its_port_up(self, world: World, version: int, protocol: str) -> None:
        ends, times = Ends(world, version, protocol), world.plane.features.times
        ends.open(0)
        let_pass(world, (times.established if protocol == "tcp" else times.datagram) + 1)
        assert ends.open(1) == 40000
        if protocol == "tcp":
            ends.replies(1, FIN, 40000)
            let_pass(world, times.closing + 1)
            assert ends.open(0) == 40000

    @FAMILIES
    def test_what_nobody_answers_does_not_keep_a_port(self, world: World, version: int) -> None:
        ends = Ends(world, version, "tcp")
        ends.through(0, SYN)
        let_pass(world, 5)
        assert ends.open(1) == 40000

    @FAMILIES
    @PROTOCOLS
    def test_errors_about_a_moved_flow_come_to_whom_they_concern(
        self, world: World, version: int, protocol: str
    ) -> None:
        ends = Ends(world, version, protocol)
        ends.open(0)
        seen = ends.open(1)
        vip, port = VIPS[version][1], {"tcp": 80, "udp": 53}[protocol]
        build = DATA if protocol == "tcp" else ANSWER
        kind = ERRORS[version]["port unreachable"]
        at_client = Flow(CLIENT[version], vip, 40000, port)
        at_backend = Flow(CLIENT[version], BACKEND[version], seen, PORT[protocol])
        from_client = icmp(Flow(CLIENT[version], vip), kind, quotation(build, at_client.back(), 8))
        from_backend = icmp(Flow(BACKEND[version], CLIENT[version]), kind, quotation(build, at_backend, 8))
        wanted = icmp(Flow(CLIENT[version], BACKEND[version], ttl=63), kind, quotation(build, at_backend.back(), 8))
        verdict, out = world.run(frame(from_client))
        assert (verdict, out[14:]) == (Verdict.TX, raw(wanted))
        wanted = icmp(Flow(vip, CLIENT[version], ttl=63), kind, quotation(build, at_client, 8))
        verdict, out = world.run(frame(from_backend), "back")
        assert (verdict, out[14:]) == (Verdict.REDIRECT, raw(wanted))

    @FAMILIES
    def test_fragments_of_a_moved_flow_go_its_way(self, world: World, version: int) -> None:
        ends = Ends(world, version, "udp")
        ends.open(0)
        seen = ends.open(1)
        flow = Flow(CLIENT[version], VIPS[version][1], 40000, 53)
        for index, piece in enumerate(fragments(udp(bytes(60)))):
            verdict, out = world.run(frame(piece(flow)))
            packet = Ether(out)
            assert (verdict, (packet[IP] if version == 4 else packet[IPv6]).dst) == (Verdict.TX, BACKEND[version])
            assert index or seen.to_bytes(2, "big") + PORT["udp"].to_bytes(2, "big") in out

    @FAMILIES
    def test_explain_tells_both(self, world: World, version: int) -> None:
        ends = Ends(world, version, "udp")
        ends.open(0)
        asked = a_flow(CLIENT[version], VIPS[version][1], 53, "udp")
        trace = ask(world, asked)
        seen = ends.open(1)
        assert told(world, asked, trace)["why"].endswith(
            f"another flow has its port there, so its source port becomes {seen}"
        )
        reply = a_flow(BACKEND[version], CLIENT[version], seen, "udp", PORT["udp"])
        assert told(world, reply, ask(world, reply))["after"]["destination"].endswith(":40000")
        own = a_flow(BACKEND[version], OUTSIDE[version], 123, "udp", PORT["udp"])
        trace = ask(world, own)
        assert (trace.reason, trace.verdict) == (Reason.OWN, "pass")
        assert told(world, own, trace)["why"] == (
            f"the backend's own, and no reply to a client of {ends.service(0)}: the kernel gets it"
        )
        third = a_flow(CLIENT[version], VIPS[version][1], 53, "udp", seen)
        trace = ask(world, third)
        assert (trace.reason, trace.verdict) == (Reason.IN_USE, "tx")
        assert "answered with ICMP port unreachable" in told(world, third, trace)["why"]


class TestTheMemory:
    def test_a_flood_pushes_out_no_flow_that_the_backend_goes_on_with(self, world: World) -> None:
        """Spoofed datagrams that nobody answers, four times as many as there are places."""
        ends = Ends(world, 4, "udp")
        ends.open(0)
        words = world.plane.nat_words
        (place,) = np.flatnonzero(words)
        full = slice(place // 8 * 8, place // 8 * 8 + 8)
        words[full] = np.where(words[full] == 0, open_words(world, 8), words[full])
        kept = set(words[full].tolist())
        for port in range(1024, 1024 + 4096):
            ends.through(0, QUESTION, port)
        assert len(kept - set(words[full].tolist())) <= 1

    def test_no_flow_means_another_backend_later(self, world: World) -> None:
        ends = Ends(world, 4, "udp")
        ends.open(0)
        words = world.plane.nat_words
        ids = {int(word) >> 14 & 0x1FFFF for word in words if word}
        assert ids == {world.backend_id("direction one udp")} and BACKEND_GONE not in ids


def open_words(world: World, count: int) -> np.ndarray:
    """Words of flows that are open, whose tuples no packet has."""
    tick = world.engine.clock.tick & 0xFFF
    return np.array([(0xABCD0000 + i) << 32 | 5 << 14 | tick << 2 | 2 for i in range(count)], np.uint64)


def let_pass(world: World, ticks: int) -> None:
    """Takes what is remembered for so much older."""
    words = world.plane.nat_words
    held = words != 0
    aged = (words >> np.uint64(2)) - np.uint64(ticks) & np.uint64(0xFFF)
    words[held] = (words & ~np.uint64(0xFFF << 2) | aged << np.uint64(2))[held]


def changes(world: World, before: dict[str, int]) -> dict[str, int]:
    return {name: n - before.get(name, 0) for name, n in world.counters().items() if n != before.get(name, 0)}


@contextmanager
def newcomer(world: World, version: int) -> Iterator[str]:
    """A reload adds a service that shares the port of `nat4 tcp` or `nat6 tcp`, which were alone there. Its address."""
    mode = NAT[version]
    vip = "203.0.113.40" if version == 4 else "2001:db8:a::40"
    before = world.engine.config
    listen = replace(service_of(world, mode.service("tcp")).listen, address=ip_address(vip))
    added = replace(service_of(world, mode.service("tcp")), name="newcomer", listen=listen)
    world.engine.adopt_config(replace(before, services=(*before.services, added)))
    known = world.engine.statuses.get(BackendKey(mode.service("tcp"), "a"))
    world.engine.update(BackendKey("newcomer", "a"), known)
    world.engine.apply_all()
    try:
        yield vip
    finally:
        world.engine.adopt_config(before)
        world.engine.apply_all()
        world.forget()


def service_of(world: World, name: str) -> Service:
    return next(service for service in world.engine.config.services if service.name == name)


class TestAReload:
    @FAMILIES
    def test_older_connections_stay_when_another_service_comes_to_their_port(self, world: World, version: int) -> None:
        ends, mode = Ends(world, version, "tcp"), NAT[version]
        at_backend = Flow(mode.backend, CLIENT[version], 8080, 40000)
        with newcomer(world, version) as vip:
            verdict, flow = ends.send(DATA, at_backend, "back")
            assert (verdict, flow.source) == (Verdict.REDIRECT, mode.vip)
            assert ends.send(SYN, replace(at_backend, port=443), "back")[0] is Verdict.PASS
            assert ends.send(SYN, Flow(CLIENT[version], vip, 40001))[0] is Verdict.TX
            assert ends.send(SYN_ACK, replace(at_backend, port=40001), "back")[1].source == vip
            ends.send(ACK, Flow(CLIENT[version], mode.vip))
            world.plane.nat_hints["until"] = 0
            assert ends.send(DATA, at_backend, "back")[1].source == mode.vip, "it was seen since"
            assert ends.send(DATA, replace(at_backend, port=40002), "back")[0] is Verdict.PASS

    @FAMILIES
    def test_what_the_backend_opened_stays_its_own_when_the_other_service_goes(
        self, world: World, version: int
    ) -> None:
        ends, mode = Ends(world, version, "tcp"), NAT[version]
        with newcomer(world, version):
            ends.send(SYN, Flow(mode.backend, CLIENT[version], 8080, 443), "back")
            before = world.engine.config
            world.engine.adopt_config(replace(before, services=before.services[:-1]))
            world.engine.apply_all()
            assert ends.send(DATA, Flow(mode.backend, CLIENT[version], 8080, 443), "back")[0] is Verdict.PASS
            assert ends.send(DATA, Flow(mode.backend, CLIENT[version], 8080, 444), "back")[0] is Verdict.REDIRECT

    def test_a_removed_backend_leaves_no_flow(self, world: World) -> None:
        ends = Ends(world, 4, "tcp")
        with newcomer(world, 4) as vip:
            ends.send(SYN, Flow(CLIENT[4], vip))
            assert np.count_nonzero(world.plane.nat_words) == 1
        assert not world.plane.nat_words.any()


EARLIER = ("slots", "transitions", "flow_sets", "loads", "snat_sets", "snat_tuples")
"""The maps of flows that a version had that did not remember those at NAT backends."""


@pytest.mark.parametrize("has", [(), ("nat_sets", "nat_hints")], ids=["an earlier version", "this version"])
def test_an_upgrade_breaks_no_flow_that_is_not_remembered(world: World, has: tuple[str, ...]) -> None:
    world.forget()
    pins = PIN_ROOT / "earlier"
    pins.mkdir(parents=True)
    for name in (*EARLIER, *has):
        syscall.pin(world.plane.fd(name), pins / name)
    notes = Manifest([], str(pins), {}, {}, layout=STATE_LAYOUT, key=KEY.name)
    try:
        left = Handover.of(notes, KEY)
        assert left is not None
        left.copy(world.plane, 900)
    finally:
        remove_pins(pins)
    ends = Ends.__new__(Ends)
    ends.world, ends.version, ends.protocol = world, 4, "udp"
    if has:
        ends.is_own(ANSWER)
    else:
        ends.replies(0, ANSWER, 40000)
        world.plane.nat_hints["until"] = 0
        ends.is_own(ANSWER)
