"""From what is applied to what is desired, as ordered operations. Pure: nothing here touches a map.

The invariant: *no map entry ever refers to something that is not there*. Adding goes backend, slots, service,
address; removing goes address, service, slots, backend. `Applied` advances with each operation, so a plan that was
cut short at any point is made good by planning again from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from dataclasses import replace
from itertools import chain

import numpy as np

from xdplb import abi
from xdplb.abi import BackendFlag
from xdplb.core import maglev, wrr
from xdplb.core.allocation import Ids, Slots, room_for
from xdplb.core.desired import DesiredService
from xdplb.core.entries import (
    ServiceClaims,
    Tunnels,
    backend_entry,
    needs_sequence,
    service_claims,
    service_entry,
    settles,
    source_claims,
    window_s,
    without_age,
)
from xdplb.core.operations import (
    Applied,
    ClearBackend,
    ClearService,
    Operation,
    Publish,
    PutBackend,
    PutSequence,
    PutService,
    PutSlots,
)
from xdplb.model import BackendKey, Service


class Planner:
    """Plans changes of one `Applied`. Ids are given to names here; a live one is never given again."""

    def __init__(self, applied: Applied, tunnels: Tunnels) -> None:
        self.applied = applied
        self.tunnels = tunnels
        services = {name: service.id for name, service in applied.services.items() if service.id}
        self._service_ids = Ids("services", applied.geometry.services, services)
        backends = {key: id_ for key, (id_, _) in applied.backends.items()}
        self._backend_ids = Ids("backends", min(applied.geometry.backends, abi.BACKEND_GONE - 1), backends)
        self._space = Slots(applied)
        self._source_claims = source_claims(tunnels)
        self._claims: dict[str, ServiceClaims] = {}
        self._taken_over = {without_age(claim): claim for claim in applied.published.replies}
        self._age = 1 + max((claim.since for claim in applied.published.replies), default=-1)

    def rehearsing(self, applied: Applied) -> Planner:
        """One that goes on from here with a copy of what is applied."""
        other = copy(self)
        other.applied, other._space = applied, Slots(applied)
        other._service_ids, other._backend_ids = self._service_ids.copy(), self._backend_ids.copy()
        other._claims = dict(self._claims)
        return other

    def whole(self, desired: Iterable[DesiredService], others: Iterable[Service] = ()) -> Iterator[Operation]:
        """Everything, as after a change of the configuration: `desired`, and `others` that are applied as they are
        wanted. The caller advances `applied` after each operation.

        Ids run out, if they do, before the first operation. Large tables find their place first: small ones fit into
        what that leaves.
        """
        services = {service.config.name: service for service in desired}
        stay = {service.name: service for service in others}
        yield from self._backends(services.values())
        for service in sorted(services.values(), key=lambda service: -len(service.backends)):
            yield from self._table(service)
        publish = self._publish({name: service.config for name, service in services.items()} | stay)
        if publish != self.applied.published:
            yield publish
        for name, applied in list(self.applied.services.items()):
            if name not in services and name not in stay:
                yield ClearService(name, applied.id)
                self._service_ids.release(name)
                self._claims.pop(name, None)
        wanted = {BackendKey(s.config.name, b.config.name) for s in services.values() for b in s.backends}
        if len(self.applied.backends) == len(wanted) + sum(len(service.backends) for service in stay.values()):
            return
        for key, (id_, _) in list(self.applied.backends.items()):
            if key[0] not in stay and key not in wanted:
                yield ClearBackend(key, id_)
                self._backend_ids.release(key)

    def _publish(self, services: Mapping[str, Service]) -> Publish:
        """By name, so that the order in a file makes no difference. What stays is the same object, to compare fast."""
        for name, service in services.items():
            known = self._claims.get(name)
            if known is None or known.service is not service:
                had = self._taken_over if known is None else {without_age(claim): claim for claim in known.replying}
                found = service_claims(service, self.applied, had, self._age)
                if known is not None and (known.listening, known.replying) == (found.listening, found.replying):
                    found = replace(known, service=service)
                self._claims[name] = found
        self._age += 1
        claims = [self._claims[name] for name in sorted(services)]
        listening = (*self._source_claims, *(claim.listening for claim in claims))
        return Publish(listening, tuple(chain.from_iterable(claim.replying for claim in claims)))

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
                put = PutBackend(
                    key, self._backend_ids.of(key), backend_entry(service.config, backend, service_id, self.tunnels)
                )
                if self.applied.backends.get(key) != (put.id, put.entry):
                    changed.append(put)
        return sorted(changed, key=lambda put: BackendFlag.UP in put.entry.flags)

    def _table(self, desired: DesiredService) -> Iterator[PutSlots | PutSequence | PutService]:
        name = desired.config.name
        yield from self._slots(desired)
        if needs_sequence(desired.config):
            yield from self._sequence(desired)
        entry = service_entry(desired.config, self.applied.services[name])
        if entry != self.applied.services[name].entry:
            yield PutService(name, self._service_ids.of(name), entry)

    def _slots(self, desired: DesiredService) -> Iterator[PutSlots]:
        name, members = desired.config.name, self._members(desired)
        size = maglev.table_size(len(members))
        settling, silent_s = settles(desired.config), window_s(desired.config)
        known = self.applied.services.get(name)
        if known is None:
            yield PutSlots(name, self._space.take(name, size), maglev.build(members, size), None, settling, silent_s)
            return
        origin = known.first, len(known.table)
        if size > len(known.table):
            table = maglev.repair(maglev.resize(known.table, size), members)
            yield PutSlots(name, self._space.take(name, size), table, origin, settling, silent_s)
            return
        table = maglev.repair(known.table, members)
        if settling is not known.settles or not np.array_equal(table, known.table):
            yield PutSlots(name, known.first, table, origin, settling, silent_s)

    def _sequence(self, desired: DesiredService) -> Iterator[PutSequence]:
        """A sequence stays in the room that it has while it fits."""
        name, members = desired.config.name, self._members(desired)
        sequence = wrr.sequence(members, wrr.room(maglev.table_size(len(members))) - len(members))
        ids = np.concatenate([sequence, np.array([m.id for m in members if m.weight], np.uint32)])
        known = self.applied.services[name].sequence
        if np.array_equal(known.ids if known else [], ids) and (known.count if known else 0) == len(sequence):
            return
        fits = known is not None and room_for(len(ids)) <= room_for(len(known.ids))
        first = known.first if known is not None and fits else self._space.take(name, room_for(len(ids)))
        yield PutSequence(name, first, ids, len(sequence))

    def _members(self, desired: DesiredService) -> list[maglev.Member]:
        name, listen = desired.config.name, desired.config.listen
        return [
            maglev.Member(b.config.label(listen), self._backend_ids.of(BackendKey(name, b.config.name)), b.weight)
            for b in desired.backends
        ]
