"""Strangers who send what they like in a client's name: its connections stay open (RFC 5961, section 4)."""

from __future__ import annotations

import random
import socket
import struct
from contextlib import ExitStack
from ipaddress import IPv4Address, IPv6Address

import pytest
from crowd import Crowd
from stage import NO_CHECK, VIP, at, backends_of, balancing, service, web_laboratory

from xdplb.lab.laboratory import Laboratory, Shape
from xdplb.model import Scheduler

SYNS = {"plain": 0x02, "offering ECN": 0xC2, "urgent": 0x22}
"""TCP flags; the last one means nothing in a SYN."""
CONNECTIONS = 40


lab = web_laboratory(Shape.ONE_ARMED)


def segment(source: IPv4Address | IPv6Address, port: int, to: IPv4Address | IPv6Address, flags: int) -> bytes:
    """A TCP header with any sequence number, and a right checksum."""
    header = struct.pack("!HHIIBBHHH", port, 80, random.getrandbits(32), 0, 5 << 4, flags, 64240, 0, 0)
    pseudo = source.packed + to.packed + struct.pack("!HH", socket.IPPROTO_TCP, len(header))
    words = sum(struct.unpack(f"!{len(pseudo + header) // 2}H", pseudo + header))
    checksum = ~(words % 0xFFFF) & 0xFFFF
    return header[:16] + struct.pack("!H", checksum) + header[18:]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("scheduler", [Scheduler.RR, Scheduler.MAGLEV])
def test_a_syn_breaks_no_open_connection(lab: Laboratory, version: int, scheduler: Scheduler) -> None:
    web = service("web", at(VIP[version], 80), backends_of(lab, version), check=NO_CHECK, scheduler=str(scheduler))
    with balancing(lab, web) as balancer, ExitStack() as stack:
        crowd = Crowd(lab.client, VIP[version], CONNECTIONS, stack)
        balancer.cli("backend", "drain", "web/backend1")
        crowd.unchanged()
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        with lab.client.socket(family, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
            for flags in SYNS.values():
                for connection in crowd.active:
                    port = int(connection.source.rpartition(":")[2])
                    syn = segment(lab.client.address(version), port, VIP[version], flags)
                    raw.sendto(syn, (str(VIP[version]), 0))
                crowd.unchanged()
