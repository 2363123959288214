"""From what is applied to what is desired, as ordered operations. Pure: nothing here touches a map.

The invariant: *no map entry ever refers to something that is not there*. Adding goes backend, slots, service,
address; removing goes address, service, slots, backend. `Applied` advances with each operation, so a plan that was
cut short at any point is made good by planning again from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Network, IPv6Address, IPv6Network

import numpy as np
from numpy.typing import NDArray

from xdplb import abi, maglev
from xdplb.abi import BackendFlag, ForwardCode, ServiceFlag
from xdplb.desired import DesiredBackend, DesiredService, reply_ports
from xdplb.endpoints import Claim
from xdplb.model import Address, BackendKey, Forward, OnAllDown, Scheduler

SlotIds = NDArray[np.uint32]


class CapacityExceeded(Exception):
    """The desired state does not fit the maps' geometry; larger ones are needed."""


@dataclass(frozen=True, slots=True)
class BackendEntry:
    """One element of the backends' map. Without a way there it is never up."""

    address: Address
    service: int
    port: int
    flags: BackendFlag
    source: Address | None = None
    source_spread: int = 0
    ifindex: int = 0
    macs: bytes = bytes(12)
    mtu: int = 0

    @classmethod
    def unknown(cls) -> BackendEntry:
        """Equal to no entry that is ever planned."""
        return cls(IPv6Address(0), 0, 0, BackendFlag(0))


@dataclass(frozen=True, slots=True)
class ServiceEntry:
    """One element of the services' map."""

    address: Address
    slots: int
    slot_count: int
    hash_ports: bool
    port: int
    gue_port: int
    forward: ForwardCode
    flags: ServiceFlag


@dataclass(frozen=True, slots=True)
class PutBackend:
    key: BackendKey
    id: int
    entry: BackendEntry


@dataclass(frozen=True, slots=True, eq=False)
class PutSlots:
    service: str
    first: int
    table: SlotIds


@dataclass(frozen=True, slots=True)
class PutService:
    name: str
    id: int
    entry: ServiceEntry


@dataclass(frozen=True, slots=True)
class Publish:
    """Makes exactly these addresses and ports known, all at once."""

    services: tuple[Claim, ...]
    replies: tuple[Claim, ...]


@dataclass(frozen=True, slots=True)
class ClearService:
    name: str
    id: int


@dataclass(frozen=True, slots=True)
class ClearBackend:
    key: BackendKey
    id: int


Operation = PutBackend | PutSlots | PutService | Publish | ClearService | ClearBackend


@dataclass(slots=True)
class AppliedService:
    """`first` and `table` are where its slots are and what they hold; `entry` is None before the service is written."""

    id: int
    first: int
    table: SlotIds
    entry: ServiceEntry | None = None


@dataclass(slots=True)
class Applied:
    """What the maps hold."""

    geometry: abi.Geometry
    services: dict[str, AppliedService] = field(default_factory=dict)
    backends: dict[BackendKey, tuple[int, BackendEntry]] = field(default_factory=dict)
    published: Publish = Publish((), ())

    def advance(self, operation: Operation) -> None:
        """Takes note of an operation that was carried out."""
        match operation:
            case PutBackend(key, id_, entry):
                self.backends[key] = (id_, entry)
            case PutSlots(name, first, table):
                known = self.services.get(name)
                if known is None:
                    self.services[name] = AppliedService(0, first, table)
                else:
                    known.first, known.table = first, table
            case PutService(name, id_, entry):
                self.services[name].id, self.services[name].entry = id_, entry
            case Publish():
                self.published = operation
            case ClearService(name):
                del self.services[name]
            case ClearBackend(key):
                del self.backends[key]


@dataclass(frozen=True, slots=True)
class Tunnels:
    """The prefixes that outer source addresses are drawn from; None: the gateway's own address."""

    ipv4: IPv4Network | None = None
    ipv6: IPv6Network | None = None


class Planner:
    """Plans changes of one `Applied`. Ids are given to names here; a live one is never given again."""

    def __init__(self, applied: Applied, tunnels: Tunnels) -> None:
        self.applied = applied
        self._tunnels = tunnels
        self._service_ids = _Ids(applied.geometry.services, (s.id for s in applied.services.values()))
        self._backend_ids = _Ids(applied.geometry.backends, (id_ for id_, _ in applied.backends.values()))
        self._end = max((s.first + len(s.table) for s in applied.services.values()), default=0)

    def whole(self, desired: Iterable[DesiredService]) -> Iterator[Operation]:
        """Everything, as after a change of the configuration. The caller advances `applied` after each operation."""
        services = {service.config.name: service for service in desired}
        for service in services.values():
            yield from self.service(service)
        claims = self._claims(services.values())
        if claims != self.applied.published:
            yield claims
        for name, applied in list(self.applied.services.items()):
            if name not in services:
                yield ClearService(name, applied.id)
                self._service_ids.release(applied.id)
        wanted = {BackendKey(s.config.name, b.config.name) for s in services.values() for b in s.backends}
        for key, (id_, _) in list(self.applied.backends.items()):
            if key not in wanted:
                yield ClearBackend(key, id_)
                self._backend_ids.release(id_)

    def service(self, desired: DesiredService) -> Iterator[Operation]:
        """One service's backends and slots, as after a verdict. What takes packets away from a backend comes first."""
        name = desired.config.name
        known = self.applied.services.get(name)
        service_id = known.id if known and known.id else self._service_ids.take(f"services (now {name})")
        ids: dict[str, int] = {}
        changed = []
        for backend in desired.backends:
            key = BackendKey(name, backend.config.name)
            id_, old = self.applied.backends.get(key, (0, None))
            ids[backend.config.name] = id_ or self._backend_ids.take(f"backends (now {key})")
            entry = self._backend_entry(desired, backend, service_id)
            if entry != old:
                changed.append(PutBackend(key, ids[backend.config.name], entry))
        yield from sorted(changed, key=lambda put: BackendFlag.UP in put.entry.flags)
        yield from self._slots(desired, ids)
        written = self._service_entry(desired)
        if known is None or known.entry != written or not known.id:
            yield PutService(name, service_id, written)

    def _slots(self, desired: DesiredService, ids: dict[str, int]) -> Iterator[PutSlots]:
        name = desired.config.name
        members = [
            maglev.Member(backend.config.label(desired.config.listen), ids[backend.config.name], backend.weight)
            for backend in desired.backends
        ]
        size = maglev.table_size(len(members))
        known = self.applied.services.get(name)
        if known is None:
            yield PutSlots(name, self._room(name, size), maglev.build(members, size))
        elif len(known.table) != size:
            table = maglev.repair(maglev.resize(known.table, size), members)
            yield PutSlots(name, self._room(name, size), table)
        else:
            table = maglev.repair(known.table, members)
            if not np.array_equal(table, known.table):
                yield PutSlots(name, known.first, table)

    def _room(self, name: str, size: int) -> int:
        """A free stretch of `size` slots, aligned to its size: behind all others while there is room, then the first
        gap.
        """
        first = -(-self._end // size) * size
        if first + size <= self.applied.geometry.slots:
            self._end = first + size
            return first
        first = 0
        for start, length in sorted((s.first, len(s.table)) for s in self.applied.services.values()):
            if first + size <= start:
                break
            first = -(-max(first, start + length) // size) * size
        if first + size > self.applied.geometry.slots:
            raise CapacityExceeded(f"slots (now {name})")
        return first

    def _service_entry(self, desired: DesiredService) -> ServiceEntry:
        service = desired.config
        applied = self.applied.services[service.name]
        return ServiceEntry(
            address=service.listen.address,
            slots=applied.first,
            slot_count=len(applied.table),
            hash_ports=service.scheduler is not Scheduler.SOURCE_HASH,
            port=service.listen.first_port if service.listen.single_port else 0,
            gue_port=service.gue_port,
            forward=ForwardCode[service.forward.name],
            flags=ServiceFlag.REJECT if service.on_all_down is OnAllDown.REJECT else ServiceFlag(0),
        )

    def _backend_entry(self, desired: DesiredService, backend: DesiredBackend, service_id: int) -> BackendEntry:
        flags = BackendFlag(0)
        if backend.up:
            flags |= BackendFlag.UP
        if backend.config.address.version == 6:
            flags |= BackendFlag.IPV6
        if backend.shared:
            flags |= BackendFlag.SHARED
        entry = BackendEntry(backend.config.address, service_id, backend.config.port or 0, flags)
        if backend.way is None:
            return entry
        way = backend.way
        source, spread = self._source(way.source, desired.config.forward, backend.config.address)
        return replace(
            entry,
            source=source,
            source_spread=spread,
            ifindex=way.ifindex,
            macs=way.dest_mac + way.source_mac,
            mtu=min(way.mtu, 65535),
        )

    def _source(self, own: Address | None, forward: Forward, backend: Address) -> tuple[Address | None, int]:
        """The outer source, and the bits of its last 32 that follow the flow."""
        prefix = self._tunnels.ipv4 if backend.version == 4 else self._tunnels.ipv6
        if not forward.encapsulates or prefix is None:
            return own, 0
        return prefix.network_address, (1 << min(prefix.max_prefixlen - prefix.prefixlen, 32)) - 1

    def _claims(self, services: Iterable[DesiredService]) -> Publish:
        listening, replying = [], []
        for service in services:
            listen = service.config.listen
            id_ = self.applied.services[service.config.name].id
            listening.append(Claim(listen.address, listen.protocol, listen.first_port, listen.last_port, id_))
            if service.config.forward is not Forward.NAT:
                continue
            for backend in service.backends:
                key = BackendKey(service.config.name, backend.config.name)
                first, last = reply_ports(service.config, backend.config)
                target = self.applied.backends[key][0]
                replying.append(Claim(backend.config.address, listen.protocol, first, last, target))
        return Publish(tuple(listening), tuple(replying))


class _Ids:
    """Numbers from 1 to `limit`, lowest free first."""

    def __init__(self, limit: int, used: Iterable[int]) -> None:
        self._limit = limit
        self._used = {0, *used}
        self._next = 1

    def take(self, what: str) -> int:
        while self._next in self._used:
            self._next += 1
        if self._next > self._limit:
            raise CapacityExceeded(what)
        self._used.add(self._next)
        return self._next

    def release(self, id_: int) -> None:
        self._used.discard(id_)
        self._next = min(self._next, id_)
