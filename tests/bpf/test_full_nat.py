"""Full NAT, packet by packet: places that are ports, both directions, errors about either, and nothing left to give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import ip_address

import numpy as np
import pytest
import reference
from packets import (
    BACKEND_MAC,
    CLIENT,
    CLIENT_MAC,
    ERRORS,
    FRONT_MAC,
    ROUTER,
    TAGS,
    TRANSPORTS,
    Flow,
    Tags,
    Verdict,
    fragments,
    frame,
    icmp,
    quotation,
    raw,
    tcp,
    udp,
)
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet
from world import FEATURES, GEOMETRY, KEY, MTU, NARROW, PIN_ROOT, World

from xdplb.abi import FIRST_SOURCE_PORT, FlowState, Subject
from xdplb.core import requirements
from xdplb.core.operations import Applied
from xdplb.core.status import BackendStatus, NextHop, Statuses
from xdplb.daemon import flow_upkeep
from xdplb.daemon.engine import Engine, Retired
from xdplb.dataplane import loader, syscall
from xdplb.dataplane.clock import clock
from xdplb.dataplane.loader import Dataplane
from xdplb.model import (
    Admin,
    Affinity,
    Backend,
    BackendKey,
    Check,
    CheckType,
    Config,
    Forward,
    HealthState,
    Listen,
    Protocol,
    Scheduler,
    Service,
)

VIP = {4: "203.0.113.80", 6: "2001:db8:a::80"}
SOURCE = {4: "10.0.1.200", 6: "fd00:1::c8"}
BACKENDS = {4: ("10.0.1.1", "10.0.1.2"), 6: ("fd00:1::1", "fd00:1::2")}
PORT = {"tcp": 80, "udp": 53}
BACKEND_PORT = {"tcp": 8080, "udp": 5353}
PLACES = 65536 - FIRST_SOURCE_PORT
ANSWERED = np.uint64(1 << 31)
"""Of a mapping: a backend has answered."""


def service(version: int, protocol: str) -> Service:
    backends = tuple(
        Backend(f"b{n}", ip_address(address), BACKEND_PORT[protocol]) for n, address in enumerate(BACKENDS[version])
    )
    listen = Listen(ip_address(VIP[version]), PORT[protocol], PORT[protocol], Protocol(protocol))
    name = f"{protocol}{version}"
    return Service(name, listen, Forward.FULL_NAT, Scheduler.MAGLEV, Check(CheckType.NONE), backends)


class Gateway:
    """One engine with the services of both protocols and families, and packets sent through its program."""

    def __init__(self, plane: Dataplane, interfaces: dict[str, int]) -> None:
        self.plane = plane
        self.front = interfaces["front"]
        self.clock = clock(plane.features.times.tick_shift)
        config = Config(("front",), tuple(service(v, p) for v in (4, 6) for p in PORT))
        config = replace(config, source_pool=tuple(map(ip_address, SOURCE.values())))
        self.engine = Engine(plane, KEY, config, Statuses(), Applied(plane.geometry), Retired(), self.clock)
        next_hop = NextHop(
            self.front, *(bytes.fromhex(mac.replace(":", "")) for mac in (FRONT_MAC, BACKEND_MAC)), None, MTU
        )
        for one in config.services:
            for backend in one.backends:
                key = BackendKey(one.name, backend.name)
                self.engine.update(key, BackendStatus(HealthState.UP, Admin.ACTIVE, None, next_hop))
        self.engine.apply_all()

    def test(self, packet: bytes) -> syscall.TestRun:
        return syscall.test_run(self.plane.program_fd, packet, ingress_ifindex=self.front)

    def run(self, packet: Packet) -> tuple[Verdict, Packet]:
        result = self.test(raw(packet))
        if result.verdict == Verdict.TX:
            assert reference.faults(result.packet) == []
        return Verdict(result.verdict), Ether(result.packet)

    def open(self, flow: Flow, protocol: str = "tcp") -> Flow:
        """The flow as the backend sees it, after its first packet."""
        verdict, out = self.run(frame((tcp("S") if protocol == "tcp" else udp())(flow)))
        assert verdict is Verdict.TX
        return ends(out)

    def answer(self, seen: Flow, flags: str = "SA") -> None:
        """The backend's, to what it saw."""
        assert (
            self.test(raw(frame(tcp(flags)(replace(seen, ttl=64).back()), BACKEND_MAC, FRONT_MAC))).verdict
            == Verdict.TX
        )

    def flood(self, number: int, version: int = 4, flags: str = "A") -> Iterator[bytes]:
        """Segments of one client, each of another connection; what the backends see, where they see anything."""
        packet = bytearray(raw(frame(tcp(flags)(client(version)))))
        address, ports = (29, 34) if version == 4 else (37, 54)
        for port in range(number):
            packet[address], packet[ports : ports + 2] = port >> 15, (32768 + port % 32768).to_bytes(2, "big")
            run = self.test(bytes(packet))
            if run.verdict == Verdict.TX:
                yield run.packet

    def drops(self, name: str) -> dict[str, int]:
        id_ = self.engine.applied.services[name].id
        values = self.plane.read_counter("drop_counters", id_)
        return {field: int(n) for field, n in zip(self.plane.counter_fields("drop_counters"), values, strict=True) if n}

    def fill(self, state: FlowState, idle: int, answered: bool = True) -> None:
        """Every place belongs to somebody."""
        tick = self.clock.tick - idle & 0xFFF
        self.plane.snat_words[:] = np.uint64(0xDEAD << 32 | answered << 31 | 1 << 14 | tick << 2 | state)


def ends(packet: Packet) -> Flow:
    network = packet[IP] if IP in packet else packet[IPv6]
    transport = packet[TCP] if TCP in packet else packet[UDP]
    ttl = network.ttl if IP in packet else network.hlim
    return Flow(network.src, network.dst, transport.sport, transport.dport, ttl)


@pytest.fixture(scope="module")
def plane(world: World) -> Iterator[Dataplane]:
    config = Config(("front",), tuple(service(v, p) for v in (4, 6) for p in PORT))
    config = replace(config, source_pool=tuple(map(ip_address, SOURCE.values())))
    wanted = requirements.geometry(config)
    geometry = replace(GEOMETRY, sources4=wanted.sources4, sources6=wanted.sources6)
    plane = loader.open_dataplane(
        replace(FEATURES, full_nat=True, affinity=True, choice=True), geometry, KEY, PIN_ROOT / "full-nat"
    )
    yield plane
    plane.close()
    plane.unpin()


@pytest.fixture
def gateway(plane: Dataplane, world: World) -> Gateway:
    for memory in (plane.snat_words, plane.flow_words, plane.syn_records["tag"], plane.loads["active"]):
        memory[:] = 0
    return Gateway(plane, dict(world.interfaces))


@pytest.fixture(params=[4, 6], ids=["ipv4", "ipv6"])
def version(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(params=["tcp", "udp"])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def place_of(frame: bytes) -> int:
    """The number of the place that a frame has for its source, over IPv4 the first ones."""
    port, first = (34, 0) if frame[12:14] == b"\x08\x00" else (54, PLACES)
    return first + int.from_bytes(frame[port : port + 2], "big") - FIRST_SOURCE_PORT


def client(version: int, protocol: str = "tcp", number: int = 0) -> Flow:
    return Flow(CLIENT[version], VIP[version], 10_000 + number, PORT[protocol])


@pytest.mark.parametrize("tags", TAGS.values(), ids=TAGS.keys())
def test_there_and_back(gateway: Gateway, version: int, protocol: str, tags: Tags) -> None:
    build, flow = TRANSPORTS[protocol], client(version, protocol)
    seen = gateway.open(flow, protocol)
    assert (seen.source, seen.port) == (SOURCE[version], BACKEND_PORT[protocol])
    assert seen.destination in BACKENDS[version] and seen.source_port >= FIRST_SOURCE_PORT
    verdict, out = gateway.run(frame(build(flow), tags=tags))
    assert (verdict, raw(out)) == (Verdict.TX, raw(frame(build(seen), FRONT_MAC, BACKEND_MAC)))
    verdict, out = gateway.run(frame(build(replace(seen, ttl=64).back()), BACKEND_MAC, FRONT_MAC, tags))
    assert (verdict, raw(out)) == (Verdict.TX, raw(frame(build(flow.back().hop()), FRONT_MAC, CLIENT_MAC)))


def test_there_and_back_by_the_kernel(gateway: Gateway, version: int, protocol: str) -> None:
    """It gets the packet translated, in a frame to this host and with all its hops."""
    build, flow = TRANSPORTS[protocol], client(version, protocol)
    lead(gateway, by_kernel=True)
    verdict, out = gateway.run(frame((tcp("S") if protocol == "tcp" else udp())(flow)))
    assert verdict is Verdict.PASS and reference.faults(raw(out)) == []
    seen = ends(out)
    assert (seen.source, seen.port, seen.ttl) == (SOURCE[version], BACKEND_PORT[protocol], flow.ttl)
    verdict, out = gateway.run(frame(build(flow)))
    assert (verdict, raw(out)) == (Verdict.PASS, raw(frame(build(seen))))
    verdict, out = gateway.run(frame(build(replace(seen, ttl=64).back()), BACKEND_MAC, FRONT_MAC))
    assert (verdict, raw(out)) == (Verdict.TX, raw(frame(build(flow.back().hop()), FRONT_MAC, CLIENT_MAC)))


@pytest.mark.parametrize("by_kernel", [False, True], ids=["by XDP", "by the kernel"])
@pytest.mark.parametrize("flags", [0, "DF"])
def test_what_does_not_fit_is_answered(gateway: Gateway, by_kernel: bool, flags: int | str) -> None:
    """With full NAT nothing is fragmented."""
    lead(gateway, by_kernel, mtu=1300)
    packet = udp(bytes(1300))(client(4, "udp"))
    packet.flags = flags
    verdict, out = gateway.run(frame(packet))
    assert (verdict, out[IP].src, out[IP].dst, out.payload.payload.type) == (Verdict.TX, VIP[4], CLIENT[4], 3)
    assert gateway.drops("udp4") == {"too_big": 1}


def lead(gateway: Gateway, by_kernel: bool, mtu: int = MTU) -> None:
    """Has the kernel forward to all backends, or XDP, on such a way."""
    for key in list(gateway.engine.applied.backends):
        status = gateway.engine.statuses.get(key)
        assert status.next_hop is not None
        gateway.engine.update(key, replace(status, next_hop=replace(status.next_hop, by_kernel=by_kernel, mtu=mtu)))
    gateway.engine.apply_all()


def test_every_flow_has_a_port_of_its_own_and_keeps_it(gateway: Gateway, version: int, protocol: str) -> None:
    flows = [client(version, protocol, number) for number in range(2000)]
    seen = [gateway.open(flow, protocol) for flow in flows]
    assert len({(flow.source, flow.source_port) for flow in seen}) == len(flows)
    for flow, first in zip(flows, seen, strict=True):
        assert ends(gateway.run(frame(TRANSPORTS[protocol](flow)))[1]) == first


def test_hardly_anybody_is_refused_before_most_ports_are_given(gateway: Gateway) -> None:
    offered, most, given, refused = PLACES * 85 // 100, PLACES * 7 // 10, 0, []
    for seen in gateway.flood(offered):
        gateway.plane.snat_words[place_of(seen)] |= ANSWERED
        given += 1
        refused += [gateway.drops("tcp4").get("ports_exhausted", 0)] if given == most else []
    assert refused == [0]
    assert 0.995 * offered < given == np.count_nonzero(gateway.plane.snat_words)
    assert gateway.drops("tcp4").get("ports_exhausted", 0) == offered - given


class TestWhatNoBackendHasAnswered:
    """Anybody can send packets in anybody's name."""

    def test_gives_its_port_up(self, gateway: Gateway, version: int, protocol: str) -> None:
        state = FlowState.ESTABLISHED if protocol == "tcp" else FlowState.DATAGRAM
        gateway.fill(state, idle=0, answered=False)
        for number in range(100):
            gateway.open(client(version, protocol, number), protocol)
        assert gateway.drops(f"{protocol}{version}") == {}

    @pytest.mark.parametrize("answer", ["SA", "A", "PA", "FA"])
    def test_but_not_once_one_has(self, gateway: Gateway, version: int, answer: str) -> None:
        gateway.fill(FlowState.ESTABLISHED, idle=100)
        words = gateway.plane.snat_words
        words.reshape(-1, 8)[:, 3] &= ~ANSWERED
        first = gateway.open(client(version))
        gateway.answer(first, answer)
        words[words & ANSWERED == 0] |= ANSWERED
        assert gateway.run(frame(tcp("S")(client(version, number=1))))[0] is Verdict.DROP
        assert ends(gateway.run(frame(tcp("A")(client(version))))[1]) == first

    @pytest.mark.parametrize("answer", ["R", "RA"])
    def test_a_reset_is_no_answer_and_what_got_one_gives_way_first(
        self, gateway: Gateway, version: int, answer: str
    ) -> None:
        gateway.fill(FlowState.ESTABLISHED, idle=100, answered=False)
        seen = gateway.open(client(version))
        gateway.answer(seen, answer)
        place = place_of(raw(gateway.run(frame(tcp("A")(client(version))))[1]))
        assert seen.source_port - FIRST_SOURCE_PORT == place % PLACES
        gateway.plane.snat_words[np.arange(2 * PLACES) // 8 != place // 8] |= ANSWERED
        newcomer = next(gateway.flood(50_000, version, "S"))
        assert place_of(newcomer) == place

    def test_a_free_place_is_taken_before_it(self, gateway: Gateway) -> None:
        gateway.fill(FlowState.ESTABLISHED, idle=5, answered=False)
        words = gateway.plane.snat_words
        words.reshape(-1, 8)[:, 5] = 0
        taken = [gateway.open(client(4, number=number)).source_port for number in range(50)]
        assert {(port - FIRST_SOURCE_PORT) % 8 for port in taken} == {5}

    def test_a_flood_of_one_client_refuses_no_other_and_takes_no_answered_flows_port(self, gateway: Gateway) -> None:
        flows = [client(4, number=number) for number in range(300)]
        answered = [gateway.open(flow) for flow in flows]
        for seen in answered:
            gateway.answer(seen)
        for flow in flows:
            gateway.run(frame(tcp("A")(flow)))
        assert sum(1 for _ in gateway.flood(140_000)) == 140_000
        assert np.count_nonzero(gateway.plane.snat_words[:PLACES]) > PLACES * 0.99
        for number in range(300, 600):
            gateway.answer(gateway.open(client(4, number=number)))
        assert gateway.drops("tcp4").get("ports_exhausted", 0) == 0
        assert [ends(gateway.run(frame(tcp("A")(flow)))[1]) for flow in flows] == answered

    def test_nor_does_one_whose_every_packet_a_backend_resets(self, gateway: Gateway) -> None:
        for seen in gateway.flood(70_000):
            reset = bytearray(seen)
            reset[26:34], reset[34:38], reset[47] = seen[30:34] + seen[26:30], seen[36:38] + seen[34:36], 0x04
            gateway.test(bytes(reset))
        states = np.bincount((gateway.plane.snat_words & np.uint64(3)).astype(np.int64))
        assert states[FlowState.CLOSING] > 0.95 * PLACES
        for number in range(300):
            gateway.open(client(4, number=number))
        assert gateway.drops("tcp4").get("ports_exhausted", 0) == 0


def test_no_live_flow_loses_its_port(gateway: Gateway, version: int) -> None:
    gateway.fill(FlowState.ESTABLISHED, idle=100)
    before = gateway.plane.snat_words.copy()
    flow = client(version)
    for flags in ("S", "A"):
        assert gateway.run(frame(tcp(flags)(flow)))[0] is Verdict.DROP
    assert gateway.drops(f"tcp{version}")["ports_exhausted"] == 2
    assert (gateway.plane.snat_words == before).all()


@pytest.mark.parametrize(
    ("state", "idle"), [(FlowState.ESTABLISHED, 901), (FlowState.CLOSING, 4), (FlowState.OPENING, 2)]
)
def test_what_ended_gives_its_port_to_others(gateway: Gateway, state: FlowState, idle: int) -> None:
    gateway.fill(state, idle)
    assert gateway.open(client(4)).source_port >= FIRST_SOURCE_PORT


def test_time_frees_ports(gateway: Gateway) -> None:
    gateway.fill(FlowState.ESTABLISHED, idle=901)
    gateway.plane.snat_words[:8] = 0
    gateway.open(client(4))
    flow_upkeep.sweep(gateway.engine)
    assert np.count_nonzero(gateway.plane.snat_words) == 1


def test_a_backends_farewell_closes_the_flow(gateway: Gateway) -> None:
    seen = gateway.open(client(4))
    gateway.run(frame(tcp("FA")(replace(seen, ttl=64).back()), BACKEND_MAC, FRONT_MAC))
    (word,) = gateway.plane.snat_words[gateway.plane.snat_words != 0]
    assert int(word) & 3 == FlowState.CLOSING


def test_a_backend_that_talks_keeps_the_flow_alive(gateway: Gateway) -> None:
    seen = gateway.open(client(4, "udp"), "udp")
    words = gateway.plane.snat_words
    (place,) = np.flatnonzero(words)
    words[place] = reference.aged(words[place], 250)
    before = gateway.clock.tick
    gateway.run(frame(udp()(replace(seen, ttl=64).back()), BACKEND_MAC, FRONT_MAC))
    assert int(words[place]) >> 2 & 0xFFF in [tick & 0xFFF for tick in range(before, gateway.clock.tick + 1)]


def test_a_backend_is_told_what_is_too_big_for_the_way_to_the_client(gateway: Gateway, version: int) -> None:
    seen = gateway.open(replace(client(version), source=NARROW[version]))
    answer = tcp("A", bytes(1400))(replace(seen, ttl=64).back())
    if version == 4:
        answer.flags = "DF"
    verdict, out = gateway.run(frame(answer, BACKEND_MAC, FRONT_MAC))
    network = out[IP] if version == 4 else out[IPv6]
    assert (verdict, network.src, network.dst) == (Verdict.TX, SOURCE[version], seen.destination)
    assert (1280).to_bytes(2, "big") in raw(network.payload)[:8]


def test_what_answers_no_flow_is_the_hosts_own(gateway: Gateway, version: int) -> None:
    seen = replace(gateway.open(client(version)), ttl=64)
    stranger = {4: "10.0.1.77", 6: "fd00:1::77"}[version]
    answers = [
        tcp("A")(replace(seen, source_port=seen.source_port ^ 8).back()),
        tcp("A")(replace(seen, port=22).back()),
        tcp("A")(replace(seen, destination=stranger).back()),
        udp()(seen.back()),
        tcp("A")(replace(seen, source_port=22).back()),
    ]
    for answer in answers:
        packet = frame(answer, BACKEND_MAC, FRONT_MAC)
        verdict, out = gateway.run(packet)
        assert (verdict, raw(out)) == (Verdict.PASS, raw(packet))


def test_a_flow_stays_with_its_backend_while_that_drains(gateway: Gateway) -> None:
    flows = {client(4, number=number): gateway.open(client(4, number=number)) for number in range(200)}
    key = BackendKey("tcp4", "b0")
    gateway.engine.update(key, replace(gateway.engine.statuses.get(key), admin=Admin.DRAIN))
    gateway.engine.apply_service("tcp4")
    for flow, seen in flows.items():
        assert ends(gateway.run(frame(tcp("A")(flow)))[1]) == seen
    fresh = {gateway.open(client(4, number=number)).destination for number in range(1000, 1200)}
    assert fresh == {BACKENDS[4][1]}


def adopt(gateway: Gateway, **settings: object) -> None:
    """The same services with other settings."""
    config = gateway.engine.config
    services = tuple(replace(service, **settings) for service in config.services)  # type: ignore[arg-type]
    gateway.engine.adopt_config(replace(config, services=services))
    gateway.engine.apply_all()


@pytest.mark.parametrize("affinity", [None, Affinity()], ids=["by flow", "by client"])
class TestASynOnPortsInUse:
    """Anybody can send one, in anybody's name."""

    @pytest.fixture
    def word(self, gateway: Gateway, version: int, affinity: Affinity | None) -> Iterator[Callable[[], np.uint64]]:
        """Of the one mapping that there is, of a connection that is established."""
        adopt(gateway, affinity=affinity)
        gateway.open(client(version))
        gateway.run(frame(tcp("A")(client(version))))
        (place,) = np.flatnonzero(gateway.plane.snat_words)
        yield lambda: gateway.plane.snat_words[place]
        assert np.flatnonzero(gateway.plane.snat_words).tolist() == [place]

    def test_goes_to_its_backend_and_changes_nothing(
        self, gateway: Gateway, version: int, word: Callable[[], np.uint64]
    ) -> None:
        before, seen = word(), ends(gateway.run(frame(tcp("A")(client(version))))[1])
        name = next(f"b{n}" for n, address in enumerate(BACKENDS[version]) if address == seen.destination)
        key = BackendKey(f"tcp{version}", name)
        gateway.engine.update(key, replace(gateway.engine.statuses.get(key), admin=Admin.DRAIN))
        gateway.engine.apply_service(key.service)
        for flags in ("S", "SEC", "SU"):
            assert ends(gateway.run(frame(tcp(flags)(client(version))))[1]) == seen
        assert word() == before

    @pytest.mark.parametrize("end", ["FA", "R"])
    def test_begins_anew_where_the_connection_is_closing(
        self, gateway: Gateway, version: int, word: Callable[[], np.uint64], end: str
    ) -> None:
        gateway.run(frame(tcp(end)(client(version))))
        assert int(word()) & 3 == FlowState.CLOSING
        gateway.open(client(version))
        assert int(word()) & 3 == FlowState.OPENING
        gateway.run(frame(tcp("A")(client(version))))
        assert int(word()) & 3 == FlowState.ESTABLISHED

    def test_begins_anew_where_it_was_silent_for_long(
        self, gateway: Gateway, version: int, word: Callable[[], np.uint64]
    ) -> None:
        words = gateway.plane.snat_words
        (place,) = np.flatnonzero(words)
        words[place] = reference.aged(words[place], gateway.plane.features.times.reuse)
        gateway.open(client(version))
        assert int(word()) & 3 == FlowState.OPENING


def test_a_strangers_syn_moves_no_flow_that_was_silent_since_its_slot_changed_hands(
    gateway: Gateway, version: int
) -> None:
    """Its mapping is as old as that, so the SYN takes it over; the numbers of segments tell whose they are."""
    flows = [client(version, number=number) for number in range(20)]
    seen = {flow: gateway.open(flow) for flow in flows}
    for flow in flows:
        gateway.run(frame(tcp("A")(flow)))
    key = BackendKey(f"tcp{version}", "b0")
    gateway.engine.update(key, replace(gateway.engine.statuses.get(key), admin=Admin.DRAIN))
    gateway.engine.apply_service(key.service)
    words = gateway.plane.snat_words
    words[words != 0] = reference.aged(words[words != 0], gateway.plane.features.times.reuse)
    for flow in flows:
        assert gateway.run(frame(numbered(tcp("S")(flow), 1 << 30)))[0] is Verdict.TX
        assert ends(gateway.run(frame(tcp("A")(flow)))[1]) == seen[flow]
        assert ends(gateway.run(frame(numbered(tcp("A")(flow), 1 + (1 << 30))))[1]) == seen[flow]
    assert {flow.destination for flow in seen.values()} == set(BACKENDS[version])


def test_a_clients_own_syn_on_such_a_flows_ports_begins_a_new_one(gateway: Gateway, version: int) -> None:
    flows = [client(version, number=number) for number in range(20)]
    for flow in flows:
        gateway.open(flow)
    key = BackendKey(f"tcp{version}", "b0")
    gateway.engine.update(key, replace(gateway.engine.statuses.get(key), admin=Admin.DRAIN))
    gateway.engine.apply_service(key.service)
    for flow in flows:
        began = ends(gateway.run(frame(numbered(tcp("S")(flow), 1 << 30)))[1])
        assert began.destination == BACKENDS[version][1]
        assert ends(gateway.run(frame(numbered(tcp("A")(flow), 1 + (1 << 30))))[1]) == began


@pytest.mark.parametrize("scheduler", [Scheduler.RR, Scheduler.LC, Scheduler.P2C])
def test_a_flow_counts_at_the_backend_that_its_mapping_names(
    gateway: Gateway, version: int, scheduler: Scheduler
) -> None:
    """Replies keep a mapping alive, and the flow cache does not see them: to that, the flow was silent for long."""
    adopt(gateway, scheduler=scheduler)
    flows = [client(version, number=number) for number in range(20)]
    seen = {flow: gateway.open(flow) for flow in flows}
    for flow in flows:
        gateway.run(frame(tcp("A")(flow)))
    words, plane = gateway.plane.flow_words, gateway.plane
    words[words != 0] = reference.aged(words[words != 0], plane.features.times.reuse)
    for at_backend in seen.values():
        gateway.answer(at_backend, "A")
    for flow in flows:
        assert ends(gateway.run(frame(numbered(tcp("S")(flow), 1 << 30)))[1]) == seen[flow]
    numbers = {
        address: gateway.engine.applied.backends[BackendKey(f"tcp{version}", f"b{n}")][0]
        for n, address in enumerate(BACKENDS[version])
    }
    at = Counter(numbers[at_backend.destination] for at_backend in seen.values())
    known = words[words != 0].tolist()
    assert Counter((word >> 14 & 0x1FFFF, word & 3) for word in known) == {
        (number, FlowState.ESTABLISHED): count for number, count in at.items()
    }
    assert {number: plane.loads["active"][number] for number in at} == at


def test_a_flow_whose_slot_changed_hands_is_remembered_where_its_mapping_is(gateway: Gateway, version: int) -> None:
    """Its packets before were not remembered: a SYN on its ports is the first that is."""
    flows = [client(version, number=number) for number in range(20)]
    seen = {flow: gateway.open(flow) for flow in flows}
    for flow in flows:
        gateway.run(frame(tcp("A")(flow)))
    key = BackendKey(f"tcp{version}", "b0")
    gateway.engine.update(key, replace(gateway.engine.statuses.get(key), admin=Admin.DRAIN))
    gateway.engine.apply_service(key.service)
    for flow in flows:
        assert ends(gateway.run(frame(numbered(tcp("S")(flow), 1 << 30)))[1]) == seen[flow]
    words = gateway.plane.flow_words
    at = sum(at_backend.destination == BACKENDS[version][0] for at_backend in seen.values())
    number = gateway.engine.applied.backends[key][0]
    assert [(word >> 14 & 0x1FFFF, word & 3) for word in words[words != 0].tolist()] == [
        (number, FlowState.ESTABLISHED)
    ] * at


def numbered(segment: Packet, sequence: int) -> Packet:
    segment[TCP].seq = sequence
    return segment


def test_a_removed_backend_leaves_no_place_behind(gateway: Gateway) -> None:
    for number in range(100):
        gateway.open(client(4, number=number))
    config = gateway.engine.config
    services = tuple(replace(s, backends=s.backends[1:]) for s in config.services)
    gateway.engine.adopt_config(replace(config, services=services))
    gateway.engine.apply_all()
    left = {int(word) >> 14 & 0x1FFFF for word in gateway.plane.snat_words if word}
    assert left == {gateway.engine.applied.backends[BackendKey("tcp4", "b1")][0]}


def test_what_explain_says_is_what_happens(gateway: Gateway, version: int, protocol: str) -> None:
    flow, build = client(version, protocol), tcp("A") if protocol == "tcp" else udp()
    packet = frame(build(flow))
    new = gateway.plane.explain(raw(packet), gateway.front)
    assert not gateway.plane.snat_words.any()
    assert (new.subject, ends(Ether(new.after)).source) == (Subject.TO_SERVICE, CLIENT[version])
    gateway.open(flow, protocol)
    before = gateway.plane.snat_words.copy()
    known = gateway.plane.explain(raw(packet), gateway.front)
    assert (gateway.plane.snat_words == before).all()
    assert known.subject is Subject.MAPPED
    assert known.after == raw(gateway.run(packet)[1])


def test_later_fragments_are_dropped_and_counted(gateway: Gateway) -> None:
    first, *later = fragments(udp(bytes(100)))
    flow = client(4, "udp")
    assert gateway.run(frame(first(flow)))[0] is Verdict.TX
    for piece in later:
        assert gateway.run(frame(piece(flow)))[0] is Verdict.DROP


def test_fragments_of_what_the_host_itself_asked_for_pass(gateway: Gateway, version: int) -> None:
    """To a source address of full NAT, which is the host's own as well."""
    flow = Flow(CLIENT[version], SOURCE[version], 53, 60999)
    for piece in fragments(udp(bytes(60))):
        assert gateway.run(frame(piece(flow)))[0] is Verdict.PASS


@pytest.mark.parametrize("length", [8, 20, None], ids=["8 bytes", "a TCP header", "all"])
def test_an_error_about_an_answer_reaches_the_backend(gateway: Gateway, version: int, length: int | None) -> None:
    """A router on the way to the client tells the service; the backend must find its own packet quoted."""
    flow = client(version)
    seen, answer = gateway.open(flow), tcp("A", b"HTTP/1.1 200 OK")
    kind = ERRORS[version]["fragmentation needed" if version == 4 else "packet too big"]
    report = Flow(ROUTER[version], VIP[version])
    packet = icmp(report, kind, quotation(answer, replace(flow.back(), ttl=60), length))
    expected = icmp(
        replace(report.hop(), source=SOURCE[version], destination=seen.destination),
        kind,
        quotation(answer, replace(seen.back(), ttl=60), length),
    )
    verdict, out = gateway.run(frame(packet))
    assert (verdict, raw(out)) == (Verdict.TX, raw(frame(expected, FRONT_MAC, BACKEND_MAC)))


@pytest.mark.parametrize("length", [8, 20, None], ids=["8 bytes", "a TCP header", "all"])
def test_an_error_about_a_question_reaches_the_client(gateway: Gateway, version: int, length: int | None) -> None:
    flow = client(version)
    seen, question = gateway.open(flow), tcp("A", b"GET /")
    kind = ERRORS[version]["port unreachable"]
    report = Flow(seen.destination, SOURCE[version])
    packet = icmp(report, kind, quotation(question, replace(seen, ttl=60), length))
    expected = icmp(
        Flow(VIP[version], CLIENT[version], ttl=63), kind, quotation(question, replace(flow, ttl=60), length)
    )
    verdict, out = gateway.run(frame(packet, BACKEND_MAC, FRONT_MAC))
    assert (verdict, raw(out)) == (Verdict.TX, raw(frame(expected, FRONT_MAC, CLIENT_MAC)))
