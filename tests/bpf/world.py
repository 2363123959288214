"""The gateway that the tests send packets through: interfaces, services, one dataplane, and how cases are run on it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path

import numpy as np
import reference
from packets import (
    BACK_MAC,
    BACKEND_MAC,
    BEHIND_ROUTER,
    CLIENT,
    CLIENT_MAC,
    FRONT_MAC,
    ROUTER,
    ROUTER_MAC,
    Build,
    Case,
    Flow,
    Packet,
    Raw,
    Verdict,
    frame,
    network,
    raw,
    udp,
)
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6

from xdplb import abi
from xdplb.core.hash_key import HashKey
from xdplb.core.operations import Applied
from xdplb.core.status import BackendStatus, NextHop, Statuses
from xdplb.daemon.engine import Engine, Retired
from xdplb.dataplane import loader, syscall
from xdplb.dataplane.loader import Dataplane
from xdplb.lab import remains
from xdplb.model import (
    Admin,
    Backend,
    BackendKey,
    Check,
    CheckType,
    Config,
    Forward,
    HealthState,
    Listen,
    OnAllDown,
    Protocol,
    Scheduler,
    Service,
)

KEY = HashKey.derive("tests")
HASH = reference.Hash(KEY.seed, KEY.factor)
OWN = {4: "10.0.1.254", 6: "fd00:1::fe"}
"""The gateway's address towards the backends."""
MTU = 1500
SMALL_MTU = 1300
GEOMETRY = abi.Geometry(services=256, backends=1024, slots=1 << 17, address_buckets=32, intervals=1024)
"""With so few buckets that not every address finds room in its first one."""
FEATURES = abi.Features(
    ipv4=True,
    ipv6=True,
    nat=True,
    dsr=True,
    ipip=True,
    gue=True,
    outer_ipv4=True,
    outer_ipv6=True,
    tx_by_redirect=False,
)
PREFIX = remains.new_prefix()
PIN_ROOT = remains.PINS / PREFIX

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Mode:
    """One way to deliver: a service address of one family and its only backend. NAT changes the port."""

    name: str
    forward: Forward
    vip: str
    backend: str
    nat_ports: Mapping[str, int]

    @property
    def version(self) -> int:
        return ip_address(self.vip).version

    @property
    def title(self) -> str:
        return self.name

    def service(self, protocol: str) -> str:
        return f"{self.name} {protocol}"

    def flow(self, protocol: str, **fields: object) -> Flow:
        """A client's flow to the service."""
        return Flow(**{"source": CLIENT[self.version], "destination": self.vip, "port": PORTS[protocol]} | fields)  # type: ignore[arg-type]

    def deliver(self, build: Build, flow: Flow, protocol: str, flow_hash: int) -> Packet:
        """The frame that the backend must get for the packet that `build` makes of `flow`."""
        flow = flow.hop()
        if self.forward is Forward.NAT:
            flow = self.translated(flow, protocol)
        packet: Packet | bytes = build(flow)
        if self.forward.encapsulates:
            packet = self.encapsulated(raw(packet), flow, flow_hash)
        return frame(packet, FRONT_MAC, BACKEND_MAC)

    def translated(self, flow: Flow, protocol: str) -> Flow:
        """The flow as a NAT backend sees it."""
        return Flow(
            **{name: getattr(flow, name) for name in flow.__dataclass_fields__}
            | {"destination": self.backend, "port": self.nat_ports[protocol]}
        )

    def encapsulated(self, inner: bytes, flow: Flow, flow_hash: int, source: str | None = None) -> Packet:
        outer_version = ip_address(self.backend).version
        protocol = reference.IPIP if flow.version == 4 else reference.IPV6
        header: Packet
        if outer_version == 4:
            header = IP(
                src=source or OWN[4], dst=self.backend, ttl=64, tos=flow.traffic_class, id=0, flags="DF", proto=protocol
            )
        else:
            label = reference.flow_label(flow_hash)
            header = IPv6(src=source or OWN[6], dst=self.backend, hlim=64, tc=flow.traffic_class, fl=label, nh=protocol)
        if self.forward is Forward.GUE:
            header.payload = UDP(sport=reference.gue_source_port(flow_hash), dport=6080, chksum=0)
            header.lastlayer().underlayer = header
            setattr(header, "proto" if outer_version == 4 else "nh", reference.UDP)
        return header / Raw(inner)


PORTS = {"tcp": 80, "udp": 53}
_NAT_PORTS = {"tcp": 8080, "udp": 5353}
MODES = (
    Mode("nat4", Forward.NAT, "203.0.113.1", "10.0.1.1", _NAT_PORTS),
    Mode("nat6", Forward.NAT, "2001:db8:a::1", "fd00:1::1", _NAT_PORTS),
    Mode("dsr4", Forward.DSR, "203.0.113.2", "10.0.1.2", {}),
    Mode("dsr6", Forward.DSR, "2001:db8:a::2", "fd00:1::2", {}),
    Mode("ipip 4in4", Forward.IPIP, "203.0.113.3", "10.0.1.3", {}),
    Mode("ipip 4in6", Forward.IPIP, "203.0.113.4", "fd00:1::4", {}),
    Mode("ipip 6in6", Forward.IPIP, "2001:db8:a::3", "fd00:1::3", {}),
    Mode("ipip 6in4", Forward.IPIP, "2001:db8:a::4", "10.0.1.4", {}),
    Mode("gue 4in4", Forward.GUE, "203.0.113.5", "10.0.1.5", {}),
    Mode("gue 4in6", Forward.GUE, "203.0.113.6", "fd00:1::6", {}),
    Mode("gue 6in6", Forward.GUE, "2001:db8:a::5", "fd00:1::5", {}),
    Mode("gue 6in4", Forward.GUE, "2001:db8:a::6", "10.0.1.6", {}),
)
NAT = {4: MODES[0], 6: MODES[1]}
DSR = {4: MODES[2], 6: MODES[3]}


def _listen(text: str) -> Listen:
    host, rest = text.rsplit(":", 1)
    ports, protocol = rest.split("/")
    first, _, last = ports.partition("-")
    low, high = (0, 65535) if ports == "0" else (int(first), int(last or first))
    return Listen(ip_address(host.strip("[]")), low, high, Protocol(protocol))


def _backend(text: str, name: str) -> Backend:
    address, _, weight = text.partition(" weight ")
    host, _, port = address.partition(",")
    return Backend(name, ip_address(host), int(port) if port else None, int(weight or 1))


def service(
    name: str,
    listen: str,
    forward: Forward,
    *backends: str,
    scheduler: Scheduler = Scheduler.MAGLEV,
    on_all_down: OnAllDown = OnAllDown.REJECT,
) -> Service:
    """Backends are written `ADDRESS[,PORT][ weight N]` and called a, b, c … ."""
    members = tuple(_backend(text, chr(ord("a") + i)) for i, text in enumerate(backends))
    return Service(name, _listen(listen), forward, scheduler, Check(CheckType.NONE), members, on_all_down)


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address


POOL = tuple(f"10.0.9.{i} weight {1 + i % 4}" for i in range(1, 12))
POOL6 = tuple(f"fd00:9::{i} weight {1 + i % 4}" for i in range(1, 12))
DOWN = ("203.0.113.8", "2001:db8:a::8")
SERVICES = (
    *(
        service(
            mode.service(protocol),
            f"{_host(mode.vip)}:{PORTS[protocol]}/{protocol}",
            mode.forward,
            mode.backend + (f",{mode.nat_ports[protocol]}" if mode.nat_ports else ""),
        )
        for mode in MODES
        for protocol in PORTS
    ),
    service("nat range", "203.0.113.1:8000-8009/tcp", Forward.NAT, "10.0.1.11"),
    service("nat any port", "203.0.113.14:0/udp", Forward.NAT, "10.0.1.12"),
    service("all ports", "203.0.113.7:0/tcp", Forward.DSR, "10.0.1.21"),
    service("some ports", "203.0.113.7:400-500/tcp", Forward.DSR, "10.0.1.22"),
    service("one port", "203.0.113.7:443/tcp", Forward.DSR, "10.0.1.23"),
    *(
        service(f"down {protocol} {_host(vip)}", f"{_host(vip)}:{port}/{protocol}", Forward.DSR, backend)
        for vip, backend in zip(DOWN, ("10.0.1.31", "fd00:1::31"), strict=True)
        for protocol, port in PORTS.items()
    ),
    service("open", "203.0.113.9:80/tcp", Forward.DSR, "10.0.1.32", on_all_down=OnAllDown.FAIL_OPEN),
    *(
        service(
            f"{mode.name} small",
            f"{_host(mode.vip)}:90/udp",
            mode.forward,
            mode.backend.replace("1.", "2.").replace("1::", "2::"),
        )
        for mode in MODES
    ),
    service("far", "203.0.113.11:80/tcp", Forward.DSR, "10.0.1.41"),
    service("shared one", "203.0.113.12:80/tcp", Forward.NAT, "10.0.1.51,8080"),
    service("shared two", "203.0.113.13:80/tcp", Forward.NAT, "10.0.1.51,8080"),
    *(
        service(f"direction {name} {protocol}", f"{_host(vip)}:{ports}/{protocol}", Forward.NAT, backend)
        for protocol, to in _NAT_PORTS.items()
        for name, vip, ports, backend in (
            ("one", "203.0.113.31", PORTS[protocol], f"10.0.1.61,{to}"),
            ("two", "203.0.113.32", PORTS[protocol], f"10.0.1.61,{to}"),
            ("port", "203.0.113.31", PORTS[protocol] + 1, f"10.0.1.61,{to}"),
            ("all", "203.0.113.33", 0, "10.0.1.61"),
            ("one v6", "2001:db8:a::31", PORTS[protocol], f"fd00:1::61,{to}"),
            ("two v6", "2001:db8:a::32", PORTS[protocol], f"fd00:1::61,{to}"),
            ("port v6", "2001:db8:a::31", PORTS[protocol] + 1, f"fd00:1::61,{to}"),
            ("all v6", "2001:db8:a::33", 0, "fd00:1::61"),
        )
    ),
    service("pool4", "203.0.113.20:80/tcp", Forward.DSR, *POOL),
    service("pool6", "[2001:db8:a::20]:80/tcp", Forward.DSR, *POOL6),
    service("by source", "203.0.113.21:80/tcp", Forward.DSR, *POOL, scheduler=Scheduler.SOURCE_HASH),
)


class Namespace:
    """A network namespace of its own, for this thread while `inside`. It is gone when nobody holds it any more."""

    def __init__(self) -> None:
        self._home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        if _libc.unshare(_CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "unshare")
        self._own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        self._enter(self._home)

    def _enter(self, descriptor: int) -> None:
        if _libc.setns(descriptor, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        self._enter(self._own)
        try:
            yield
        finally:
            self._enter(self._home)

    def close(self) -> None:
        os.close(self._own)
        os.close(self._home)


UNREACHABLE = {4: "198.51.102.7", 6: "2001:db8:ff::7"}
NARROW = {4: "198.51.101.7", 6: "2001:db8:fe::7"}
SILENT = {4: "192.0.2.77", 6: "2001:db8:c::77"}
"""A client whose MAC address nobody knows."""


def set_up_interfaces() -> dict[str, int]:
    """`front` towards clients and `back` towards backends, with routes and neighbours; their indices by name."""
    lines = ["link set lo up"]
    for name, mac in (("front", FRONT_MAC), ("back", BACK_MAC)):
        lines += [f"link add {name} address {mac} type veth peer name far-{name}"]
        lines += [f"link set {end} addrgenmode none up" for end in (name, f"far-{name}")]
    lines += [
        "address add 192.0.2.1/24 dev front",
        "address add 2001:db8:c::1/64 dev front nodad",
        f"address add {OWN[4]}/16 dev back",
        f"address add {OWN[6]}/64 dev back nodad",
    ]
    for version in (4, 6):
        lines += [
            f"neighbour add {CLIENT[version]} lladdr {CLIENT_MAC} nud permanent dev front",
            f"neighbour add {ROUTER[version]} lladdr {ROUTER_MAC} nud permanent dev front",
            f"route add {BEHIND_ROUTER[version]} via {ROUTER[version]}",
            f"route add {NARROW[version]} via {ROUTER[version]} mtu lock 1280",
            f"route add unreachable {UNREACHABLE[version]}",
        ]
    subprocess.run(["ip", "-batch", "-"], input="\n".join(lines), text=True, check=True, capture_output=True)
    for family in ("ipv4", "ipv6"):
        Path(f"/proc/sys/net/{family}/conf/all/forwarding").write_text("1")
    return {name: index for index, name in socket.if_nameindex()}


class World:
    """One loaded dataplane with all services of this page."""

    def __init__(self, plane: Dataplane, interfaces: Mapping[str, int]) -> None:
        self.plane = plane
        self.interfaces = interfaces
        self.answer_budgets = np.frombuffer(syscall.map_memory(plane.fd("answer_budgets")), np.uint64).reshape(-1, 2)
        self.answer_totals = np.frombuffer(syscall.map_memory(plane.fd("answer_totals")), np.uint64)
        self.config = Config(interfaces=("front", "back"), services=SERVICES)
        self.engine = Engine(plane, KEY, self.config, Statuses(), Applied(plane.geometry), Retired())
        for entry in SERVICES:
            for backend in entry.backends:
                self.set_health(entry.name, backend.name, not entry.name.startswith(("down", "open")))
        self.engine.apply_all()

    def set_health(self, name: str, backend: str, up: bool) -> None:
        address = next(b.address for s in SERVICES if s.name == name for b in s.backends if b.name == backend)
        next_hop = NextHop(
            ifindex=self.interfaces["back" if name == "far" else "front"],
            source_mac=bytes.fromhex(FRONT_MAC.replace(":", "")),
            dest_mac=bytes.fromhex(BACKEND_MAC.replace(":", "")),
            source=ip_address(OWN[address.version]),
            mtu=SMALL_MTU if name.endswith("small") else MTU,
        )
        state = HealthState.UP if up else HealthState.DOWN
        status = BackendStatus(state, Admin.ACTIVE, None, None if name == "open" else next_hop)
        self.engine.update(BackendKey(name, backend), status)

    def backend_id(self, name: str, backend: str = "a") -> int:
        return self.engine.applied.backends[BackendKey(name, backend)][0]

    def table(self, name: str) -> list[int]:
        """A service's slots, as they stand in the map."""
        applied = self.engine.applied.services[name]
        return [int(slot) for slot in self.plane.slots[applied.first : applied.first + len(applied.table)]]

    def run(self, packet: Packet | bytes, arrives: str = "front") -> tuple[Verdict, bytes]:
        result = syscall.test_run(self.plane.program_fd, raw(packet), ingress_ifindex=self.interfaces[arrives])
        return Verdict(result.verdict), result.packet

    def counters(self) -> dict[str, int]:
        """Every counter that is not 0, by name: `SERVICE/BACKEND.FIELD`, `SERVICE.drops.REASON`, `verdicts.NAME`."""
        applied = self.engine.applied
        labels = {"verdict_counters": {0: "verdicts"}, "drop_counters": {0: "none.drops"}, "backend_counters": {}}
        labels["drop_counters"] |= {entry.id: f"{name}.drops" for name, entry in applied.services.items()}
        labels["backend_counters"] |= {id_: str(key) for key, (id_, _) in applied.backends.items()}
        found = {}
        for map_name, ids in labels.items():
            fields = self.plane.counter_fields(map_name)
            values = self.plane.read_counters(map_name, max(ids) + 1)
            for id_, column in zip(*np.nonzero(values), strict=True):
                found[f"{ids.get(int(id_), f'unused {id_}')}.{fields[column]}"] = int(values[id_, column])
        return found

    def forget(self) -> None:
        """Empties what packets teach."""
        self.plane.nat_hints[:] = 0
        self.plane.nat_words[:] = 0
        self.answer_budgets[:] = 0
        self.answer_totals[:] = 0
        for key in syscall.elements(self.plane.fd("fragments")):
            syscall.delete(self.plane.fd("fragments"), key)

    def check(self, case: Case) -> None:
        """Runs a case and asserts all of it."""
        self.forget()
        for earlier in case.before:
            self.run(earlier, case.arrives)
        before = self.counters()
        verdict, out = self.run(case.packet, case.arrives)
        after = self.counters()
        changed = {name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name, 0)}
        wanted = raw(case.packet if case.out is None else case.out)
        assert (verdict.name, changed) == (
            case.verdict.name,
            {**case.counts, f"verdicts.{case.verdict.name.lower()}": 1},
        )
        assert out.hex(" ") == wanted.hex(" ")
        if not case.faulty:
            assert reference.faults(out) == []


@contextlib.contextmanager
def open_world(
    interfaces: Mapping[str, int], features: abi.Features = FEATURES, name: str = "world"
) -> Iterator[World]:
    plane = loader.open_dataplane(features, GEOMETRY, KEY, PIN_ROOT / name)
    try:
        yield World(plane, interfaces)
    finally:
        plane.close()
        plane.unpin()


def forwarded(name: str, packet: Packet | bytes, new_flow: bool = False, backend: str = "a") -> dict[str, int]:
    """The counters of an IP packet that goes to a backend."""
    counts = {f"{name}/{backend}.packets": 1, f"{name}/{backend}.bytes": len(raw(packet))}
    return counts | ({f"{name}/{backend}.new_flows": 1} if new_flow else {})


def replied(name: str, packet: Packet | bytes, backend: str = "a") -> dict[str, int]:
    """The counters of a NAT backend's IP packet that goes to a client."""
    return {f"{name}/{backend}.reply_packets": 1, f"{name}/{backend}.reply_bytes": len(raw(packet))}


def asked(service: str, to_backend: Flow, protocol: str) -> tuple[Packet, ...]:
    """What a client sent before its NAT backend can reply: nothing for TCP, where each reply names the service."""
    if protocol == "tcp":
        return ()
    listen = next(s.listen for s in SERVICES if s.name == service)
    return (frame(udp()(replace(to_backend, destination=str(listen.address), port=listen.first_port))),)


def header_length(flow: Flow) -> int:
    return len(raw(network(flow)))
