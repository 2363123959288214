"""What each backend should get, derived from configuration, health, administrative state and reachability. Pure.

This is the one place that decides who serves; everything after it only carries the decision out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from xdplb.model import (
    Address,
    Admin,
    Backend,
    BackendKey,
    Config,
    Forward,
    HealthState,
    OnAllDown,
    OnDown,
    Protocol,
    Service,
)


@dataclass(frozen=True, slots=True)
class Way:
    """How frames get to a backend: what the next hop's resolution came to."""

    ifindex: int
    source_mac: bytes
    dest_mac: bytes
    source: Address | None
    mtu: int


FULLY_GROWN = 20
"""A backend in slow start has so many twentieths of its weight."""


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """Everything that changes about a backend while its configuration stays. `weight` is None where the file's
    holds; `grown` are the twentieths that it has of either.
    """

    health: HealthState = HealthState.UNKNOWN
    admin: Admin = Admin.ACTIVE
    weight: int | None = None
    way: Way | None = None
    grown: int = FULLY_GROWN


@dataclass(frozen=True, slots=True)
class DesiredBackend:
    """`weight` is the effective one: its share of the slots. `up`: takes packets at all, of flows that it has; `keeps`:
    would go on with those if it were not.
    """

    config: Backend
    weight: int
    up: bool
    keeps: bool
    way: Way | None
    shared: bool


@dataclass(frozen=True, slots=True)
class DesiredService:
    """Its backends' weights are `scale` times the configured ones: whole numbers also of those that grow, and the
    configured ones themselves while nobody does.
    """

    config: Service
    backends: tuple[DesiredBackend, ...]
    scale: int = 1

    def shown_weight(self, backend: DesiredBackend) -> int:
        """The effective weight in the configuration's units: 0 only where it takes no new flows."""
        return -(-backend.weight // self.scale)


def configured_weight(backend: Backend, status: BackendStatus) -> int:
    return backend.weight if status.weight is None else status.weight


def serving(service: Service, statuses: Mapping[str, BackendStatus]) -> dict[str, int]:
    """Effective weights of the backends that take new flows, by name.

    Healthy, active, reachable ones serve; backups only where none of the others does. Where none serves at all,
    `on_all_down: fail-open` asks again without regard to health.
    """

    def weights(backup: bool, states: set[HealthState]) -> dict[str, int]:
        return {
            backend.name: weight
            for backend in service.backends
            if backend.backup is backup
            and (status := statuses[backend.name]).health in states
            and status.admin is Admin.ACTIVE
            and status.way is not None
            and (weight := configured_weight(backend, status)) > 0
        }

    healthy, any_health = {HealthState.UP}, set(HealthState)
    chosen = weights(False, healthy) or weights(True, healthy)
    if not chosen and service.on_all_down is OnAllDown.FAIL_OPEN:
        chosen = weights(False, any_health) or weights(True, any_health)
    return chosen


def desire(service: Service, statuses: Mapping[str, BackendStatus], shared: frozenset[BackendKey]) -> DesiredService:
    """What the packet path should do for one service."""
    weights = serving(service, statuses)
    growing = any(statuses[name].grown < FULLY_GROWN for name in weights)
    return DesiredService(
        service,
        tuple(
            DesiredBackend(
                config=backend,
                weight=weights.get(backend.name, 0) * (statuses[backend.name].grown if growing else 1),
                up=backend.name in weights or keeps_flows(statuses[backend.name]),
                keeps=keeps_flows_when_down(service, statuses[backend.name]),
                way=statuses[backend.name].way,
                shared=BackendKey(service.name, backend.name) in shared,
            )
            for backend in service.backends
        ),
        FULLY_GROWN if growing else 1,
    )


def grown(elapsed_s: float, slow_start_s: float) -> int:
    """How much of its weight a backend has so long after it began to grow: from 1 twentieth to all of them, linearly,
    in steps of a second or longer.
    """
    if elapsed_s >= slow_start_s:
        return FULLY_GROWN
    steps = max(1, min(FULLY_GROWN - 1, int(slow_start_s)))
    return 1 + (FULLY_GROWN - 1) * int(max(elapsed_s, 0.0) * steps / slow_start_s) // steps


def takes_new_flows(status: BackendStatus) -> bool:
    """Whether health and operator let it. One that comes to that again begins its slow start; an interruption of the
    way there is none.
    """
    return status.health is HealthState.UP and status.admin is Admin.ACTIVE


def keeps_flows(status: BackendStatus) -> bool:
    """Whether a backend that gets no new flows goes on with those that it has: one that drains, a backup that is not
    needed any more, one of weight 0. One in maintenance does not.
    """
    return status.health is HealthState.UP and _may_serve(status)


def keeps_flows_when_down(service: Service, status: BackendStatus) -> bool:
    """The same of one that is down, by the service's policy."""
    return service.on_down is OnDown.KEEP and _may_serve(status)


def _may_serve(status: BackendStatus) -> bool:
    return status.admin is not Admin.MAINT and status.way is not None


def shared_backends(config: Config) -> frozenset[BackendKey]:
    """NAT backends whose (address, protocol, port) serves several services: their replies alone do not name the
    service.
    """
    claims: defaultdict[tuple[Address, Protocol], list[tuple[int, int, BackendKey]]] = defaultdict(list)
    for service in config.services:
        if service.forward is not Forward.NAT:
            continue
        for backend in service.backends:
            first, last = reply_ports(service, backend)
            key = BackendKey(service.name, backend.name)
            claims[backend.address, service.listen.protocol].append((first, last, key))
    shared: set[BackendKey] = set()
    for group in claims.values():
        group.sort()
        reach, widest = -1, None
        for first, last, key in group:
            if first <= reach and widest is not None:
                shared |= {key, widest}
            if last > reach:
                reach, widest = last, key
    return frozenset(shared)


def reply_ports(service: Service, backend: Backend) -> tuple[int, int]:
    """The ports that a NAT backend's replies come from, first and last."""
    if backend.port is not None:
        return backend.port, backend.port
    return service.listen.first_port, service.listen.last_port
