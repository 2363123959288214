"""Keeps the maps as they should be: configuration and statuses in, operations on one generation of maps out.

Everything is synchronous and runs on the event loop's thread; a verdict's flag is in the map before the call that
brings it returns.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from xdplb.abi import SLOT_BACKEND, SLOT_IN_TRANSITION, BackendFlag
from xdplb.core import flow_cache
from xdplb.core.desired import BackendStatus, DesiredService, desire, keeps_flows_when_down, shared_backends
from xdplb.core.operations import Applied, ClearBackend, Operation, Publish, PutBackend, PutService
from xdplb.core.planner import Planner, Tunnels
from xdplb.dataplane.bundle import HashKey
from xdplb.dataplane.clock import Clock
from xdplb.dataplane.clock import clock as the_clock
from xdplb.dataplane.loader import Dataplane
from xdplb.dataplane.writer import MapWriter
from xdplb.model import BackendKey, Config, OnAllDown, Service

Counters = NDArray[np.uint64]

FLOW_MAPS = ("flow_sets", "loads")
LEASE_MAPS = ("lease_sets", "lessees")
"""Of full NAT: of use to a generation with the same source addresses."""
SHARED_MAPS = (
    "nat_flows",
    "fragments",
    "flow_sets",
    "flow_budgets",
    "flow_counters",
    "loads",
    "turns_taken",
    *LEASE_MAPS,
    "drop_counters",
    "verdict_counters",
)
"""Whose size no growth changes: larger generations go on with the very same ones, and miss nothing."""


@dataclass(slots=True)
class Statuses:
    """What is known of each configured backend. A backend that the configuration dropped is forgotten."""

    by_service: dict[str, dict[str, BackendStatus]] = field(default_factory=dict)

    def get(self, key: BackendKey) -> BackendStatus:
        return self.by_service[key.service][key.backend]

    def set(self, key: BackendKey, status: BackendStatus) -> None:
        self.by_service[key.service][key.backend] = status

    def copy(self) -> Statuses:
        return Statuses({name: dict(backends) for name, backends in self.by_service.items()})

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


def _tunnels(config: Config) -> Tunnels:
    return Tunnels(config.tunnel_source4, config.tunnel_source6, (*config.sources(4), *config.sources(6)))


class Engine:
    """One generation of maps and what should be in them."""

    def __init__(
        self,
        plane: Dataplane,
        key: HashKey,
        config: Config,
        statuses: Statuses,
        applied: Applied,
        retired: Retired,
        clock: Clock | None = None,
    ) -> None:
        self.plane = plane
        self.applied = applied
        self.statuses = statuses
        self.retired = retired
        self.key = key
        self._clock = clock or the_clock()
        self._writer = MapWriter(plane, key, self._clock)
        self.adopt_config(config)

    def adopt_config(self, config: Config) -> None:
        """Takes `config` for what is desired. Nothing is written before `apply_all`."""
        self.config = config
        self._writer.window = self._clock.ticks(config.flow_cache.window_s)
        self.statuses.follow(config)
        self._services: dict[str, Service] = {service.name: service for service in config.services}
        self._shared = shared_backends(config)
        self._planner = Planner(self.applied, _tunnels(config))

    def desired(self, service: Service) -> DesiredService:
        return desire(service, self.statuses.by_service[service.name], self._shared)

    def apply_all(self) -> None:
        """Makes the maps what they should be, wholly. CapacityExceeded leaves a valid, partly applied state."""
        self._carry_out(self._planner.whole([self.desired(service) for service in self.config.services]))

    def rehearse(self, config: Config) -> None:
        """Raises CapacityExceeded where `apply_all` of that configuration would; writes nothing."""
        other = copy(self)
        other._writer = copy(self._writer)
        other.statuses = self.statuses.copy()
        other.applied = self.applied.copy()
        other.adopt_config(config)
        for operation in other._planner.whole([other.desired(service) for service in config.services]):
            if isinstance(operation, Publish):
                self._writer.build(operation)
            other.applied.advance(operation)

    def withdraw(self, key: BackendKey) -> None:
        """The urgent part of a backend's failure: no packet goes there from now on, but of flows that it keeps. Its
        slots are given away later.

        Not where everybody serves once nobody is healthy: who serves is a matter of all backends there.
        """
        known = self.applied.backends.get(key)
        if known is None or self._services[key.service].on_all_down is OnAllDown.FAIL_OPEN:
            return
        id_, entry = known
        flags = entry.flags & ~BackendFlag.UP
        if not keeps_flows_when_down(self._services[key.service], self.statuses.get(key)):
            flags &= ~BackendFlag.KEEP
        self._carry_out([PutBackend(key, id_, replace(entry, flags=flags))])

    def apply_service(self, service: str) -> None:
        """All of a change in one service."""
        self._carry_out(self._planner.service(self.desired(self._services[service])))

    def update(self, key: BackendKey, status: BackendStatus) -> bool:
        """Takes note of a backend's new status; True where something is to be applied."""
        if self.statuses.get(key) == status:
            return False
        self.statuses.set(key, status)
        return True

    def remembered(self) -> dict[BackendKey, int]:
        """Live remembered flows by backend; those that have none are left out."""
        _, flows_, live, _ = self._look()
        counts = np.bincount(flows_.backend[live], minlength=1)
        ids = {key: id_ for key, (id_, _) in self.applied.backends.items()}
        return {key: int(counts[id_]) for key, id_ in ids.items() if id_ < len(counts) and counts[id_]}

    def active(self, key: BackendKey) -> int | None:
        """How many flows (with affinity: clients) a backend has; None where not all are remembered."""
        return self.open(key) if self._services[key.service].remembers_all else None

    def open(self, key: BackendKey) -> int:
        """How many of the flows that are remembered of a backend have neither ended nor fallen silent."""
        known = self.applied.backends.get(key)
        return int(self.plane.loads["active"][known[0]]) if known else 0

    def window_s(self, service: str) -> float:
        """How long a flow that nobody remembers may be silent after its slot changed hands."""
        affinity = self._services[service].affinity
        return max(self.config.flow_cache.window_s, affinity.timeout_s if affinity else 0.0)

    def settle(self) -> int:
        """Takes slots out of transition that need it no longer. Returns how many are still in it."""
        plane = self.plane
        tick, remembered, live, services = self._look()
        first, mask = plane.services.entries["slots"][services], plane.services.entries["slot_mask"][services]
        slots = first + (remembered.fingerprint & mask)
        elsewhere = (plane.slots[slots] & np.uint32(SLOT_BACKEND)) != remembered.backend
        settled = flow_cache.settle(plane.slots, plane.transitions, slots[live & elsewhere & (services != 0)], tick)
        for service in self.applied.services.values():
            if not service.settles:
                settled[service.first :][: len(service.table)] = False
        plane.slots[settled] &= np.uint32(SLOT_BACKEND)
        in_transition = plane.slots & np.uint32(SLOT_IN_TRANSITION) != 0
        tables = ((service.first, len(service.table)) for service in self.applied.services.values())
        return sum(int(np.count_nonzero(in_transition[first:][:size])) for first, size in tables)

    def show_alive(self, loss_s: float | None) -> None:
        """To be called again within `loss_s`, or the packet path passes all packets on; None: it does not care."""
        if loss_s is not None:
            self.plane.trust_until(self._clock.tick + self._clock.ticks(loss_s))

    def sweep(self) -> None:
        """Lets remembered flows age: who fell silent does not count as active any more, and is forgotten where nothing
        depends on it. Takes 20 ms and more; may be called from another thread.
        """
        self.plane.sweep()

    def moved_to(self, plane: Dataplane) -> Engine:
        """An engine on larger maps that hold all that these do, under the same ids; see SHARED_MAPS for the rest."""
        old = self.plane
        for name in ("backends", "services"):
            getattr(plane, name).raw[: len(getattr(old, name).raw)] = getattr(old, name).raw
        plane.direct_seen[: len(old.direct_seen)] = old.direct_seen
        plane.transitions[: len(old.transitions)] = old.transitions
        plane.slots[: len(old.slots)] = old.slots
        if plane.geometry.flow_sets != old.geometry.flow_sets:
            plane.flow_words[:] = flow_cache.resized(old.flow_words, len(plane.flow_words), self._clock.tick)
        for id_, _ in self.applied.backends.values():
            plane.set_counters("backend_counters", id_, old.read_counter("backend_counters", id_))
        applied = self.applied.copy()
        applied.geometry, applied.published = plane.geometry, Publish((), ())
        engine = Engine(plane, self.key, self.config, self.statuses, applied, self.retired, self._clock)
        engine.apply_all()
        return engine

    def catch_up(self, old: Engine) -> None:
        """Takes over what the packet path remembered in the maps of `old` since `moved_to`."""
        if self.plane.geometry.flow_sets != old.plane.geometry.flow_sets:
            words = flow_cache.resized(old.plane.flow_words, len(self.plane.flow_words), self._clock.tick)
            free = self.plane.flow_words == 0
            self.plane.flow_words[free] = words[free]

    def _look(self) -> tuple[int, flow_cache.Flows, flow_cache.Mask, NDArray[np.uint32]]:
        """The time, all remembered flows, which of them live, and the ids of their services (0: of none any more)."""
        plane, tick = self.plane, self._clock.tick
        words = plane.flow_words
        remembered = flow_cache.Flows.decode(words[words != 0], tick)
        service_of = plane.backends.entries["service"]
        services = np.where(remembered.backend < len(service_of), service_of[remembered.backend % len(service_of)], 0)
        at_least = plane.services.entries["keep_idle"][services]
        return tick, remembered, remembered.live(plane.features.times, at_least) & (services != 0), services

    def _carry_out(self, operations: Iterable[Operation]) -> None:
        for operation in operations:
            match operation:
                case PutBackend(key, id_) if key not in self.applied.backends:
                    self._reset("backend_counters", id_)
                    self.plane.loads["active"][id_] = 0
                case PutService(name, id_) if self.applied.services[name].id != id_:
                    self._reset("drop_counters", id_)
                case ClearBackend(key, id_):
                    self.retired.add(key.service, self._backend_counters(id_))
            self._writer.apply(operation)
            self.applied.advance(operation)

    def _backend_counters(self, id_: int) -> Counters:
        return self.plane.read_counter("backend_counters", id_)

    def _reset(self, map_name: str, id_: int) -> None:
        self.plane.set_counters(map_name, id_, np.zeros(len(self.plane.counter_fields(map_name)), np.uint64))
