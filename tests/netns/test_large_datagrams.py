"""Datagrams that fill the clients' way, and do not fit the backends': they may be fragmented, and arrive whole."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from stage import NO_CHECK, VIP4, at, backends_of, balancing, service, start_decapsulation

from xdplb.lab.laboratory import Laboratory, Shape, UdpEcho
from xdplb.model import Forward

IP_MTU_DISCOVER, IP_PMTUDISC_OMIT = 10, 5
"""linux/in.h: packets as large as the interface takes them, without DF."""
NAT = 5300
TUNNELS = {
    (Forward.IPIP, 4): 5301,
    (Forward.IPIP, 6): 5302,
    (Forward.GUE, 4): 5303,
    (Forward.GUE, 6): 5304,
}


@pytest.fixture(scope="module")
def lab(able: None, bpf_able: None) -> Iterator[Laboratory]:
    with Laboratory(Shape.TWO_ARMED, backend_mtu=1400) as lab:
        lab.prepare(Forward.IPIP)
        for host in lab.backends:
            UdpEcho(host, NAT, max(TUNNELS.values())).start()
        start_decapsulation(lab)
        yield lab


def echoed(lab: Laboratory, port: int, payload: bytes) -> bytes:
    with lab.client.socket(socket.AF_INET, socket.SOCK_DGRAM) as question:
        question.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_OMIT)
        question.settimeout(2)
        question.connect((str(VIP4), port))
        question.send(payload)
        return question.recv(65536).partition(b":")[2]


def arrive(lab: Laboratory, ports: dict[tuple[Forward, int], int], mode: str) -> None:
    services = [
        service(
            f"{forward}-{outer}",
            at(VIP4, f"{port}/udp"),
            backends_of(lab, outer),
            forward=str(forward),
            check=NO_CHECK,
        )
        for (forward, outer), port in ports.items()
    ]
    with balancing(lab, *services, options=["--mode", mode]) as balancer:
        for port in ports.values():
            for length in (1472, 1373, 1333, 100, 4000):
                for number in range(8):
                    payload = bytes([number]) * length
                    assert echoed(lab, port, payload) == payload, (port, length)
        for counted in balancer.stats()["services"]:
            assert set(counted["drops"].values()) == {0}


@pytest.mark.parametrize("mode", ["native", "generic"])
def test_datagrams_that_may_be_fragmented_arrive_through_tunnels(lab: Laboratory, mode: str) -> None:
    arrive(lab, TUNNELS, mode)


def test_datagrams_that_may_be_fragmented_arrive_by_nat(lab: Laboratory) -> None:
    arrive(lab, {(Forward.NAT, 4): NAT}, "native")
