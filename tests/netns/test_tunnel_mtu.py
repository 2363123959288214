"""Tunnels whose way carries less than the gateway's interface says: a router on it tells, and uploads go on."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from stage import NO_CHECK, VIP, Balancer, at, decapsulation_command, family_of, service

from xdplb.lab.laboratory import Laboratory, Shape, await_until
from xdplb.model import Forward

SIZE = 300_000
NARROW = 1400
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

WAYS = {
    "ipip4in4": (Forward.IPIP, 4, "198.18.0.1", 9001),
    "ipip6in6": (Forward.IPIP, 6, "2001:db8:77::1", 9002),
    "gue4in6": (Forward.GUE, 4, "2001:db8:77::2", 9003),
    "gue6in4": (Forward.GUE, 6, "198.18.0.2", 9004),
}
"""Mode, the clients' family, the address of the tunnel's other end, and the service's port."""


@pytest.fixture(scope="module")
def lab(able: None, bpf_able: None) -> Iterator[Laboratory]:
    """backend2 has the tunnels' ends, behind backend1, which is a router onto a narrow way."""
    with Laboratory(Shape.TWO_ARMED, backends=2, backend_mtu=1600) as lab:
        lab.prepare(Forward.IPIP)
        router, end = lab.backends
        for version, family in ((4, "-4"), (6, "-6")):
            width = 32 if version == 4 else 128
            for _, _, address, _ in WAYS.values():
                if (":" in address) == (version == 6):
                    lab.gateway.shell(f"ip {family} route add {address}/{width} via {router.address(version)}")
                    narrow = f"via {end.address(version)} mtu lock {NARROW}"
                    router.shell(f"ip {family} route add {address}/{width} {narrow}")
                    end.shell(f"ip {family} address add {address}/{width} dev lo")
        router.shell("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1")
        router.shell("sysctl -qw net.ipv4.conf.all.send_redirects=0 net.ipv4.conf.eth0.send_redirects=0")
        for *_, port in WAYS.values():
            end.popen([sys.executable, "-c", SINK, str(port)]).wait_for_line("ready")
        command, env = decapsulation_command(lab, end)
        end.popen(command, env=env).wait_for_line("decapsulating", timeout_s=30)
        yield lab


def services() -> list[dict[str, Any]]:
    return [
        service(
            name,
            at(VIP[version], port),
            [{"name": "far", "address": address}],
            forward=str(forward),
            check=NO_CHECK,
        )
        for name, (forward, version, address, port) in WAYS.items()
    ]


def upload(lab: Laboratory, version: int, port: int) -> int:
    with lab.client.socket(family_of(VIP[version]), socket.SOCK_STREAM) as connection:
        connection.settimeout(10)
        connection.connect((str(VIP[version]), port))
        connection.sendall(bytes(SIZE))
        connection.shutdown(socket.SHUT_WR)
        return int(connection.recv(100))


def test_uploads_go_on_where_a_router_reports_what_it_carries(lab: Laboratory) -> None:
    balancer = Balancer(lab)
    balancer.up(*services())
    try:
        for name, (_, version, _, port) in WAYS.items():
            lab.client.shell("ip -4 route flush cache; ip -6 route flush cache")
            assert upload(lab, version, port) == SIZE
            await_until(lambda name=name: balancer.backend(name, "far").get("path_mtu") == NARROW, "it has learned")
        assert "its tunnel carries 1400 bytes" in balancer.cli("status").stdout.replace("\n", " ")
        balancer.kill()
        balancer.up()
        learned = {name: balancer.backend(name, "far").get("path_mtu") for name in WAYS}
        await_until(
            lambda: {balancer.backend(name, "far").get("path_mtu") for name in WAYS} == {NARROW},
            f"the next daemon knows: {learned}",
        )
    finally:
        balancer.process.send_signal(signal.SIGINT)
        balancer.process.wait(10)
