"""Packets beside plain requests: large ones, fragments, ICMP, and those that go past the service to a backend."""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from stage import (
    FAST_CHECK,
    VIP,
    Balancer,
    ask_udp,
    ask_udp_many,
    at,
    backends_of,
    balancing,
    family_of,
    fetch,
    fetch_many,
    service,
    start_decapsulation,
)

from xdplb.lab.laboratory import BIG_BYTES, Laboratory, Shape, UdpEcho, WebServer
from xdplb.model import Address, Forward

ECHO, MOVED = 5300, 5400
VERSIONS = (4, 6)
ALL = {"backend1", "backend2", "backend3"}

SINK = """
import socket, sys
server = socket.create_server(("", int(sys.argv[1])), family=socket.AF_INET6, dualstack_ipv6=True)
print("ready", flush=True)
while True:
    connection, _ = server.accept()
    received = 0
    while piece := connection.recv(1 << 16):
        received += len(piece)
    connection.sendall(b"%d" % received)
    connection.close()
"""
"""Takes an upload until its end, and says how many bytes it was."""

LISTENER = """
import socket, sys
server = socket.create_server((sys.argv[1], 6400), family=int(sys.argv[2]))
print("ready", flush=True)
connection, _ = server.accept()
connection.sendall(b"the gateway itself")
"""
"""Takes one connection at one address."""

SPEAKER = """
import errno, socket, sys
family, port = (socket.AF_INET, socket.AF_INET6)[sys.argv[1] == "6"], int(sys.argv[2])
server = socket.socket(family, socket.SOCK_DGRAM)
server.bind(("", port))
print("ready", flush=True)
_, client = server.recvfrom(2048)
server.connect(client)
server.settimeout(5)
server.send(b"answer")
try:
    while True:
        server.recv(2048)
        server.send(b"answer")
except OSError as error:
    print(errno.errorcode.get(error.errno, "timeout"), flush=True)
"""
"""Answers until an ICMP error says that nobody listens any more."""


def serve(lab: Laboratory) -> None:
    for host in lab.backends:
        WebServer(host).start()
        UdpEcho(host, ECHO).start()
        UdpEcho(host, MOVED).start()
        host.popen([sys.executable, "-c", SINK, "9000"]).wait_for_line("ready")


@pytest.fixture(scope="module")
def lab(able: None, bpf_able: None) -> Iterator[Laboratory]:
    with Laboratory(Shape.TWO_ARMED) as laboratory:
        laboratory.prepare(Forward.NAT)
        serve(laboratory)
        yield laboratory


def udp_check() -> dict[str, Any]:
    """For what does not speak HTTP itself: its host's web server is asked."""
    return {**FAST_CHECK, "port": 80}


@pytest.fixture(scope="module")
def balancer(lab: Laboratory) -> Iterator[Balancer]:
    services = []
    for version in VERSIONS:
        backends = backends_of(lab, version)
        moved = [{**backend, "address": at(backend["address"], MOVED)} for backend in backends]
        services += [
            service(f"web{version}", at(VIP[version], 80), backends),
            service(f"echo{version}", at(VIP[version], f"{ECHO}/udp"), backends, check=udp_check()),
            service(f"moved{version}", at(VIP[version], "53/udp"), moved, check=udp_check()),
            service(f"sink{version}", at(VIP[version], 9000), backends, check=udp_check()),
            service(f"speak{version}", at(VIP[version], "6000/udp"), backends[:1], check=udp_check()),
        ]
    with balancing(lab, *services) as running:
        yield running


def upload(lab: Laboratory, version: int, size: int = BIG_BYTES) -> int:
    with lab.client.socket(family_of(VIP[version]), socket.SOCK_STREAM) as connection:
        connection.settimeout(5)
        connection.connect((str(VIP[version]), 9000))
        connection.sendall(bytes(size))
        connection.shutdown(socket.SHUT_WR)
        return int(connection.recv(100))


@pytest.mark.parametrize("version", VERSIONS)
def test_uploads(lab: Laboratory, balancer: Balancer, version: int) -> None:
    assert upload(lab, version) == BIG_BYTES


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("port", [ECHO, 53])
@pytest.mark.parametrize("size", [1473, 4000, 20_000])
def test_datagrams_in_fragments(lab: Laboratory, balancer: Balancer, version: int, port: int, size: int) -> None:
    """There and back: the echo's answer comes in fragments too."""
    payload = bytes(n % 251 for n in range(size))
    answered = set()
    for _ in range(25):  # that one backend gets them all has a chance of 1 in 280 billion
        name, _, echoed = ask_udp(lab.client, VIP[version], port, payload).partition(b":")
        assert echoed == payload
        answered.add(name.decode())
    assert len(answered) > 1


def ask_past_services(lab: Laboratory, backend: Address, port: int) -> bytes:
    """From a port that may be one of a flow to a service: the second flow is refused then, and comes from another."""
    for _ in range(3):
        with contextlib.suppress(ConnectionRefusedError):
            return ask_udp(lab.client, backend, port)
    raise AssertionError("three ports in turn are in use")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_client_that_talks_to_a_backend_itself(lab: Laboratory, balancer: Balancer, version: int) -> None:
    """Before, while and after it uses the service, by TCP and UDP, and from one and the same socket too."""
    backend = lab.backends[0]
    direct, vip = backend.address(version), VIP[version]
    for _ in range(3):
        assert fetch(lab.client, direct, 80) == backend.name
        assert ask_past_services(lab, direct, ECHO) == b"backend1:ping"
        assert ask_past_services(lab, direct, MOVED) == b"backend1:ping"
        assert fetch_many(lab.client, vip, 80) == ALL
        assert ask_udp_many(lab.client, vip, ECHO) == ALL
        assert ask_udp_many(lab.client, vip, 53) == ALL
    with lab.client.socket(family_of(vip), socket.SOCK_DGRAM) as both:
        both.settimeout(2)
        for address in (direct, vip, direct, vip, direct):
            both.sendto(b"whom?", (str(address), ECHO))
            name, source = both.recvfrom(2048)
            assert source[:2] == (str(address), ECHO)
            assert address == vip or name == b"backend1:whom?"
    assert set(balancer.states(f"web{version}").values()) == {"up"}


@pytest.mark.parametrize("version", VERSIONS)
def test_the_gateway_itself_talks_to_backends(lab: Laboratory, balancer: Balancer, version: int) -> None:
    for host in lab.backends:
        assert fetch(lab.gateway, host.address(version), 80) == host.name
        assert ask_udp(lab.gateway, host.address(version), ECHO).decode() == f"{host.name}:ping"


@pytest.mark.parametrize("version", VERSIONS)
def test_ping(lab: Laboratory, balancer: Balancer, version: int) -> None:
    assert lab.client.ping(VIP[version]) < 2
    assert lab.client.ping(lab.backends[0].address(version)) < 2


@pytest.mark.parametrize("version", VERSIONS)
def test_a_packet_that_may_not_travel_further(lab: Laboratory, balancer: Balancer, version: int) -> None:
    """As traceroute sends them: the gateway's kernel answers, for the address is its own; the flow goes on unharmed."""
    with lab.client.socket(family_of(VIP[version]), socket.SOCK_DGRAM) as probe:
        level, option = (
            (socket.IPPROTO_IP, socket.IP_TTL) if version == 4 else (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS)
        )
        probe.settimeout(2)
        probe.connect((str(VIP[version]), ECHO))
        probe.setsockopt(level, option, 1)
        probe.send(b"how far?")
        with pytest.raises(ConnectionRefusedError):
            probe.recv(100)
        probe.setsockopt(level, option, 3)
        probe.send(b"ping")
        assert probe.recv(100).endswith(b":ping")


@pytest.mark.parametrize("version", VERSIONS)
def test_an_icmp_error_reaches_the_backend_of_its_flow(lab: Laboratory, balancer: Balancer, version: int) -> None:
    speaker = lab.backends[0].popen([sys.executable, "-c", SPEAKER, str(version), "6000"])
    speaker.wait_for_line("ready")
    with lab.client.socket(family_of(VIP[version]), socket.SOCK_DGRAM) as question:
        question.settimeout(2)
        question.connect((str(VIP[version]), 6000))
        question.send(b"speak")
        assert question.recv(100) == b"answer"
        port = question.getsockname()[1]
    with lab.client.socket(family_of(VIP[version]), socket.SOCK_RAW, socket.IPPROTO_UDP) as raw:
        # The socket is closed; this makes the backend answer once more, to a port where nobody listens any more.
        header = struct.pack("!HHHH", port, 6000, 12, 0)
        if version == 6:
            raw.setsockopt(socket.IPPROTO_IPV6, 7, 6)  # IPV6_CHECKSUM: the kernel fills it in
        raw.sendto(header + b"more", (str(VIP[version]), 0))
    assert speaker.wait() == 0
    assert "ECONNREFUSED" in speaker.log()


@pytest.mark.parametrize("version", VERSIONS)
def test_the_gateway_is_no_client_of_its_own_services(lab: Laboratory, balancer: Balancer, version: int) -> None:
    """Its kernel takes the service's address for its own: what it sends there meets no interface, and so no XDP."""
    with pytest.raises(ConnectionRefusedError):
        fetch(lab.gateway, VIP[version], 80)
    with pytest.raises(ConnectionRefusedError):
        ask_udp(lab.gateway, VIP[version], ECHO)
    backend = backends_of(lab, version)[0]
    assert fetch(lab.gateway, backend["address"], 80) == backend["name"], "it reaches the backends themselves"
    own = [sys.executable, "-c", LISTENER, str(VIP[version]), str(int(family_of(VIP[version])))]
    lab.gateway.popen(own).wait_for_line("ready")
    with lab.gateway.socket(family_of(VIP[version]), socket.SOCK_STREAM) as connection:
        connection.settimeout(2)
        connection.connect((str(VIP[version]), 6400))
        assert connection.recv(100) == b"the gateway itself"


@pytest.mark.usefixtures("able", "bpf_able")
@pytest.mark.parametrize("forward", [Forward.IPIP, Forward.GUE])
def test_tunnels_over_a_way_without_room_for_their_headers(forward: Forward) -> None:
    """The sender is told by "too big", and sends smaller packets; what fits is not touched."""
    with Laboratory(Shape.TWO_ARMED) as lab:
        lab.prepare(forward)
        serve(lab)
        start_decapsulation(lab)
        services = []
        for version in VERSIONS:
            some = backends_of(lab, version)
            more = {"forward": str(forward), "check": udp_check()}
            services.append(service(f"sink{version}", at(VIP[version], 9000), some, **more))
            services.append(service(f"echo{version}", at(VIP[version], f"{ECHO}/udp"), some, **more))
        with balancing(lab, *services) as balancer:
            for version in VERSIONS:
                assert upload(lab, version) == BIG_BYTES
                assert balancer.service_stats(f"sink{version}")["drops"]["too_big"] > 0
                with lab.client.socket(family_of(VIP[version]), socket.SOCK_DGRAM) as question:
                    question.settimeout(2)
                    question.connect((str(VIP[version]), ECHO))
                    question.send(b"ping")
                    assert question.recv(100).endswith(b":ping")
                route = lab.client.shell(f"ip route get {VIP[version]}")
                assert "mtu" in route
