"""From what is applied to what is desired, as ordered operations. Pure: nothing here touches a map.

The invariant: *no map entry ever refers to something that is not there*. Adding goes backend, slots, service,
address; removing goes address, service, slots, backend. `Applied` advances with each operation, so a plan that was
cut short at any point is made good by planning again from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import Generic, TypeVar

import numpy as np

from xdplb import abi
from xdplb.abi import BackendFlag, ForwardCode, SchedulerCode, ServiceFlag
from xdplb.core import maglev, wrr
from xdplb.core.address_table import Claim
from xdplb.core.desired import DesiredBackend, DesiredService, reply_ports
from xdplb.core.operations import (
    Applied,
    BackendEntry,
    ClearBackend,
    ClearService,
    Operation,
    Publish,
    PutBackend,
    PutService,
    PutSlots,
    PutTurns,
    ServiceEntry,
)
from xdplb.model import (
    Address,
    Affinity,
    BackendKey,
    FlowMemory,
    Forward,
    OnAllDown,
    OnRemove,
    Protocol,
    Scheduler,
    Service,
)

_Name = TypeVar("_Name")


class CapacityExceeded(Exception):
    """The desired state does not fit the maps' geometry; larger ones are needed."""


@dataclass(frozen=True, slots=True)
class Tunnels:
    """The prefixes that outer source addresses are drawn from; None: the gateway's own address. `sources` is what full
    NAT sends from, IPv4 first.
    """

    ipv4: IPv4Network | None = None
    ipv6: IPv6Network | None = None
    sources: tuple[Address, ...] = ()


class Planner:
    """Plans changes of one `Applied`. Ids are given to names here; a live one is never given again."""

    def __init__(self, applied: Applied, tunnels: Tunnels) -> None:
        self.applied = applied
        self._tunnels = tunnels
        services = {name: service.id for name, service in applied.services.items() if service.id}
        self._service_ids = _Ids("services", applied.geometry.services, services)
        backends = {key: id_ for key, (id_, _) in applied.backends.items()}
        self._backend_ids = _Ids("backends", min(applied.geometry.backends, abi.BACKEND_GONE - 1), backends)
        self._gaps = self._find_gaps()

    def whole(self, desired: Iterable[DesiredService]) -> Iterator[Operation]:
        """Everything, as after a change of the configuration. The caller advances `applied` after each operation.

        Ids run out, if they do, before the first operation. Large tables find their place first: small ones fit into
        what that leaves.
        """
        services = {service.config.name: service for service in desired}
        yield from self._backends(services.values())
        for service in sorted(services.values(), key=lambda service: -len(service.backends)):
            yield from self._table(service)
        claims = self._claims(services.values())
        if claims != self.applied.published:
            yield claims
        for name, applied in list(self.applied.services.items()):
            if name not in services:
                yield ClearService(name, applied.id)
                self._service_ids.release(name)
        wanted = {BackendKey(s.config.name, b.config.name) for s in services.values() for b in s.backends}
        for key, (id_, _) in list(self.applied.backends.items()):
            if key not in wanted:
                yield ClearBackend(key, id_)
                self._backend_ids.release(key)

    def service(self, desired: DesiredService) -> Iterator[Operation]:
        """One service's backends and slots, as after a verdict."""
        yield from self._backends([desired])
        yield from self._table(desired)

    def _backends(self, services: Iterable[DesiredService]) -> list[PutBackend]:
        """What changes of these services' backends. What takes packets away from a backend comes first."""
        changed = []
        for service in services:
            name = service.config.name
            service_id = self._service_ids.of(name)
            for backend in service.backends:
                key = BackendKey(name, backend.config.name)
                put = PutBackend(key, self._backend_ids.of(key), self._backend_entry(service, backend, service_id))
                if self.applied.backends.get(key) != (put.id, put.entry):
                    changed.append(put)
        return sorted(changed, key=lambda put: BackendFlag.UP in put.entry.flags)

    def _table(self, desired: DesiredService) -> Iterator[PutSlots | PutTurns | PutService]:
        name = desired.config.name
        yield from self._slots(desired)
        if _takes_turns(desired.config):
            yield from self._turns(desired)
        entry = self._service_entry(desired)
        if entry != self.applied.services[name].entry:
            yield PutService(name, self._service_ids.of(name), entry)

    def _slots(self, desired: DesiredService) -> Iterator[PutSlots]:
        name, members = desired.config.name, self._members(desired)
        size = maglev.table_size(len(members))
        settles, window_s = _settles(desired.config), _window_s(desired.config)
        known = self.applied.services.get(name)
        if known is None:
            yield PutSlots(name, self._room(name, size), maglev.build(members, size), None, settles, window_s)
            return
        origin = known.first, len(known.table)
        if size > len(known.table):
            table = maglev.repair(maglev.resize(known.table, size), members)
            yield PutSlots(name, self._room(name, size), table, origin, settles, window_s)
            return
        table = maglev.repair(known.table, members)
        if settles is not known.settles or not np.array_equal(table, known.table):
            yield PutSlots(name, known.first, table, origin, settles, window_s)

    def _turns(self, desired: DesiredService) -> Iterator[PutTurns]:
        """Turns take the room that they have while they fit."""
        name, members = desired.config.name, self._members(desired)
        cycle = wrr.cycle(members, wrr.room(maglev.table_size(len(members))) - len(members))
        ids = np.concatenate([cycle, np.array([m.id for m in members if m.weight], np.uint32)])
        known = self.applied.services[name].turns
        if np.array_equal(known.ids if known else [], ids) and (known.count if known else 0) == len(cycle):
            return
        fits = known is not None and _room_for(len(ids)) <= _room_for(len(known.ids))
        first = known.first if known is not None and fits else self._room(name, _room_for(len(ids)))
        yield PutTurns(name, first, ids, len(cycle))

    def _members(self, desired: DesiredService) -> list[maglev.Member]:
        name, listen = desired.config.name, desired.config.listen
        return [
            maglev.Member(b.config.label(listen), self._backend_ids.of(BackendKey(name, b.config.name)), b.weight)
            for b in desired.backends
        ]

    def _room(self, name: str, size: int) -> int:
        """The first gap of `size` slots, aligned to its size. Slots freed since are looked for when none is left."""
        first = self._take_gap(size)
        if first is None:
            self._gaps = self._find_gaps()
            first = self._take_gap(size)
        if first is None:
            raise CapacityExceeded(f"slots (now {name})")
        return first

    def _take_gap(self, size: int) -> int | None:
        for index, (start, end) in enumerate(self._gaps):
            first = -(-start // size) * size
            if first + size <= end:
                rest = ((start, first), (first + size, end))
                self._gaps[index : index + 1] = [(start, end) for start, end in rest if start < end]
                return first
        return None

    def _find_gaps(self) -> list[tuple[int, int]]:
        """Start and end of each stretch of slots that is not in use."""
        gaps, end = [], 0
        for first, length in sorted(self._occupied()):
            if end < first:
                gaps.append((end, first))
            end = max(end, first + length)
        return [*gaps, (end, self.applied.geometry.slots)]

    def _occupied(self) -> Iterator[tuple[int, int]]:
        """First and number of all slots in use: a service that moves is looked up at its old ones until its entry is
        written.
        """
        for service in self.applied.services.values():
            yield service.first, len(service.table)
            if service.entry is not None:
                yield service.entry.slots, service.entry.slot_count
                if service.entry.turn_count:
                    yield service.entry.turns, _room_for(service.entry.turn_count + service.entry.members)
            if service.turns is not None:
                yield service.turns.first, _room_for(len(service.turns.ids))

    def _service_entry(self, desired: DesiredService) -> ServiceEntry:
        service = desired.config
        applied = self.applied.services[service.name]
        cycle = applied.turns if applied.turns and applied.turns.count and _takes_turns(service) else None
        affinity = service.affinity or Affinity()
        return ServiceEntry(
            address=service.listen.address,
            slots=applied.first,
            slot_count=len(applied.table),
            hash_ports=service.scheduler is not Scheduler.SOURCE_HASH and service.affinity is None,
            port=service.listen.first_port if service.listen.single_port else 0,
            gue_port=service.gue_port,
            forward=ForwardCode[service.forward.name],
            flags=_service_flags(service),
            scheduler=_code(service.scheduler),
            turns=cycle.first if cycle else 0,
            turn_count=cycle.count if cycle else 0,
            members=len(cycle.ids) - cycle.count if cycle else 0,
            client_prefix=affinity.prefix6 if service.listen.address.version == 6 else 96 + affinity.prefix4,
            keep_idle_s=affinity.timeout_s if service.affinity else 0.0,
        )

    def _backend_entry(self, desired: DesiredService, backend: DesiredBackend, service_id: int) -> BackendEntry:
        flags = BackendFlag(0)
        if backend.up:
            flags |= BackendFlag.UP
        if backend.config.address.version == 6:
            flags |= BackendFlag.IPV6
        if backend.shared:
            flags |= BackendFlag.SHARED
        if backend.keeps:
            flags |= BackendFlag.KEEP
        address, port, way = backend.config.address, backend.config.port or 0, backend.way
        if way is None:
            return BackendEntry(address, service_id, port, flags)
        source, spread = self._source(way.source, desired.config.forward, address)
        return BackendEntry(
            address=address,
            service=service_id,
            port=port,
            flags=flags,
            source=source,
            source_spread=spread,
            ifindex=way.ifindex,
            macs=way.dest_mac + way.source_mac,
            mtu=min(way.mtu, 65535),
            load_weight=backend.weight if backend.up and not desired.config.scheduler.hashes else 0,
        )

    def _source(self, own: Address | None, forward: Forward, backend: Address) -> tuple[Address | None, int]:
        """The outer source, and the bits of its last 32 that follow the flow."""
        prefix = self._tunnels.ipv4 if backend.version == 4 else self._tunnels.ipv6
        if not forward.encapsulates or prefix is None:
            return own, 0
        return prefix.network_address, (1 << min(prefix.max_prefixlen - prefix.prefixlen, 32)) - 1

    def _claims(self, services: Iterable[DesiredService]) -> Publish:
        replying: list[Claim] = []
        listening = [
            Claim(address, protocol, abi.FIRST_SOURCE_PORT, 65535, abi.TARGET_SOURCE + index)
            for index, address in enumerate(self._tunnels.sources)
            for protocol in Protocol
        ]
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


def _service_flags(service: Service) -> ServiceFlag:
    flags = ServiceFlag(0)
    if service.on_all_down is OnAllDown.REJECT:
        flags |= ServiceFlag.REJECT
    if service.flows is FlowMemory.NONE:
        flags |= ServiceFlag.STATELESS
    if service.on_remove is OnRemove.RESET:
        flags |= ServiceFlag.RESET
    if service.affinity is not None:
        flags |= ServiceFlag.BY_CLIENT
    if service.listen.protocol is Protocol.UDP:
        flags |= ServiceFlag.UDP
    return flags


def _code(scheduler: Scheduler) -> SchedulerCode:
    """rr is wrr, and lc wlc, where all weigh the same; where they do not, nobody wants the weights left out."""
    match scheduler:
        case Scheduler.RR | Scheduler.WRR:
            return SchedulerCode.TURNS
        case Scheduler.LC | Scheduler.WLC:
            return SchedulerCode.LEAST
        case Scheduler.P2C:
            return SchedulerCode.TWO
    return SchedulerCode.HASH


def _takes_turns(service: Service) -> bool:
    return _code(service.scheduler) in (SchedulerCode.TURNS, SchedulerCode.LEAST)


def _settles(service: Service) -> bool:
    """Whether the slots alone say where a new flow goes, once nothing changes."""
    return service.scheduler.hashes and service.flows is not FlowMemory.ALL


def _window_s(service: Service) -> float | None:
    """A client may be silent for as long as its affinity lasts."""
    return service.affinity.timeout_s if service.affinity else None


def _room_for(ids: int) -> int:
    return 1 << max(ids - 1, 0).bit_length()


class _Ids(Generic[_Name]):
    """Numbers from 1 to `limit`, lowest free first. A name has the same one until it is released."""

    def __init__(self, what: str, limit: int, known: Mapping[_Name, int]) -> None:
        self._what = what
        self._limit = limit
        self._ids = dict(known)
        self._used = set(known.values())
        self._next = 1

    def of(self, name: _Name) -> int:
        if name in self._ids:
            return self._ids[name]
        while self._next in self._used:
            self._next += 1
        if self._next > self._limit:
            raise CapacityExceeded(f"{self._what} (now {name})")
        self._ids[name] = self._next
        self._used.add(self._next)
        return self._next

    def release(self, name: _Name) -> None:
        id_ = self._ids.pop(name, None)
        if id_ is not None:
            self._used.remove(id_)
            self._next = min(self._next, id_)
