"""What a reload would do to flows, told before it is done. Pure.

A backend is its address and port: one that keeps its name and gets another address is another one, which takes over the
slots and none of the flows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from xdplb.core import maglev
from xdplb.core.desired import desire
from xdplb.core.operations import Applied
from xdplb.core.status import BackendStatus, NextHop
from xdplb.model import Address, Backend, BackendKey, Config, FlowMemory, HealthState, Listen, Scheduler, Service

OpenFlows = Callable[[BackendKey], int]
"""How many flows are remembered of a backend, and live."""

_WORKING = BackendStatus(health=HealthState.UP, next_hop=NextHop(0, b"", b"", None, 0))
"""What a backend is taken for that nobody has checked yet."""


@dataclass(frozen=True, slots=True)
class ServiceForecast:
    """`flows_broken`: of those whose backend stays; None where only the remembered ones are known, and others break.
    `flows_on_removed`: remembered ones whose backend, or whose service, goes.
    """

    slots_moved_percent: float
    flows_broken: int | None
    flows_on_removed: int


@dataclass(frozen=True, slots=True)
class Forecast:
    """Of services that are there before and after, by name; and over all, those that go included."""

    services: dict[str, ServiceForecast]
    flows_broken: int | None
    flows_on_removed: int


def forecast(
    old: Config,
    new: Config,
    statuses: Mapping[str, Mapping[str, BackendStatus]],
    applied: Applied,
    open_flows: OpenFlows,
) -> Forecast:
    """From `old`, which is in force, to `new`. New backends are taken for healthy ones, with their full weight."""
    before, after = ({service.name: service for service in config.services} for config in (old, new))
    services = {}
    for name, service in after.items():
        if name in before and name in applied.services:
            services[name] = ServiceForecast(
                _slots_moved_percent(before[name], service, statuses[name], applied),
                None if _scheduled_anew(before[name], service) else 0,
                sum(open_flows(BackendKey(name, gone)) for gone in _gone(before[name], service)),
            )
    ended = sum(open_flows(BackendKey(s.name, b.name)) for s in old.services if s.name not in after for b in s.backends)
    told = [service.flows_broken for service in services.values()]
    return Forecast(
        services,
        None if None in told else 0,
        ended + sum(service.flows_on_removed for service in services.values()),
    )


def _gone(old: Service, new: Service) -> set[str]:
    """Backends of `old` that no packet of their flows reaches any more: all, where the service listens elsewhere."""
    if not _covers(new.listen, old.listen):
        return {backend.name for backend in old.backends}
    after = _endpoints(new)
    return {name for name, endpoint in _endpoints(old).items() if after.get(name) != endpoint}


def _endpoints(service: Service) -> dict[str, tuple[Address, int | None]]:
    """Backends' addresses and ports by name; no port where each packet keeps its own."""
    port = service.listen.first_port if service.listen.single_port else None
    return {backend.name: (backend.address, backend.port or port) for backend in service.backends}


def _covers(listen: Listen, other: Listen) -> bool:
    return (
        (listen.address, listen.protocol) == (other.address, other.protocol)
        and listen.first_port <= other.first_port
        and other.last_port <= listen.last_port
    )


def _scheduled_anew(old: Service, new: Service) -> bool:
    """Whether flows lose their backends, or those their flows, though both stay."""
    forgets = new.flows is FlowMemory.NONE and old.flows is not FlowMemory.NONE
    return forgets or _told_apart_by(old) != _told_apart_by(new) or old.forward is not new.forward


def _told_apart_by(service: Service) -> object:
    """What flows are hashed by."""
    if service.affinity is not None:
        return service.affinity.prefix4, service.affinity.prefix6
    return service.scheduler is Scheduler.SOURCE_HASH


def _slots_moved_percent(old: Service, new: Service, statuses: Mapping[str, BackendStatus], applied: Applied) -> float:
    before, endpoints = _endpoints(old), _endpoints(new)
    staying = {backend.name: backend for backend in old.backends if before[backend.name] == endpoints.get(backend.name)}
    expected = {b.name: _expected(b, staying.get(b.name), statuses) for b in new.backends}
    fresh = max((id_ for id_, _ in applied.backends.values()), default=0)
    members = []
    for backend in desire(new, expected, frozenset()).backends:
        name, fresh = backend.config.name, fresh + 1
        id_, _ = applied.backends.get(BackendKey(new.name, name), (fresh, None)) if name in staying else (fresh, None)
        members.append(maglev.Member(backend.config.label(new.listen), id_, backend.weight))
    table = applied.services[new.name].table
    table = maglev.resize(table, max(len(table), maglev.table_size(len(members))))
    return 100 * maglev.moved(table, maglev.repair(table, members)) / len(table)


def _expected(backend: Backend, before: Backend | None, statuses: Mapping[str, BackendStatus]) -> BackendStatus:
    """A backend's status under the new file, which forgets what was set by hand where it changes the backend."""
    if before is None:
        return _WORKING
    status = statuses[backend.name]
    return status if before == backend else replace(status, admin=_WORKING.admin, weight=None)
