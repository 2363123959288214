"""Keeps the maps as they should be: configuration and statuses in, operations on one generation of maps out.

Everything is synchronous and runs on the event loop's thread; a verdict's flag is in the map before the call that
brings it returns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from xdplb import maglev
from xdplb.bundle import HashKey
from xdplb.dataplane import Dataplane
from xdplb.desired import BackendStatus, DesiredService, desire, shared_backends
from xdplb.model import BackendKey, Config, Service
from xdplb.plan import Applied, ClearBackend, Operation, Planner, PutBackend, PutService, Tunnels
from xdplb.writer import MapWriter

Counters = NDArray[np.uint64]


@dataclass(slots=True)
class Statuses:
    """What is known of each configured backend. A backend that the configuration dropped is forgotten."""

    by_service: dict[str, dict[str, BackendStatus]] = field(default_factory=dict)

    def get(self, key: BackendKey) -> BackendStatus:
        return self.by_service[key.service][key.backend]

    def set(self, key: BackendKey, status: BackendStatus) -> None:
        self.by_service[key.service][key.backend] = status

    def follow(self, config: Config) -> None:
        """Exactly the backends of `config` from now on; new ones have a status of their own."""
        before = self.by_service
        self.by_service = {
            service.name: {
                backend.name: before.get(service.name, {}).get(backend.name, BackendStatus())
                for backend in service.backends
            }
            for service in config.services
        }


@dataclass(slots=True)
class Retired:
    """What removed backends had counted, by service: a service's counters never decrease."""

    by_service: dict[str, list[int]] = field(default_factory=dict)

    def add(self, service: str, counters: Counters) -> None:
        known = self.by_service.setdefault(service, [0] * len(counters))
        for index, value in enumerate(counters):
            known[index] += int(value)


class Engine:
    """One generation of maps and what should be in them."""

    def __init__(
        self, plane: Dataplane, key: HashKey, config: Config, statuses: Statuses, applied: Applied, retired: Retired
    ) -> None:
        self.plane = plane
        self.applied = applied
        self.statuses = statuses
        self.retired = retired
        self._writer = MapWriter(plane, key)
        self.adopt_config(config)

    def adopt_config(self, config: Config) -> None:
        """Takes `config` for what is desired. Nothing is written before `apply_all`."""
        self.config = config
        self.statuses.follow(config)
        self._services: dict[str, Service] = {service.name: service for service in config.services}
        self._shared = shared_backends(config)
        self._planner = Planner(self.applied, Tunnels(config.tunnel_source4, config.tunnel_source6))

    def desired(self, service: Service) -> DesiredService:
        return desire(service, self.statuses.by_service[service.name], self._shared)

    def apply_all(self) -> None:
        """Makes the maps what they should be, wholly. CapacityExceeded leaves a valid, partly applied state."""
        self._carry_out(self._planner.whole([self.desired(service) for service in self.config.services]))

    def apply_flags(self, service: str) -> None:
        """The urgent part of a change in one service: who takes packets at all."""
        for operation in self._planner.service(self.desired(self._services[service])):
            if not isinstance(operation, PutBackend):
                break
            self._carry_out([operation])

    def apply_service(self, service: str) -> None:
        """All of a change in one service."""
        self._carry_out(self._planner.service(self.desired(self._services[service])))

    def update(self, key: BackendKey, status: BackendStatus) -> bool:
        """Takes note of a backend's new status; True where something is to be applied."""
        if self.statuses.get(key) == status:
            return False
        self.statuses.set(key, status)
        return True

    def moves(self, config: Config) -> dict[str, float]:
        """What share of each service's slots would change hands under `config`, in percent. New services have none."""
        statuses = Statuses({name: dict(backends) for name, backends in self.statuses.by_service.items()})
        statuses.follow(config)
        shared = shared_backends(config)
        result = {}
        for service in config.services:
            known = self.applied.services.get(service.name)
            if known is None:
                continue
            desired = desire(service, statuses.by_service[service.name], shared)
            result[service.name] = 100 * self._moved(desired, known.table) / len(known.table)
        return result

    def _moved(self, desired: DesiredService, table: NDArray[np.uint32]) -> int:
        name, listen = desired.config.name, desired.config.listen
        fresh = int(table.max(initial=0))
        members = []
        for backend in desired.backends:
            id_, _ = self.applied.backends.get(BackendKey(name, backend.config.name), (0, None))
            fresh += not id_
            members.append(maglev.Member(backend.config.label(listen), id_ or fresh, backend.weight))
        return maglev.moved(table, maglev.repair(table, members))

    def _carry_out(self, operations: Iterable[Operation]) -> None:
        for operation in operations:
            match operation:
                case PutBackend(key, id_) if key not in self.applied.backends:
                    self._reset("backend_counters", id_)
                case PutService(_, id_) if all(service.id != id_ for service in self.applied.services.values()):
                    self._reset("drop_counters", id_)
                case ClearBackend(key, id_):
                    self.retired.add(key.service, self._backend_counters(id_))
            self._writer.apply(operation)
            self.applied.advance(operation)

    def _backend_counters(self, id_: int) -> Counters:
        return self.plane.read_counter("backend_counters", id_)

    def _reset(self, map_name: str, id_: int) -> None:
        self.plane.set_counters(map_name, id_, np.zeros(len(self.plane.counter_fields(map_name)), np.uint64))


def move_counters(old: Engine, new: Engine) -> None:
    """Carries counters over to another generation's maps, by name. The new maps take packets only afterwards."""
    ids: Mapping[str, list[tuple[int, int]]] = {
        "backend_counters": [
            (old.applied.backends[key][0], id_)
            for key, (id_, _) in new.applied.backends.items()
            if key in old.applied.backends
        ],
        "drop_counters": [(0, 0)]
        + [
            (old.applied.services[name].id, service.id)
            for name, service in new.applied.services.items()
            if name in old.applied.services
        ],
        "verdict_counters": [(0, 0)],
    }
    for map_name, pairs in ids.items():
        counters = old.plane.read_counters(map_name, max(old_id for old_id, _ in pairs) + 1) if pairs else None
        for old_id, new_id in pairs:
            assert counters is not None
            new.plane.set_counters(map_name, new_id, counters[old_id])
