"""A loaded packet path whose time stands still until a test lets it pass, and services whose backends tell by the MAC
address of a frame to which of them it went.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_network
from itertools import count
from typing import Any

import numpy as np
from flowmodel import Address, Flow
from reference import Hash, aged

from xdplb import abi
from xdplb.abi import SLOT_BACKEND, SLOT_IN_TRANSITION, Features, FlowTimes, Geometry
from xdplb.core.hash_key import HashKey
from xdplb.core.operations import Applied
from xdplb.core.status import BackendStatus, NextHop, Statuses
from xdplb.daemon import flow_upkeep
from xdplb.daemon.engine import Engine, Retired
from xdplb.dataplane import loader, syscall
from xdplb.dataplane.clock import clock
from xdplb.dataplane.loader import Dataplane
from xdplb.lab import remains
from xdplb.model import (
    Admin,
    Backend,
    BackendKey,
    Check,
    CheckType,
    Config,
    FlowCache,
    Forward,
    HealthState,
    Listen,
    Protocol,
    Scheduler,
    Service,
)

KEY = HashKey.derive("flow tests")
HASH = Hash(KEY.seed, KEY.factor)
WINDOW = 900
STILL = FlowTimes(opening=60, established=900, closing=120, datagram=300, reuse=60, tick_shift=40)
"""A tick is 34 years or more, so none passes by itself. Jiffies begin at 2^32 less five minutes: 30 would not do."""
FEATURES = Features(
    ipv4=True,
    ipv6=True,
    nat=False,
    dsr=True,
    ipip=False,
    gue=False,
    outer_ipv4=False,
    outer_ipv6=False,
    tx_by_redirect=False,
    affinity=True,
    times=STILL,
)
GEOMETRY = Geometry(services=16, backends=2048, slots=1 << 18, address_buckets=64, intervals=1024, flow_sets=4096)
PREFIX = remains.new_prefix()
PIN_ROOT = remains.PINS / PREFIX

FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10
DROP, TX = 1, 3
_CLIENT_MAC = b"\x02" + b"\xff" * 5
_LISTENING = {4: IPv4Address("203.0.113.0"), 6: IPv6Address("2001:db8::")}
_BACKENDS = {4: IPv4Address("10.0.0.0"), 6: IPv6Address("fd00::")}
_CLIENTS = {4: IPv4Address("192.0.0.0"), 6: IPv6Address("2001:db8:c::")}


def service(
    name: str = "web",
    backends: Iterable[str] | Mapping[str, int] = "abc",
    version: int = 4,
    number: int = 1,
    protocol: Protocol = Protocol.TCP,
    **settings: Any,
) -> Service:
    """On port 80 of an address that `number` makes its own. Backends by name, or by name and weight."""
    listen = Listen(_LISTENING[version] + number, 80, 80, protocol)
    weights = backends if isinstance(backends, Mapping) else dict.fromkeys(backends, 1)
    pool = tuple(replace(backend(name, version, number), weight=weight) for name, weight in weights.items())
    return replace(
        Service(name, listen, Forward.DSR, Scheduler.MAGLEV, Check(CheckType.NONE), pool),
        **settings,
    )


def backend(name: str, version: int = 4, number: int = 1) -> Backend:
    """A letter with a number behind it makes the name, and the address."""
    host = int(name[1:] or 0) * 32 + ord(name[0]) - ord("a") + 1
    return Backend(name, _BACKENDS[version] + (number << 16) + host, None)


def _mac(name: str) -> bytes:
    return b"\x02" + name.encode().ljust(5, b"\0")


def healthy(name: str) -> BackendStatus:
    return BackendStatus(health=HealthState.UP, next_hop=NextHop(1, _CLIENT_MAC, _mac(name), None, 1500))


class Lab:
    """One generation of the packet path, and an engine that begins anew with each `start`."""

    def __init__(self, plane: Dataplane) -> None:
        self.plane = plane
        self.clock = clock(plane.features.times.tick_shift)
        self._clients = count(1)

    def start(self, *services: Service, window: int = WINDOW) -> None:
        """Empties all maps, then serves with all backends healthy."""
        plane = self.plane
        for memory in (
            plane.slots,
            plane.flow_words,
            plane.backends.raw,
            plane.services.raw,
            plane.nat_hints,
            plane.nat_words,
            plane.loads["active"],
        ):
            memory[:] = 0
        for structs in (plane.transitions, plane.addresses, plane.intervals, plane.syn_records):
            structs.view(np.uint8)[:] = 0
        plane.set_counters("flow_counters", 0, np.zeros(5, np.uint64))
        self.spend_budget(0)
        seconds = window * (1 << plane.features.times.tick_shift) / self.clock.frequency
        config = Config(("lo",), services, flow_cache=FlowCache(window_s=seconds))
        self.engine = Engine(plane, KEY, config, Statuses(), Applied(plane.geometry), Retired(), self.clock)
        self.configure(*services)

    def configure(self, *services: Service) -> None:
        """A reload; backends that are new are healthy."""
        engine = self.engine
        before = {key for key in self._keys() if key in engine.applied.backends}
        engine.adopt_config(replace(engine.config, services=services))
        for key in self._keys() - before:
            engine.update(key, healthy(key.backend))
        engine.apply_all()

    def settle(self) -> int:
        """What the daemon does every few seconds. Returns how many slots are still in transition."""
        unsettled = flow_upkeep.settle(self.engine)
        flow_upkeep.sweep(self.engine)
        return unsettled

    def _keys(self) -> set[BackendKey]:
        return {BackendKey(s.name, b.name) for s in self.engine.config.services for b in s.backends}

    def change(self, backend: str, service: str = "web", **status: Any) -> None:
        """Gives a backend another health, administrative state, weight or next hop. What fails is withdrawn first."""
        key = BackendKey(service, backend)
        self.note(key, **status)
        if status.get("health") is HealthState.DOWN:
            self.engine.withdraw(key)
        self.engine.apply_service(service)

    def note(self, key: BackendKey, **status: Any) -> None:
        self.engine.update(key, replace(self.engine.statuses.get(key), **status))

    def drain(self, backend: str, service: str = "web") -> None:
        self.change(backend, service, admin=Admin.DRAIN)

    def ready(self, backend: str, service: str = "web") -> None:
        self.change(backend, service, admin=Admin.ACTIVE)

    def fail(self, backend: str, service: str = "web") -> None:
        self.change(backend, service, health=HealthState.DOWN)

    def recover(self, backend: str, service: str = "web") -> None:
        self.change(backend, service, health=HealthState.UP)

    def pools(self, *pools: Iterable[str]) -> None:
        """The one service with other backends, one reload for each."""
        (only,) = self.engine.config.services
        for names in pools:
            self.configure(replace(only, backends=service(only.name, names, only.listen.address.version).backends))

    def pass_time(self, ticks: int) -> None:
        """Everything that is dated becomes so much older."""
        deadlines = self.plane.transitions["deadline"].astype(np.int64) - ticks
        self.plane.transitions["deadline"] = np.maximum(deadlines, 0)
        words = self.plane.flow_words
        used = np.flatnonzero(words)
        words[used] = aged(words[used], ticks)
        self.spend_budget(0)

    def spend_budget(self, used: int, tick: int | None = None) -> None:
        """So many flows were remembered in this tick, by each CPU."""
        now = (self.clock.tick if tick is None else tick) % (1 << 32)
        value = struct.pack("<II", now, used) * syscall.possible_cpus()
        syscall.update(self.plane.fd("flow_budgets"), bytes(4), value)

    # What flows there are.

    def flow(self, of: str | None = None, service: str = "web") -> Flow:
        """A flow that no test has had before; `of`: one whose slot that backend has now."""
        version = self._service(service).listen.address.version
        for number in self._clients:
            flow = Flow(service, _CLIENTS[version] + number, 1024 + number * 7919 % 60000)
            if of is None or self.owner(flow) == of:
                return flow
        raise AssertionError("endless")

    def flows(self, number: int, of: str | None = None, service: str = "web") -> list[Flow]:
        return [self.flow(of, service) for _ in range(number)]

    def flows_apart(self, number: int, of: str | None = None) -> list[Flow]:
        """The same, of which none has its SYN's record in another one's place."""
        found: dict[int, Flow] = {}
        while len(found) < number:
            flow = self.flow(of)
            found.setdefault(self.record(flow), flow)
        return list(found.values())

    def hash(self, flow: Flow) -> int:
        service, client = self._service(flow.service), flow.client
        if service.affinity is None:
            return HASH.flow(str(client), flow.port, 80, service.scheduler is not Scheduler.SOURCE_HASH)
        prefix = service.affinity.prefix4 if client.version == 4 else service.affinity.prefix6
        network = ip_network((client, prefix), strict=False)
        return HASH.flow(str(network.network_address), 0, 0, False)

    def record(self, flow: Flow) -> int:
        """The place of the record of its SYNs. Not where the service remembers clients."""
        service = self._service(flow.service)
        ports = struct.unpack("<I", struct.pack(">HH", flow.port, 80))[0]
        left_out = ports * 0x9E3779B1 if service.scheduler is Scheduler.SOURCE_HASH else 0
        left_out = (left_out ^ self.engine.applied.services[flow.service].id) % (1 << 32)
        key = self.hash(flow) ^ left_out * abi.MAX_SLOTS_PER_SERVICE
        return (key >> 32) % len(self.plane.syn_records)

    def slot(self, flow: Flow) -> int:
        """The place of its slot."""
        applied = self.engine.applied.services[flow.service]
        return applied.first + self.hash(flow) % (1 << 32) % len(applied.table)

    def owner(self, flow: Flow) -> str | None:
        return self.name_of(int(self.plane.slots[self.slot(flow)]) & SLOT_BACKEND)

    def in_transition(self, flow: Flow) -> bool:
        return bool(self.plane.slots[self.slot(flow)] & np.uint32(SLOT_IN_TRANSITION))

    def name_of(self, backend: int) -> str | None:
        return next((key.backend for key, (id_, _) in self.engine.applied.backends.items() if id_ == backend), None)

    def id_of(self, backend: str, service: str = "web") -> int:
        return self.engine.applied.backends[BackendKey(service, backend)][0]

    def table(self, service: str = "web") -> list[str | None]:
        """Names of its slots' backends, as the control plane has them."""
        names: dict[int, str] = {id_: key.backend for key, (id_, _) in self.engine.applied.backends.items()}
        return [names.get(id_) for id_ in self.engine.applied.services[service].table.tolist()]

    def _service(self, name: str) -> Service:
        return next(s for s in self.engine.config.services if s.name == name)

    # Packets.

    def packet(self, flow: Flow, flags: int = ACK, sequence: int = 0) -> bytes:
        """`flags` and sequence number are TCP's, where it is TCP."""
        return _packet(flow, self._service(flow.service).listen, flags, sequence)

    def send(self, flow: Flow, flags: int = ACK, sequence: int = 0) -> str | None:
        """The backend that gets the packet; None where nobody does."""
        return _delivered(syscall.test_run(self.plane.program_fd, self.packet(flow, flags, sequence)))

    def syn(self, flow: Flow, sequence: int = 0) -> str | None:
        return self.send(flow, SYN, sequence)

    def error_about(self, flow: Flow) -> str | None:
        """The backend that gets an ICMP error about a packet that the flow's backend sent to the client."""
        listen = self._service(flow.service).listen
        return _delivered(syscall.test_run(self.plane.program_fd, _error(flow, listen)))

    def sent_to(self, flows: Iterable[Flow], flags: int = ACK, sequence: int = 0) -> Counter[str | None]:
        return Counter(self.send(flow, flags, sequence) for flow in flows)

    # What is remembered.

    @property
    def remembered(self) -> int:
        return int(np.count_nonzero(self.plane.flow_words))

    def active(self, service: str = "web") -> dict[str, int]:
        """How many flows the schedulers think each of its backends has."""
        ids = {key.backend: id_ for key, (id_, _) in self.engine.applied.backends.items() if key.service == service}
        return {name: int(self.plane.loads["active"][id_]) for name, id_ in ids.items()}

    def counted(self) -> dict[str, int]:
        """The flow cache's counters since the start, without zeros."""
        values = self.plane.read_counter("flow_counters", 0)
        names = self.plane.counter_fields("flow_counters")
        return {name: int(value) for name, value in zip(names, values, strict=True) if value}


def _packet(flow: Flow, listen: Listen, flags: int, sequence: int) -> bytes:
    ports = struct.pack(">HH", flow.port, 80)
    if listen.protocol is Protocol.TCP:
        payload = ports + struct.pack(">II", sequence % (1 << 32), 0) + bytes([0x50, flags]) + bytes(6)
    else:
        payload = ports + struct.pack(">HH", 8, 0)
    return _ip(flow.client, listen.address, listen.protocol.number, payload)


def _error(flow: Flow, listen: Listen) -> bytes:
    """Time exceeded, of a router on the way to the client, about the first 8 bytes of a segment."""
    version = listen.address.version
    quoted = _ip(listen.address, flow.client, listen.protocol.number, struct.pack(">HH", 80, flow.port) + bytes(4))
    message = bytes([11 if version == 4 else 3, 0]) + bytes(6) + quoted[14:]
    return _ip(_CLIENTS[version], listen.address, 1 if version == 4 else 58, message)


def _ip(source: Address, destination: Address, protocol: int, payload: bytes) -> bytes:
    """In Ethernet, from the client. Without checksums, at which nobody on this way looks."""
    link = bytes(6) + _CLIENT_MAC
    if source.version == 4:
        header = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(payload), 0, 0, 64, protocol, 0)
        return link + b"\x08\x00" + header + source.packed + destination.packed + payload
    header = struct.pack(">IHBB", 6 << 28, len(payload), protocol, 64)
    return link + b"\x86\xdd" + header + source.packed + destination.packed + payload


def _delivered(run: syscall.TestRun) -> str | None:
    if run.verdict == DROP or run.packet[:6] == _CLIENT_MAC:
        return None
    assert run.verdict == TX, run.verdict
    return run.packet[1:6].rstrip(b"\0").decode()


@contextmanager
def loaded(name: str, features: Features = FEATURES, geometry: abi.Geometry = GEOMETRY) -> Iterator[Dataplane]:
    """A generation that is gone afterwards."""
    plane = loader.open_dataplane(features, geometry, KEY, PIN_ROOT / name)
    try:
        yield plane
    finally:
        plane.close()
        plane.unpin()
