"""What a reload would do to flows, told before it is done. Pure.

A backend is its address and port: one that keeps its name and gets another address is another one, which takes over the
slots and none of the flows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from xdplb.core import maglev
from xdplb.core.desired import desire
from xdplb.core.listening import served
from xdplb.core.operations import Applied
from xdplb.core.status import BackendStatus, NextHop
from xdplb.model import (
    Address,
    Backend,
    BackendKey,
    Config,
    FlowMemory,
    Forward,
    HealthState,
    Protocol,
    Scheduler,
    Service,
)

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


_UNTOUCHED = ServiceForecast(0.0, 0, 0)


@dataclass(frozen=True, slots=True)
class Forecast:
    """Of services that are there before and after, by name; and over all, those that go included. `uncounted`: what
    goes with flows that are not remembered, as "service web" or "backend web/a".
    """

    services: dict[str, ServiceForecast]
    flows_broken: int | None
    flows_on_removed: int
    uncounted: tuple[str, ...] = ()


def forecast(
    old: Config,
    new: Config,
    statuses: Mapping[str, Mapping[str, BackendStatus]],
    applied: Applied,
    open_flows: OpenFlows,
) -> Forecast:
    """From `old`, which is in force, to `new`. New backends are taken for healthy ones, with their full weight."""
    before, after = ({service.name: service for service in config.services} for config in (old, new))
    ports_before, ports_after = served(old), served(new)
    mapped_anew = any(old.sources(version) != new.sources(version) for version in (4, 6))
    services = {}
    fresh = max((id_ for id_, _ in applied.backends.values()), default=0)
    going = {name: [b.name for b in service.backends] for name, service in before.items() if name not in after}
    for name, service in after.items():
        if name not in before or name not in applied.services:
            continue
        known, ports = before[name], ports_before[name]
        if known is service and ports and ports == ports_after[name] and not mapped_anew:
            going[name], services[name] = [], _UNTOUCHED
            continue
        kept = ports.within(ports_after[name])
        moved = _slots_moved_percent(known, service, statuses[name], applied, fresh)
        going[name] = _gone(known, service) if kept else [backend.name for backend in known.backends]
        broken = (
            kept.count < ports.count
            or _scheduled_anew(known, service)
            or (service.flows is FlowMemory.NONE and moved > 0)
            or (service.forward is Forward.FULL_NAT and mapped_anew)
        )
        services[name] = ServiceForecast(
            moved,
            None if broken and len(going[name]) < len(known.backends) else 0,
            _open(open_flows, name, going[name]),
        )
    told = [service.flows_broken for service in services.values()]
    return Forecast(
        services,
        None if None in told else 0,
        sum(_open(open_flows, name, backends) for name, backends in going.items()),
        tuple(_uncounted(before, going)),
    )


def _open(open_flows: OpenFlows, service: str, backends: Iterable[str]) -> int:
    return sum(open_flows(BackendKey(service, backend)) for backend in backends)


def _uncounted(before: Mapping[str, Service], going: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for name, backends in going.items():
        if before[name].remembers_all:
            continue
        if len(backends) == len(before[name].backends):
            yield f"service {name}"
        else:
            yield from (f"backend {name}/{backend}" for backend in backends)


def _gone(old: Service, new: Service) -> list[str]:
    """Backends of `old` that no packet of their flows reaches any more."""
    before, after = _endpoints(old), _endpoints(new)
    keeping = {(b.name, b.address) for b in new.backends if b.port is None}
    return [
        b.name
        for b in old.backends
        if after.get(b.name) != before[b.name] and not (b.port is None and (b.name, b.address) in keeping)
    ]


def _endpoints(service: Service) -> dict[str, tuple[Address, int | None]]:
    """Backends' addresses and ports by name; no port where each packet keeps its own."""
    port = service.listen.first_port if service.listen.single_port else None
    return {backend.name: (backend.address, backend.port or port) for backend in service.backends}


def _scheduled_anew(old: Service, new: Service) -> bool:
    """Whether flows lose their backends, or those their flows, though both stay."""
    forgets = new.flows is FlowMemory.NONE and old.flows is not FlowMemory.NONE
    datagrams = new.listen.protocol is Protocol.UDP and old.scheduler.hashes is not new.scheduler.hashes
    return forgets or datagrams or _told_apart_by(old) != _told_apart_by(new) or old.forward is not new.forward


def _told_apart_by(service: Service) -> object:
    """What flows are hashed by."""
    if service.affinity is not None:
        return service.affinity.prefix4, service.affinity.prefix6
    return service.scheduler is Scheduler.SOURCE_HASH


def _slots_moved_percent(
    old: Service, new: Service, statuses: Mapping[str, BackendStatus], applied: Applied, fresh: int
) -> float:
    """Ids above `fresh` are free."""
    if old == new:
        return 0.0
    before, endpoints = _endpoints(old), _endpoints(new)
    staying = {backend.name: backend for backend in old.backends if before[backend.name] == endpoints.get(backend.name)}
    expected = {b.name: _expected(b, staying.get(b.name), statuses) for b in new.backends}
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
