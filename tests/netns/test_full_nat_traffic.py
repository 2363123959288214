"""Full NAT: backends that know nobody beyond their own segment serve clients all the same."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import ip_address
from typing import Any

import pytest
from crowd import Crowd
from stage import (
    FAST_CHECK,
    NO_CHECK,
    VIP,
    Balancer,
    ask_udp_many,
    at,
    backends_of,
    family_of,
    fetch_many,
    service,
    traces,
)

from xdplb.lab.laboratory import BIG_BYTES, Laboratory, Shape, UdpEcho, WebServer
from xdplb.lab.network import BACK
from xdplb.model import Forward

ECHO = 5300
CONNECTIONS = 60
SOURCES = {4: BACK.address4(200), 6: BACK.address6(200)}


@pytest.fixture(scope="module")
def lab(able: None, bpf_able: None) -> Iterator[Laboratory]:
    with Laboratory(Shape.TWO_ARMED) as lab:
        lab.prepare(Forward.FULL_NAT)
        for host in lab.backends:
            WebServer(host, ports=(80, 8080)).start()
            UdpEcho(host, ECHO).start()
        yield lab


@pytest.fixture
def balancer(lab: Laboratory) -> Iterator[Balancer]:
    before = traces(lab)
    balancer = Balancer(lab)
    yield balancer
    lab.gateway.xdplb("down", "eth0")
    assert traces(lab) == before


def web(lab: Laboratory, version: int = 4, **more: Any) -> dict[str, Any]:
    backends = [{**b, "address": at(b["address"], 8080)} for b in backends_of(lab, version)]
    more = {"check": FAST_CHECK, **more}
    return service(f"web{version}", at(VIP[version], 80), backends, forward="full-nat", **more)


def download(lab: Laboratory, version: int) -> int:
    """How many bytes the answer has, head included."""
    with lab.client.socket(family_of(VIP[version]), socket.SOCK_STREAM) as connection:
        connection.settimeout(10)
        connection.connect((str(VIP[version]), 80))
        connection.sendall(b"GET /big HTTP/1.0\r\n\r\n")
        return sum(len(part) for part in iter(lambda: connection.recv(65536), b""))


def up(balancer: Balancer, *services: dict[str, Any], **more: Any) -> None:
    balancer.write(*services, **{"source_pool": [str(address) for address in SOURCES.values()], **more})
    balancer.up()


@pytest.mark.parametrize("version", [4, 6])
def test_backends_without_a_route_to_anybody_serve(lab: Laboratory, balancer: Balancer, version: int) -> None:
    everybody = {host.name for host in lab.backends}
    up(balancer, web(lab, version))
    balancer.await_all(f"web{version}", "up")
    assert fetch_many(lab.client, VIP[version]) == everybody
    assert download(lab, version) > BIG_BYTES
    neighbours = lab.backends[0].shell("ip neigh show to " + str(SOURCES[version]))
    assert "lladdr" in neighbours, "it answers to the address of the pool"
    assert set(balancer.states(f"web{version}").values()) == {"up"}, "checks from the host itself are answered still"


def test_udp(lab: Laboratory, balancer: Balancer) -> None:
    echo = service("echo", at(VIP[4], f"{ECHO}/udp"), backends_of(lab), forward="full-nat", check=NO_CHECK)
    up(balancer, echo)
    assert ask_udp_many(lab.client, VIP[4], ECHO) == {host.name for host in lab.backends}


@pytest.mark.parametrize("scheduler", ["maglev", "rr", "lc"])
def test_connections_survive_changes_and_the_daemons_death(lab: Laboratory, balancer: Balancer, scheduler: str) -> None:
    up(balancer, web(lab, scheduler=scheduler))
    balancer.await_all("web4", "up")
    with ExitStack() as stack:
        crowd = Crowd(lab.client, VIP[4], CONNECTIONS, stack)
        balancer.cli("backend", "drain", "web4/backend1")
        crowd.unchanged()
        assert "backend1" not in fetch_many(lab.client, VIP[4])
        balancer.kill()
        crowd.unchanged()
        balancer.up()
        crowd.unchanged()
        balancer.cli("backend", "ready", "web4/backend1")
        crowd.unchanged(silent_too=True)


def test_the_hosts_own_connections_from_these_addresses_are_its_own(lab: Laboratory, balancer: Balancer) -> None:
    up(balancer, web(lab, check=NO_CHECK))
    backend = lab.backends[0]
    with lab.gateway.socket(socket.AF_INET, socket.SOCK_STREAM) as own:
        own.settimeout(3)
        own.bind((str(SOURCES[4]), 0))
        own.connect((str(ip_address(backend.address(4))), 8080))
        own.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert backend.name.encode() in own.recv(4096)
