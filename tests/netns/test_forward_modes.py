"""Every forward mode from client to backend and back: nginx and curl, UDP echo, both families, one and two arms."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Raw
from stage import (
    ATTEMPTS,
    VIP,
    ask_udp,
    ask_udp_many,
    at,
    backends_of,
    balancing,
    family_of,
    fetch_many,
    service,
    start_decapsulation,
)

from xdplb.lab.hosts import Host
from xdplb.lab.laboratory import BIG_BYTES, Laboratory, Shape, UdpEcho, WebServer
from xdplb.model import Forward

ECHO_PORT, RANGE = 5300, (7000, 7003)
ALL_PORTS_VIP = {4: "203.0.113.11", 6: "2001:db8::11"}
VERSIONS = (4, 6)


@pytest.fixture(scope="module", params=Shape)
def lab(request: pytest.FixtureRequest, able: None, bpf_able: None) -> Iterator[Laboratory]:
    """Backends that serve everything, behind a way that carries encapsulated packets of full size."""
    vips = (*VIP.values(), *ALL_PORTS_VIP.values())
    with Laboratory(request.param, backend_mtu=1600, vips=vips) as laboratory:
        for host in laboratory.backends:
            WebServer(host, ports=(80, 8080)).start()
            UdpEcho(host, ECHO_PORT).start()
            UdpEcho(host, *RANGE).start()
        start_decapsulation(laboratory)
        yield laboratory


def services_of(lab: Laboratory, forward: Forward) -> list[dict[str, Any]]:
    """Web and echo in both families; with it what is peculiar to a mode: tunnels of the other family, many ports."""
    services = []
    for version in VERSIONS:
        services += web_and_echo(lab, forward, version, version)
        if forward.encapsulates:
            services += web_and_echo(lab, forward, version, 10 - version)
        else:
            udp = {"forward": str(forward), "check": {"type": "tcp", "port": 80}}
            some = backends_of(lab, version)
            services.append(service(f"range-{version}", at(VIP[version], f"{RANGE[0]}-{RANGE[1]}/udp"), some, **udp))
            services.append(service(f"all-{version}", at(ALL_PORTS_VIP[version], "0/udp"), some, **udp))
        if forward is Forward.NAT:
            moved = [{"name": host.name, "address": at(host.address(version), 8080)} for host in lab.backends]
            services.append(service(f"moved-{version}", at(VIP[version], 81), moved))
    return services


def web_and_echo(lab: Laboratory, forward: Forward, listen: int, outer: int) -> list[dict[str, Any]]:
    backends, name = backends_of(lab, outer), f"{listen}-over-{outer}"
    web, echo = (80, ECHO_PORT) if listen == outer else (8080, RANGE[0])
    check = {"type": "tcp", "port": 80}
    return [
        service(f"web-{name}", at(VIP[listen], web), backends, forward=str(forward)),
        service(f"echo-{name}", at(VIP[listen], f"{echo}/udp"), backends, forward=str(forward), check=check),
    ]


def check_web(lab: Laboratory, listen: int, port: int = 80) -> None:
    everybody = {host.name for host in lab.backends}
    url = f"http://{at(VIP[listen], port)}"
    assert lab.client.curl(url).stdout.strip() in everybody
    assert int(lab.client.curl(f"{url}/big", "-o", "/dev/null", "-w", "%{size_download}").stdout) == BIG_BYTES
    assert fetch_many(lab.client, VIP[listen], port) == everybody


def check_echo(lab: Laboratory, listen: int, port: int = ECHO_PORT) -> None:
    assert ask_udp_many(lab.client, VIP[listen], port) == {host.name for host in lab.backends}
    largest = bytes(range(250)) * 5
    assert ask_udp(lab.client, VIP[listen], port, largest).partition(b":")[2] == largest


def mac(host: Host) -> str:
    return str(json.loads(host.run(["ip", "-j", "link", "show", "eth0"]).stdout)[0]["address"])


def check_priority_tag(lab: Laboratory, listen: int, port: int = ECHO_PORT) -> None:
    """A question in a frame for VLAN 0, as hosts send them that ask switches for a priority."""
    with (
        lab.client.socket(family_of(VIP[listen]), socket.SOCK_DGRAM) as answers,
        lab.client.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire,
    ):
        answers.settimeout(2)
        answers.connect((str(VIP[listen]), port))
        source, source_port = answers.getsockname()[:2]
        header = (IP if listen == 4 else IPv6)(src=source, dst=str(VIP[listen]))
        link = Ether(src=mac(lab.client), dst=mac(lab.gateway)) / Dot1Q(vlan=0, prio=5)
        wire.bind(("eth0", 0))
        wire.send(bytes(link / header / UDP(sport=source_port, dport=port) / Raw(b"urgent")))
        assert answers.recv(100).partition(b":")[2] == b"urgent"


def check_ports(lab: Laboratory, version: int) -> None:
    """A range of ports, whose neighbours are nobody's, and an address all of whose ports are one service."""
    everybody = {host.name for host in lab.backends}
    for port in range(RANGE[0], RANGE[1] + 1):
        assert ask_udp_many(lab.client, VIP[version], port) == everybody
    with pytest.raises(ConnectionRefusedError):
        ask_udp(lab.client, VIP[version], RANGE[1] + 1)
    for port in (ECHO_PORT, *RANGE):
        assert ask_udp_many(lab.client, ALL_PORTS_VIP[version], port) == everybody


@pytest.mark.parametrize("forward", [forward for forward in Forward if forward is not Forward.FULL_NAT])
def test_a_forward_mode_end_to_end(lab: Laboratory, forward: Forward) -> None:
    lab.prepare(forward)
    with balancing(lab, *services_of(lab, forward)) as balancer:
        for version in VERSIONS:
            check_web(lab, version)
            check_echo(lab, version)
            check_priority_tag(lab, version)
            if forward.encapsulates:
                check_web(lab, version, 8080)
                check_echo(lab, version, RANGE[0])
                check_priority_tag(lab, version, RANGE[0])
            else:
                check_ports(lab, version)
            if forward is Forward.NAT:
                check_web(lab, version, 81)
        for counted in balancer.stats()["services"]:
            assert counted["packets"] > ATTEMPTS
            assert counted["packets"] == sum(backend["packets"] for backend in counted["backends"])
            assert set(counted["drops"].values()) == {0}
            if counted["name"].startswith("web"):
                assert counted["new_flows"] == ATTEMPTS + 2


@pytest.mark.parametrize("forward", [Forward.NAT, Forward.IPIP])
def test_generic_mode_balances_too_and_leaves_aggregation_as_it_was(lab: Laboratory, forward: Forward) -> None:
    lab.prepare(forward)
    for name in lab.gateway.interfaces:
        lab.gateway.shell(f"ethtool -K {name} gro on")
    try:
        with balancing(lab, *services_of(lab, forward), options=["--mode", "generic"]) as balancer:
            assert {balancer.attached()[name]["mode"] for name in lab.gateway.interfaces} == {2}
            for name in lab.gateway.interfaces:
                assert "generic-receive-offload: off" in lab.gateway.shell(f"ethtool -k {name}")
            for version in VERSIONS:
                check_web(lab, version)
                check_echo(lab, version)
        for name in lab.gateway.interfaces:
            assert "generic-receive-offload: on" in lab.gateway.shell(f"ethtool -k {name}")
    finally:
        for name in lab.gateway.interfaces:
            lab.gateway.shell(f"ethtool -K {name} gro off")


@pytest.mark.usefixtures("able", "bpf_able")
@pytest.mark.parametrize("shape", Shape)
def test_a_client_behind_a_router_is_served_through_nat(shape: Shape) -> None:
    with Laboratory(shape, backends=2, routed_client=True) as lab:
        lab.prepare(Forward.NAT)
        for host in lab.backends:
            WebServer(host).start()
        services = [service(f"web-{v}", at(VIP[v], 80), backends_of(lab, v)) for v in VERSIONS]
        with balancing(lab, *services):
            for version in VERSIONS:
                check_web(lab, version)
