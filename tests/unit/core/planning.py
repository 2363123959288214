"""Maps that are played by a model, and worlds to plan for. The model sees nothing but the operations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from ipaddress import IPv4Address
from itertools import pairwise

import numpy as np
from hypothesis import strategies as st

from xdplb.abi import BackendFlag, Geometry
from xdplb.core import maglev
from xdplb.core.address_table import Claim
from xdplb.core.desired import DesiredService, desire
from xdplb.core.entries import Tunnels
from xdplb.core.nat_replies import shared_backends
from xdplb.core.operations import (
    Applied,
    BackendEntry,
    ClearBackend,
    ClearService,
    Operation,
    Publish,
    PutBackend,
    PutSequence,
    PutService,
    PutSlots,
    ServiceEntry,
)
from xdplb.core.planner import Planner
from xdplb.core.status import BackendStatus, NextHop
from xdplb.model import (
    Admin,
    Backend,
    BackendKey,
    Check,
    Config,
    Forward,
    HealthState,
    Listen,
    OnAllDown,
    Protocol,
    Scheduler,
    Service,
)

NEXT_HOP = NextHop(3, bytes.fromhex("02000000000a"), bytes.fromhex("02000000000b"), IPv4Address("10.0.0.1"), 1500)
UP = BackendStatus(health=HealthState.UP, next_hop=NEXT_HOP)
DOWN = replace(UP, health=HealthState.DOWN)
ROOMY = Geometry(services=16, backends=64, slots=1 << 13, address_buckets=64, intervals=1024)
NO_TUNNELS = Tunnels()

Statuses = dict[BackendKey, BackendStatus]


@dataclass(frozen=True)
class World:
    """A configuration and what is known of its backends."""

    services: tuple[Service, ...]
    statuses: Statuses

    @property
    def desired(self) -> list[DesiredService]:
        shared = shared_backends(Config(("eth0",), self.services))
        return [
            desire(s, {b.name: self.statuses[BackendKey(s.name, b.name)] for b in s.backends}, shared)
            for s in self.services
        ]


@dataclass(frozen=True)
class ByName:
    """All that is in the maps, without the ids and places that their history decided."""

    backends: dict[BackendKey, tuple[str | None, BackendEntry]]
    services: dict[str, ServiceEntry]
    slots: dict[str, list[BackendKey | None]]
    listening: set[tuple[str, Claim]]
    replying: set[tuple[BackendKey, Claim]]


class Maps:
    """What the packet path would see, from the operations alone."""

    def __init__(self, geometry: Geometry) -> None:
        self.backends: dict[int, tuple[BackendKey, BackendEntry]] = {}
        self.slots = np.zeros(geometry.slots, np.uint32)
        self.places: dict[str, tuple[int, int]] = {}
        self.services: dict[int, tuple[str, ServiceEntry]] = {}
        self.published = Publish((), ())

    def carry_out(self, operation: Operation) -> None:
        match operation:
            case PutBackend(key, id_, entry):
                assert id_ > 0
                assert self.backends.get(id_, (key,))[0] == key, "a live backend's id was given to another"
                self.backends[id_] = (key, entry)
            case PutSlots(name, first, table, origin):
                assert first + len(table) <= len(self.slots)
                assert origin == self.places.get(name), "what moves to another backend is told from where it was"
                assert origin is None or len(table) >= origin[1], "half a table would move half of its flows"
                self.places[name] = first, len(table)
                self.slots[first : first + len(table)] = table
            case PutSequence(name, first, ids):
                assert first + len(ids) <= len(self.slots)
                self.slots[first : first + len(ids)] = ids
            case PutService(name, id_, service):
                assert id_ > 0
                assert self.services.get(id_, (name,))[0] == name, "a live service's id was given to another"
                self.services[id_] = (name, service)
            case Publish():
                self.published = operation
            case ClearService(name, id_):
                assert self.services.pop(id_, (name,))[0] == name
                del self.places[name]
            case ClearBackend(key, id_):
                assert self.backends.pop(id_)[0] == key

    def table(self, service: ServiceEntry) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
        return self.slots[service.slots : service.slots + service.slot_count]

    def assert_sound(self) -> None:
        for _, entry in self.backends.values():
            if BackendFlag.UP in entry.flags:
                assert entry.ifindex and any(entry.macs)
        ranges = sorted(
            [(e.slots, e.slots + e.slot_count) for _, e in self.services.values()]
            + [
                (e.sequence, e.sequence + e.sequence_length + e.members)
                for _, e in self.services.values()
                if e.sequence_length
            ]
        )
        assert all(end <= start for (_, end), (start, _) in pairwise(ranges)), "slots of two services"
        for claim in self.published.services:
            name, service = self.services[claim.target]
            assert service.slot_count.bit_count() == 1 and service.slots % service.slot_count == 0
            sequence = self.slots[service.sequence :][: service.sequence_length + service.members]
            for id_ in np.unique(np.concatenate([self.table(service), sequence])).tolist():
                assert id_ == 0 or self.backends[id_][0].service == name
        published = {self.services[claim.target][0] for claim in self.published.services}
        for claim in self.published.replies:
            assert self.backends[claim.target][0].service in published

    def by_name(self) -> ByName:
        names = {id_: key for id_, (key, _) in self.backends.items()}
        services = {id_: name for id_, (name, _) in self.services.items()}
        return ByName(
            {k: (services.get(e.service), replace(e, service=0)) for k, e in self.backends.values()},
            {name: replace(entry, slots=0, sequence=0) for name, entry in self.services.values()},
            {n: [names.get(i) for i in self.table(e).tolist()] for n, e in self.services.values()},
            {(services[c.target], replace(c, target=1)) for c in self.published.services},
            {(names[c.target], replace(c, target=1)) for c in self.published.replies},
        )


class Machine:
    """Maps, and the `Applied` of whoever writes them."""

    def __init__(self, geometry: Geometry = ROOMY) -> None:
        self.maps = Maps(geometry)
        self.applied = Applied(geometry)

    def copy(self) -> Machine:
        """Entries and tables are values; what holds them is copied."""
        twin = Machine(self.applied.geometry)
        twin.maps.backends, twin.maps.services = dict(self.maps.backends), dict(self.maps.services)
        twin.maps.slots, twin.maps.places = self.maps.slots.copy(), dict(self.maps.places)
        twin.maps.published = self.maps.published
        twin.applied.services = {name: replace(service) for name, service in self.applied.services.items()}
        twin.applied.backends, twin.applied.published = dict(self.applied.backends), self.applied.published
        return twin

    def planner(self, tunnels: Tunnels = NO_TUNNELS) -> Planner:
        return Planner(self.applied, tunnels)

    def carry_out(self, operations: Iterable[Operation], stop_after: int | None = None) -> list[Operation]:
        """All of them, or so many as are done before the power fails. Sound after each."""
        done: list[Operation] = []
        if stop_after == 0:
            return done
        for operation in operations:
            self.maps.carry_out(operation)
            self.applied.advance(operation)
            self.maps.assert_sound()
            done.append(operation)
            if len(done) == stop_after:
                break
        return done

    def become(self, world: World) -> list[Operation]:
        return self.carry_out(self.planner().whole(world.desired))

    def assert_is(self, world: World) -> None:
        """The maps say exactly what `world` asks for, and nothing is left to do."""
        assert list(self.planner().whole(world.desired)) == []
        seen = self.maps.by_name()
        assert seen.services.keys() == {s.name for s in world.services}
        assert seen.backends.keys() == {BackendKey(s.name, b.name) for s in world.services for b in s.backends}
        assert seen.listening == listening(world)
        for service in world.desired:
            name = service.config.name
            size = len(seen.slots[name])
            assert size >= maglev.table_size(len(service.backends))
            assert Counter(seen.slots[name]) == quotas(service, size)
            for backend in service.backends:
                owner, entry = seen.backends[BackendKey(name, backend.config.name)]
                assert owner == name
                assert entry.address == backend.config.address
                assert (BackendFlag.UP in entry.flags) is backend.up


def listening(world: World) -> set[tuple[str, Claim]]:
    listens = ((s.name, s.listen) for s in world.services)
    return {(n, Claim(at.address, at.protocol, at.first_port, at.last_port, 1)) for n, at in listens}


def quotas(service: DesiredService, size: int) -> Counter[BackendKey | None]:
    """How many of `size` slots each backend is due."""
    ordered = sorted(service.backends, key=lambda b: b.config.label(service.config.listen))
    due = maglev.quotas([b.weight for b in ordered], size)
    keys = [BackendKey(service.config.name, b.config.name) for b in ordered]
    counted: Counter[BackendKey | None] = Counter({k: int(q) for k, q in zip(keys, due, strict=True) if q})
    if not counted:
        counted[None] = size
    return counted


def service(name: str = "web", backends: int | tuple[Backend, ...] = 2, **changes: object) -> Service:
    """Listens on an address of its own."""
    number = int("".join(filter(str.isdigit, name)) or 0)
    if isinstance(backends, int):
        backends = tuple(Backend(f"b{i}", IPv4Address(f"10.{number}.0.{10 + i}"), 8080) for i in range(backends))
    listen = Listen(IPv4Address(f"203.0.113.{number}"), 80, 80, Protocol.TCP)
    whole = Service(name, listen, Forward.NAT, Scheduler.MAGLEV, Check(), backends)
    return replace(whole, **changes)  # type: ignore[arg-type]


def healthy(*services: Service) -> World:
    return World(services, {BackendKey(s.name, b.name): UP for s in services for b in s.backends})


def with_status(world: World, key: tuple[str, str], status: BackendStatus) -> World:
    return World(world.services, {**world.statuses, BackendKey(*key): status})


next_hops = st.sampled_from([None, NEXT_HOP, NEXT_HOP, NEXT_HOP, replace(NEXT_HOP, ifindex=4, mtu=70_000)])
statuses = st.builds(
    BackendStatus,
    health=st.sampled_from([HealthState.UP, HealthState.UP, HealthState.UP, HealthState.DOWN, HealthState.UNKNOWN]),
    admin=st.sampled_from([Admin.ACTIVE, Admin.ACTIVE, Admin.ACTIVE, Admin.DRAIN, Admin.MAINT]),
    weight=st.sampled_from([None, None, None, 0, 5]),
    next_hop=next_hops,
)


@st.composite
def worlds(draw: st.DrawFn, most_services: int = 3, most_backends: int = 5) -> World:
    """Few names, addresses and ports, so that two of them have much in common and differ in everything."""
    services: list[Service] = []
    known: Statuses = {}
    for number in sorted(draw(st.sets(st.integers(0, most_services - 1)))):
        first_port = draw(st.sampled_from([80, 443]))
        ports = (first_port, first_port + draw(st.sampled_from([0, 0, 9])))
        listen = Listen(IPv4Address(f"203.0.113.{number}"), *ports, draw(st.sampled_from(Protocol)))
        forward = draw(st.sampled_from([Forward.NAT, Forward.NAT, Forward.DSR, Forward.IPIP]))
        names = draw(st.lists(st.integers(0, most_backends), min_size=1, max_size=most_backends, unique=True))
        hosts = draw(st.permutations(range(most_backends + 1)))
        backends = tuple(
            Backend(
                f"b{name}",
                IPv4Address(f"10.0.0.{hosts[name]}"),
                draw(st.sampled_from([None, 8080])) if forward is Forward.NAT else None,
                draw(st.sampled_from([1, 1, 3, 0])),
                draw(st.sampled_from([False, False, False, True])),
            )
            for name in names
        )
        services.append(
            Service(
                f"s{number}",
                listen,
                forward,
                draw(st.sampled_from(Scheduler)),
                Check(),
                backends,
                draw(st.sampled_from(OnAllDown)),
            )
        )
        known |= {BackendKey(f"s{number}", b.name): draw(statuses) for b in backends}
    return World(tuple(draw(st.permutations(services))), known)


def cut(machine: Machine, world: World, count: int) -> tuple[Machine, Planner]:
    """The machine after so many operations towards `world`, and the planner that was cut short."""
    machine = machine.copy()
    planner = machine.planner()
    machine.carry_out(planner.whole(world.desired), count)
    return machine, planner
