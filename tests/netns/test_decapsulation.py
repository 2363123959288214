"""What `xdplb decap` makes of a host whose own addresses and networks change."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from ipaddress import ip_address

import pytest
import reference
from stage import decapsulation_command

from xdplb.lab.hosts import Host
from xdplb.lab.laboratory import Laboratory, Shape
from xdplb.model import Forward

ADDRESS, WITHIN, ELSEWHERE = "198.18.0.1", "198.19.7.7", "198.51.100.9"


@pytest.fixture
def lab(able: None, bpf_able: None) -> Iterator[Laboratory]:
    with Laboratory(Shape.TWO_ARMED) as laboratory:
        laboratory.prepare(Forward.NAT)
        yield laboratory


def datagram(source: str, destination: str) -> bytes:
    body = struct.pack(">HHHH", 40000, 9999, 16, 0) + b"question"
    addresses = ip_address(source).packed + ip_address(destination).packed
    header = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0, 64, reference.UDP, 0) + addresses
    check = reference.checksum(header).to_bytes(2, "big")
    return header[:10] + check + header[12:] + body


def arrives(lab: Laboratory, host: Host, destination: str, within_s: float) -> bool:
    """Sends it in a tunnel, again and again, until it is there."""
    gateway, backend = str(lab.gateway.address(4, "eth1")), str(host.address4)
    with (
        host.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
        lab.gateway.socket(socket.AF_INET, socket.SOCK_RAW, reference.IPIP) as sender,
    ):
        receiver.bind(("0.0.0.0", 9999))
        receiver.settimeout(0.05)
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            sender.sendto(datagram(gateway, destination), (backend, 0))
            try:
                return receiver.recv(100) == b"question"
            except TimeoutError:
                continue
    return False


def test_what_becomes_local_is_taken_out_of_tunnels_and_nothing_else(lab: Laboratory) -> None:
    host = lab.backends[0]
    command, env = decapsulation_command(lab, host)
    process = host.popen(command, env=env)
    process.wait_for_line("decapsulating", timeout_s=30)
    process.wait_for_line("taken from anybody; name the gateways: --from PREFIX")
    assert not arrives(lab, host, ADDRESS, 0.1)
    host.shell(f"ip address add {ADDRESS}/32 dev lo")
    assert arrives(lab, host, ADDRESS, 5)
    host.shell("ip route add local 198.18.0.0/15 dev lo")
    assert arrives(lab, host, WITHIN, 5)
    host.shell(f"ip route del local 198.18.0.0/15 dev lo; ip address del {ADDRESS}/32 dev lo")
    assert not arrives(lab, host, ELSEWHERE, 0.1)
    assert process.stop() == 0
    assert "not_local 0" not in process.log()
