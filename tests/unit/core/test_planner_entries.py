"""What the planned entries say, field by field."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import pytest
from planning import (
    NEXT_HOP,
    NO_TUNNELS,
    UP,
    Machine,
    healthy,
    service,
    with_status,
)

from xdplb.abi import BackendFlag, ForwardCode, SchedulerCode, ServiceFlag
from xdplb.core.entries import Tunnels
from xdplb.core.nat_replies import reply_ports
from xdplb.core.operations import BackendEntry, ServiceEntry
from xdplb.core.status import BackendStatus
from xdplb.model import (
    Backend,
    BackendKey,
    Forward,
    HealthState,
    Listen,
    OnAllDown,
    Protocol,
    Scheduler,
    Service,
)


def first_entry(
    *, of: Service | None = None, status: BackendStatus = UP, tunnels: Tunnels = NO_TUNNELS
) -> BackendEntry:
    """The first backend's."""
    machine = Machine()
    of = of or service("s1", 1)
    world = with_status(healthy(of), (of.name, of.backends[0].name), status)
    machine.carry_out(machine.planner(tunnels).whole(world.desired))
    return machine.maps.backends[1][1]


def test_a_backend() -> None:
    assert first_entry() == BackendEntry(
        address=IPv4Address("10.1.0.10"),
        service=1,
        port=8080,
        flags=BackendFlag.UP,
        source=IPv4Address("10.0.0.1"),
        ifindex=3,
        macs=NEXT_HOP.dest_mac + NEXT_HOP.source_mac,
        mtu=1500,
    )


def test_without_a_way_nothing_is_said_of_it_and_it_is_not_up() -> None:
    entry = first_entry(status=BackendStatus(health=HealthState.UP))
    assert (entry.flags, entry.ifindex, entry.macs, entry.source) == (BackendFlag(0), 0, bytes(12), None)


def test_an_mtu_beyond_what_the_entry_holds() -> None:
    assert first_entry(status=replace(UP, next_hop=replace(NEXT_HOP, mtu=65_536))).mtu == 65_535


def test_ipv6_and_the_packets_own_port() -> None:
    of = service("s1", (Backend("b", IPv6Address("2001:db8::1"), None),), forward=Forward.IPIP)
    entry = first_entry(of=of)
    assert entry.flags == BackendFlag.UP | BackendFlag.IPV6
    assert entry.port == 0


def test_shared_with_another_service() -> None:
    backends = (Backend("b", IPv4Address("10.0.0.9"), 80),)
    machine = Machine()
    machine.become(healthy(service("s1", backends), service("s2", backends)))
    flags = [entry.flags for _, entry in machine.maps.backends.values()]
    assert flags == [BackendFlag.UP | BackendFlag.PER_FLOW] * 2


def test_whoever_had_a_shared_port_first_keeps_it() -> None:
    first, second = (service(name, (Backend("b", IPv4Address("10.0.0.9"), 80),)) for name in ("s2", "s1"))
    machine = Machine()
    machine.become(healthy(first))
    machine.become(healthy(second, first))
    for _ in range(2):
        ages = {claim.target: claim.since for claim in machine.maps.published.replies}
        ids = [machine.applied.backends[BackendKey(name, "b")][0] for name in ("s2", "s1")]
        assert [ages[id_] for id_ in ids] == [0, 1]
        machine.become(healthy(second, first, service("s3", 1)))


def test_replies_of_udp_are_remembered_flow_by_flow_and_only_with_nat() -> None:
    of = service("s1", 1)
    datagrams = replace(of, listen=replace(of.listen, protocol=Protocol.UDP))
    assert first_entry(of=datagrams).flags == BackendFlag.UP | BackendFlag.PER_FLOW
    assert first_entry(of=replace(datagrams, forward=Forward.DSR)).flags == BackendFlag.UP


@pytest.mark.parametrize(
    ("prefix", "spread"),
    [("192.0.2.0/24", 0xFF), ("192.0.2.1/32", 0), ("0.0.0.0/0", 0xFFFFFFFF)],
)
def test_outer_sources_of_a_prefix_follow_the_flow(prefix: str, spread: int) -> None:
    of = service("s1", 1, forward=Forward.GUE)
    network = IPv4Network(prefix)
    entry = first_entry(of=of, tunnels=Tunnels(ipv4=network))
    assert (entry.source, entry.source_spread) == (network.network_address, spread)


def test_of_an_ipv6_prefix_only_the_last_word_follows_the_flow() -> None:
    of = service("s1", (Backend("b", IPv6Address("2001:db8::1"), None),), forward=Forward.IPIP)
    entry = first_entry(of=of, tunnels=Tunnels(IPv4Network("192.0.2.0/24"), IPv6Network("2001:db8:1::/64")))
    assert (entry.source, entry.source_spread) == (IPv6Address("2001:db8:1::"), 0xFFFFFFFF)


def test_who_does_not_encapsulate_keeps_its_own_source() -> None:
    entry = first_entry(tunnels=Tunnels(ipv4=IPv4Network("192.0.2.0/24")))
    assert (entry.source, entry.source_spread) == (NEXT_HOP.source, 0)


SCHEDULER_CODES = {
    Scheduler.MAGLEV: SchedulerCode.HASH,
    Scheduler.SOURCE_HASH: SchedulerCode.HASH,
    Scheduler.RR: SchedulerCode.WRR,
    Scheduler.WRR: SchedulerCode.WRR,
    Scheduler.LC: SchedulerCode.LEAST,
    Scheduler.WLC: SchedulerCode.LEAST,
    Scheduler.P2C: SchedulerCode.TWO,
}


@pytest.mark.parametrize("forward", Forward)
@pytest.mark.parametrize("scheduler", Scheduler)
@pytest.mark.parametrize("on_all_down", OnAllDown)
@pytest.mark.parametrize(("ports", "port"), [((80, 80), 80), ((80, 89), 0), ((0, 65535), 0)])
def test_a_service(
    forward: Forward, scheduler: Scheduler, on_all_down: OnAllDown, ports: tuple[int, int], port: int
) -> None:
    listen = Listen(IPv4Address("203.0.113.1"), *ports, Protocol.UDP)
    of = service("s1", 3, forward=forward, scheduler=scheduler, on_all_down=on_all_down, listen=listen)
    machine = Machine()
    machine.become(healthy(replace(of, gue_port=666)))
    code = SCHEDULER_CODES[scheduler]
    sequence = 3 if code in (SchedulerCode.WRR, SchedulerCode.LEAST) else 0
    name, entry = machine.maps.services[1]
    assert name == "s1"
    assert entry == ServiceEntry(
        address=listen.address,
        slots=0,
        slot_count=512,
        hash_ports=scheduler is not Scheduler.SOURCE_HASH,
        port=port,
        gue_port=666,
        forward={
            Forward.NAT: ForwardCode.NAT,
            Forward.DSR: ForwardCode.DSR,
            Forward.IPIP: ForwardCode.IPIP,
            Forward.GUE: ForwardCode.GUE,
            Forward.FULL_NAT: ForwardCode.FULL_NAT,
        }[forward],
        flags=ServiceFlag.UDP | (ServiceFlag.REJECT if on_all_down is OnAllDown.REJECT else ServiceFlag(0)),
        scheduler=code,
        sequence=512 if sequence else 0,
        sequence_length=sequence,
        members=sequence,
    )


def test_only_nat_backends_reply_through_us() -> None:
    machine = Machine()
    nat = service("s1", (Backend("own", IPv4Address("10.0.0.1"), 8080), Backend("same", IPv4Address("10.0.0.2"), None)))
    machine.become(healthy(nat, service("s2", 2, forward=Forward.DSR)))
    claims = {(str(c.address), c.first_port, c.last_port) for c in machine.maps.published.replies}
    assert claims == {("10.0.0.1", 8080, 8080), ("10.0.0.2", 80, 80)}
    for backend in nat.backends:
        assert reply_ports(nat, backend)[0] in {8080, 80}
