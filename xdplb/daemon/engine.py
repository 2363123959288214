"""Keeps the maps as they should be: configuration and statuses in, operations on one generation of maps out.

Everything is synchronous and runs on one thread at a time, mostly the event loop's; a verdict's flag is in the map
before the call that brings it returns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from xdplb.abi import BackendFlag
from xdplb.core.desired import DesiredService, desire
from xdplb.core.entries import Tunnels
from xdplb.core.hash_key import HashKey
from xdplb.core.nat_replies import NatReplies
from xdplb.core.operations import Applied, ClearBackend, Operation, Publish, PutBackend, PutService
from xdplb.core.planner import Planner
from xdplb.core.status import BackendStatus, Statuses, keeps_flows_when_down
from xdplb.dataplane.clock import Clock
from xdplb.dataplane.clock import clock as the_clock
from xdplb.dataplane.loader import Dataplane
from xdplb.dataplane.writer import MapWriter
from xdplb.model import BackendKey, Config, OnAllDown, Service

Counters = NDArray[np.uint64]


@dataclass(slots=True)
class Retired:
    """What removed backends had counted, by service: a service's counters never decrease."""

    by_service: dict[str, list[int]] = field(default_factory=dict)

    def add(self, service: str, counters: Counters) -> None:
        known = self.by_service.setdefault(service, [0] * len(counters))
        for index, value in enumerate(counters):
            known[index] += int(value)

    def copy(self) -> Retired:
        return Retired({service: list(counters) for service, counters in self.by_service.items()})


class Writer(Protocol):
    """What is asked of `writer.MapWriter`; documented there."""

    window: int

    def apply(self, operation: Operation) -> None: ...
    def build(self, publish: Publish) -> object: ...


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
        writer: Writer | None = None,
    ) -> None:
        self.plane = plane
        self.applied = applied
        self.statuses = statuses
        self.retired = retired
        self.key = key
        self.clock = clock or the_clock()
        self._writer = writer or MapWriter(plane, key, self.clock)
        self._replies = NatReplies()
        self._foreseen: tuple[Config | None, NatReplies] = (None, self._replies)
        """Of the configuration that was rehearsed: with tens of thousands of backends they take a while to find."""
        self._planner = Planner(applied, _tunnels(config))
        self._done: dict[str, tuple[Service, tuple[BackendStatus, ...]]] = {}
        """What each service was by which its part of the maps was made."""
        self.unused = False
        """Whether these maps are new, and have counted nothing."""
        self.adopt_config(config)

    def adopt_config(self, config: Config) -> None:
        """Takes `config` for what is desired. Nothing is written before `apply_all`."""
        self.config = config
        self._writer.window = self.clock.ticks(config.flow_cache.window_s)
        self.statuses.follow(config)
        self.services: dict[str, Service] = {service.name: service for service in config.services}
        before, (foreseen, replies) = self._replies, self._foreseen
        self._replies = replies if foreseen is config else before.follow(config)
        for key in before.shared ^ self._replies.shared:
            self._done.pop(key.service, None)
        if self._planner.applied is not self.applied or self._planner.tunnels != _tunnels(config):
            self._planner, self._done = Planner(self.applied, _tunnels(config)), {}

    def as_it_is(self) -> Engine:
        """For another thread to read, while this one goes on."""
        other = copy(self)
        other.applied, other.retired = self.applied.copy(), self.retired.copy()
        return other

    def desired(self, service: Service) -> DesiredService:
        return desire(service, self.statuses.by_service[service.name], self._replies.shared)

    def apply_all(self) -> None:
        """Makes the maps what they should be, wholly. CapacityExceeded leaves a valid, partly applied state."""
        try:
            self._carry_out(self._plan())
        except BaseException:
            self._planner, self._done = Planner(self.applied, self._planner.tunnels), {}
            raise
        finally:
            self.unused = False
        self._done = {name: self._now(service) for name, service in self.services.items()}

    def _plan(self) -> Iterator[Operation]:
        """Of services that are not what they were when their part of the maps was made, or whose backends are not."""
        others = [s for s in self.config.services if s.name in self._done and self._done[s.name] == self._now(s)]
        as_wanted = {service.name for service in others}
        changed = [self.desired(s) for s in self.config.services if s.name not in as_wanted]
        return self._planner.whole(changed, others)

    def _now(self, service: Service) -> tuple[Service, tuple[BackendStatus, ...]]:
        return service, tuple(self.statuses.by_service[service.name].values())

    def fill(self, statuses: Statuses) -> None:
        """`apply_all` by statuses that stand still: for another thread, while `self.statuses` change."""
        present, self.statuses = self.statuses, statuses
        try:
            self.apply_all()
        finally:
            self.statuses = present

    def rehearse(self, config: Config) -> None:
        """Raises CapacityExceeded where `apply_all` of that configuration would; writes nothing."""
        other = copy(self)
        other._writer = copy(self._writer)
        other.statuses = self.statuses.copy()
        other.applied = self.applied.copy()
        other._planner, other._done = self._planner.rehearsing(other.applied), dict(self._done)
        other.adopt_config(config)
        for operation in other._plan():
            if isinstance(operation, Publish):
                self._writer.build(operation)
            other.applied.advance(operation)
        self._foreseen = config, other._replies

    def withdraw(self, key: BackendKey) -> None:
        """The urgent part of a backend's failure: no packet goes there from now on, but of flows that it keeps. Its
        slots are given away later.

        Not where everybody serves once nobody is healthy: who serves is a matter of all backends there.
        """
        known = self.applied.backends.get(key)
        if known is None or self.services[key.service].on_all_down is OnAllDown.FAIL_OPEN:
            return
        self._done.pop(key.service, None)
        id_, entry = known
        flags = entry.flags & ~BackendFlag.UP
        if not keeps_flows_when_down(self.services[key.service], self.statuses.get(key)):
            flags &= ~BackendFlag.KEEP
        self._carry_out([PutBackend(key, id_, replace(entry, flags=flags))])

    def apply_service(self, service: str) -> None:
        """All of a change in one service."""
        self._done.pop(service, None)
        self._carry_out(self._planner.service(self.desired(self.services[service])))
        self._done[service] = self._now(self.services[service])

    def update(self, key: BackendKey, status: BackendStatus) -> bool:
        """Takes note of a backend's new status; True where something is to be applied."""
        if self.statuses.get(key) == status:
            return False
        self.statuses.set(key, status)
        return True

    def show_alive(self, loss_s: float | None) -> None:
        """To be called again within `loss_s`, or the packet path passes all packets on; None: it does not care."""
        if loss_s is not None:
            self.plane.trust_until(self.clock.tick + self.clock.ticks(loss_s))

    def _carry_out(self, operations: Iterable[Operation]) -> None:
        for operation in operations:
            match operation:
                case PutBackend(key, id_) if key not in self.applied.backends:
                    self._reset("backend_counters", id_)
                case PutService(name, id_) if self.applied.services[name].id != id_:
                    self._reset("drop_counters", id_)
                case ClearBackend(key, id_):
                    self.retired.add(key.service, self._backend_counters(id_))
            self._writer.apply(operation)
            self.applied.advance(operation)

    def _backend_counters(self, id_: int) -> Counters:
        return self.plane.read_counter("backend_counters", id_)

    def _reset(self, map_name: str, id_: int) -> None:
        if self.unused:
            return
        self.plane.set_counters(map_name, id_, np.zeros(len(self.plane.counter_fields(map_name)), np.uint64))
