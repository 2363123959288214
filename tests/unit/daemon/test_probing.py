"""Checks through services' addresses: which port stands for which backend, and when such a check can have an answer."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address
from typing import Any

import numpy as np
from edges import BACKEND_MAC, FRONT, TCP, config, service

from xdplb.abi import FIRST_PROBE_PORT, MAX_PROBES, ForwardCode
from xdplb.checks.endpoint import Via
from xdplb.checks.targets import targets
from xdplb.core.address_table import address_words
from xdplb.core.status import NextHop
from xdplb.daemon.probe_link import Ends
from xdplb.daemon.probing import Probing
from xdplb.model import Backend, BackendKey, CheckVia, Config, Forward

BY_VIP = replace(TCP, via=CheckVia.VIP)
VIP = IPv4Address("203.0.113.1")
ADDRESS = [("hi", "u8"), ("lo", "u8")]
SERVICE = [("address", ADDRESS), ("gue_port", "u2"), ("forward", "u1")]
BACKEND = [
    *(("address", ADDRESS), ("source", ADDRESS), ("source_spread", "u4"), ("ifindex", "u4")),
    *(("macs", "u1", 12), ("mtu", "u2"), ("flags", "u1")),
]
WAY: Any = [("service", SERVICE), ("backend", BACKEND), ("macs", "u1", 12), ("ifindex", "u4")]
ENDS = Ends(replace(FRONT, index=8, mac=b"inside"), replace(FRONT, index=9, mac=b"outsid"))


class Plane:
    def __init__(self) -> None:
        self.probe_ways = np.zeros(MAX_PROBES, WAY)


def ports(probing: Probing, wanted: Config) -> dict[str, int | None]:
    found = targets(wanted, probing.way)
    probing.keep([target.via for target in found.values() if target.via])
    return {key.backend: target.via.source_port if target.via else None for key, target in found.items()}


def test_a_port_is_a_backends_over_reloads_and_then_free() -> None:
    probing, first = Probing("xdplb-p2"), FIRST_PROBE_PORT
    assert ports(probing, config(service("a", "b", check=BY_VIP))) == {"a": first, "b": first + 1}
    a, b = service("a", "b", check=BY_VIP).backends
    assert ports(probing, config(service(check=BY_VIP, backends=(b,)))) == {"b": first + 1}
    assert ports(probing, config(service(check=BY_VIP, backends=(b, a)))) == {"b": first + 1, "a": first}


def test_checks_of_modes_that_translate_and_others_go_to_the_backend() -> None:
    probing = Probing("xdplb-p2")
    for mode in (Forward.NAT, Forward.FULL_NAT):
        assert ports(probing, config(service("a", check=BY_VIP, forward=mode))) == {"a": None}
    assert ports(probing, config(service("a"))) == {"a": None}


def test_the_check_connects_to_the_service_and_is_found_by_the_backends_address() -> None:
    found = targets(config(service("a", check=BY_VIP)), Probing("xdplb-p2").way)
    endpoint = found[BackendKey("web", "a")].endpoint
    assert endpoint.via == Via(VIP, "xdplb-p2", FIRST_PROBE_PORT)
    assert (endpoint.socket_address, str(endpoint.address)) == ((str(VIP), 80), "10.0.0.1")


def test_there_is_an_answer_only_once_packets_meet_the_program() -> None:
    probing, wanted = Probing("xdplb-p2"), config(service("a", check=BY_VIP))
    via = targets(wanted, probing.way)[BackendKey("web", "a")].via
    plane: Any = Plane()
    assert probing.leads(None) and not probing.leads(via)
    probing.begin(plane, None, wanted)
    assert not probing.leads(via)
    probing.begin(plane, ENDS, wanted)
    assert probing.leads(via)


def test_the_way_is_that_of_the_service_and_goes_with_the_next_hop() -> None:
    probing, wanted = Probing("xdplb-p2"), config(service("a", check=BY_VIP, forward=Forward.IPIP))
    plane: Any = Plane()
    ports(probing, wanted)
    plane.probe_ways["service"]["address"]["lo"] = 7  # of an earlier daemon
    probing.begin(plane, ENDS, wanted)
    assert plane.probe_ways["service"]["address"]["lo"].nonzero()[0].tolist() == [0]
    probing.put(FIRST_PROBE_PORT, NextHop(2, FRONT.mac, BACKEND_MAC, IPv4Address("10.0.0.254"), 1500))
    way = plane.probe_ways[0]
    assert tuple(way["service"]["address"]) == address_words(VIP)
    assert way["service"]["forward"] == ForwardCode.IPIP
    assert tuple(way["backend"]["source"]) == address_words(IPv4Address("10.0.0.254"))
    assert (way["backend"]["macs"].tobytes(), way["backend"]["ifindex"]) == (BACKEND_MAC + FRONT.mac, 2)
    assert (way["macs"].tobytes(), way["ifindex"]) == (b"insideoutsid", 9)
    probing.put(FIRST_PROBE_PORT, None)
    assert tuple(way["service"]["address"]) == (0, 0)


def test_a_backend_too_many_is_checked_directly() -> None:
    probing = Probing("xdplb-p2")
    one = service("a", check=BY_VIP)
    crowd = tuple(Backend(f"b{n}", one.backends[0].address + n, None) for n in range(MAX_PROBES + 1))
    found = ports(probing, config(replace(one, backends=crowd)))
    assert found[f"b{MAX_PROBES - 1}"] == 65535 and found[f"b{MAX_PROBES}"] is None
