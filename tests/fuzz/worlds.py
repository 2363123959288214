"""The gateways that are fuzzed: what they serve, by name. `all` has everything; the others are specialised to less."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from ipaddress import ip_address

from xdplb.model import (
    Affinity,
    Backend,
    Check,
    CheckType,
    Config,
    FlowMemory,
    Forward,
    Listen,
    OnAllDown,
    OnDown,
    Protocol,
    Scheduler,
    Service,
)

SOURCES = ("10.0.1.200", "10.0.1.201", "fd00:1::c8")
"""What full NAT sends from."""
VIPS = {4: "203.0.113.{}", 6: "2001:db8:a::{}"}
BACKENDS = {4: "10.0.{}.{}", 6: "fd00:{}::{}"}
SMALL = "small"
"""In a service's name: the way to its backends is narrow."""
KERNEL = "kernel"
"""In a service's name: XDP cannot send to its backends."""


def service(
    name: str,
    version: int,
    number: int,
    forward: Forward,
    ports: str = "80/tcp",
    backends: int = 1,
    port: int | None = None,
    outer: int | None = None,
    network: int | None = None,
    **settings: object,
) -> Service:
    """Listens on the address of that number. Its backends a, b, c … are in the network of that number, or another."""
    span, protocol = ports.split("/")
    first, _, last = span.partition("-")
    low, high = (0, 65535) if span == "0" else (int(first), int(last or first))
    listen = Listen(ip_address(VIPS[version].format(number)), low, high, Protocol(protocol))
    pool = tuple(
        Backend(
            chr(ord("a") + n), ip_address(BACKENDS[outer or version].format(network or number, n + 1)), port, 1 + n % 3
        )
        for n in range(backends)
    )
    plain = Service(f"{name}{version} {ports}", listen, forward, Scheduler.MAGLEV, Check(CheckType.NONE), pool)
    return replace(plain, **settings)  # type: ignore[arg-type]


def nat() -> Iterator[Service]:
    for v in (4, 6):
        yield service("nat", v, 1, Forward.NAT, "80/tcp", port=8080)
        yield service("nat", v, 1, Forward.NAT, "53/udp", port=5353)
        yield service("nat", v, 1, Forward.NAT, "8000-8009/tcp", network=21)
        yield service("nat small", v, 1, Forward.NAT, "90/udp", network=22)
        yield service("nat pool", v, 2, Forward.NAT, "80/tcp", 3, port=8080)
        yield service("nat pool", v, 2, Forward.NAT, "53/udp", 3)
        yield service("nat any", v, 3, Forward.NAT, "0/udp")
        yield service("shared one", v, 4, Forward.NAT, "80/tcp", port=8080)
        yield service("shared two", v, 5, Forward.NAT, "80/tcp", port=8080, network=4)
        yield service("nat down", v, 6, Forward.NAT, "80/tcp", port=8080)


def dsr() -> Iterator[Service]:
    for v in (4, 6):
        yield service("dsr", v, 31, Forward.DSR, "80/tcp", 3)
        yield service("dsr", v, 31, Forward.DSR, "53/udp", 3)
        yield service("dsr small", v, 31, Forward.DSR, "90/udp", network=51)
        yield service("all", v, 32, Forward.DSR, "0/tcp", network=52)
        yield service("some", v, 32, Forward.DSR, "400-500/tcp", network=53)
        yield service("one", v, 32, Forward.DSR, "443/tcp", network=54)
        yield service("down", v, 33, Forward.DSR, "80/tcp")
        yield service("down", v, 33, Forward.DSR, "53/udp")
        yield service("down open", v, 34, Forward.DSR, "80/tcp", on_all_down=OnAllDown.FAIL_OPEN)
        yield service("source", v, 35, Forward.DSR, "80/tcp", 3, scheduler=Scheduler.SOURCE_HASH)
        yield service("keep", v, 36, Forward.DSR, "80/tcp", 3, on_down=OnDown.KEEP)
        yield service("none", v, 37, Forward.DSR, "53/udp", 3, flows=FlowMemory.NONE)
        yield service("every", v, 38, Forward.DSR, "80/tcp", 2, flows=FlowMemory.ALL)


def tunnels() -> Iterator[Service]:
    number = 60
    for forward in (Forward.IPIP, Forward.GUE):
        for v in (4, 6):
            for outer in (4, 6):
                number += 1
                name = f"{forward} in{outer} "
                yield service(name, v, number, forward, "80/tcp", 2, outer=outer)
                yield service(name, v, number, forward, "53/udp", 2, outer=outer)
                yield service(name + SMALL, v, number, forward, "90/udp", outer=outer, network=number + 10)


def full_nat() -> Iterator[Service]:
    for v in (4, 6):
        yield service("full", v, 101, Forward.FULL_NAT, "80/tcp", 2, port=8080)
        yield service("full", v, 101, Forward.FULL_NAT, "53/udp", 2)
        yield service("full", v, 102, Forward.FULL_NAT, "1000-1009/tcp", 2)
        yield service("full small", v, 102, Forward.FULL_NAT, "90/udp", network=103)
        yield service("full rr", v, 104, Forward.FULL_NAT, "80/tcp", 2, scheduler=Scheduler.RR)
        yield service("full down", v, 105, Forward.FULL_NAT, "80/tcp")


def counting() -> Iterator[Service]:
    for v in (4, 6):
        yield service("rr", v, 121, Forward.DSR, "80/tcp", 3, scheduler=Scheduler.RR)
        yield service("rr", v, 121, Forward.DSR, "53/udp", 3, scheduler=Scheduler.RR)
        yield service("wlc", v, 122, Forward.DSR, "80/tcp", 3, scheduler=Scheduler.WLC)
        yield service("p2c", v, 123, Forward.DSR, "80/tcp", 3, scheduler=Scheduler.P2C)
        yield service("p2c", v, 123, Forward.DSR, "53/udp", 3, scheduler=Scheduler.P2C)
        yield service("lc keep", v, 124, Forward.DSR, "80/tcp", 3, scheduler=Scheduler.LC, on_down=OnDown.KEEP)
        yield service("rr down", v, 125, Forward.DSR, "80/tcp", scheduler=Scheduler.RR)


def affinity() -> Iterator[Service]:
    clients = Affinity(28, 120)
    for v in (4, 6):
        yield service("client", v, 141, Forward.DSR, "80/tcp", 3, affinity=clients)
        yield service("client lc", v, 142, Forward.DSR, "80/tcp", 3, affinity=clients, scheduler=Scheduler.LC)


def full_nat_remembering() -> Iterator[Service]:
    """Where flows and clients are remembered beside the mappings."""
    for v in (4, 6):
        yield service("full lc", v, 161, Forward.FULL_NAT, "80/tcp", 3, scheduler=Scheduler.LC, on_down=OnDown.KEEP)
        yield service("full p2c", v, 162, Forward.FULL_NAT, "80/tcp", 3, scheduler=Scheduler.P2C)
        yield service("full p2c", v, 162, Forward.FULL_NAT, "53/udp", 3, scheduler=Scheduler.P2C)
        yield service("full client", v, 163, Forward.FULL_NAT, "80/tcp", 3, affinity=Affinity(28, 120))
        yield service(
            "full client rr", v, 164, Forward.FULL_NAT, "80/tcp", 3, affinity=Affinity(28, 120), scheduler=Scheduler.RR
        )
        yield service("full none", v, 165, Forward.FULL_NAT, "80/tcp", 3, flows=FlowMemory.NONE)
        yield service("full every", v, 166, Forward.FULL_NAT, "80/tcp", 3, flows=FlowMemory.ALL)
        yield service("full source", v, 167, Forward.FULL_NAT, "80/tcp", 3, scheduler=Scheduler.SOURCE_HASH)


def by_kernel() -> Iterator[Service]:
    for v in (4, 6):
        yield service(f"nat {KERNEL}", v, 181, Forward.NAT, "80/tcp", 2, port=8080)
        yield service(f"nat {KERNEL} {SMALL}", v, 181, Forward.NAT, "90/udp", network=182)
        yield service(f"shared {KERNEL} one", v, 183, Forward.NAT, "80/tcp", port=8080)
        yield service(f"shared {KERNEL} two", v, 184, Forward.NAT, "80/tcp", port=8080, network=183)
        yield service(f"full {KERNEL}", v, 185, Forward.FULL_NAT, "80/tcp", 2, port=8080)
        yield service(f"full {KERNEL} {SMALL}", v, 185, Forward.FULL_NAT, "90/udp", network=186)
        yield service(f"ipip {KERNEL}", v, 187, Forward.IPIP, "80/tcp", 2)
        yield service(f"ipip {KERNEL} {SMALL}", v, 187, Forward.IPIP, "90/udp", outer=10 - v, network=188)
        yield service(f"gue {KERNEL}", v, 189, Forward.GUE, "53/udp", 2, outer=10 - v)
        yield service(f"gue {KERNEL} {SMALL}", v, 189, Forward.GUE, "90/udp", network=190)


PARTS: Mapping[str, tuple[Callable[[], Iterator[Service]], ...]] = {
    "all": (nat, dsr, tunnels, full_nat, counting, affinity, full_nat_remembering, by_kernel),
    "nat": (nat,),
    "dsr": (dsr,),
    "tunnels": (tunnels,),
    "full-nat": (full_nat, full_nat_remembering),
    "by-kernel": (by_kernel,),
    "counting": (counting, affinity),
}


def config(name: str) -> Config:
    services = tuple(service for part in PARTS[name] for service in part())
    has_full_nat = any(service.forward is Forward.FULL_NAT for service in services)
    return Config(("front", "back"), services, source_pool=tuple(map(ip_address, SOURCES)) if has_full_nat else ())
