"""What a reload would do to flows, beside what the planner then does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from ipaddress import IPv4Address

import pytest
from planning import DOWN, UP, Machine, World, healthy, service

from xdplb.core.forecast import Forecast, ServiceForecast, forecast
from xdplb.core.status import BackendStatus
from xdplb.model import Admin, Affinity, Backend, BackendKey, Config, FlowMemory, Forward, Scheduler, Service

WEB = service("web1", 4)
DNS = service("dns2", 2)
FLOWS = {BackendKey("web1", "b0"): 7, BackendKey("web1", "b1"): 5, BackendKey("dns2", "b0"): 3}


def told(old: World, *new: Service, flows: Mapping[BackendKey, int] = FLOWS) -> Forecast:
    """From the world `old`, with all that is in its maps."""
    machine = Machine()
    machine.become(old)
    by_service: dict[str, dict[str, BackendStatus]] = {}
    for key, status in old.statuses.items():
        by_service.setdefault(key.service, {})[key.backend] = status
    configs = (Config(("eth0",), services) for services in (old.services, new))
    return forecast(*configs, by_service, machine.applied, lambda key: flows.get(key, 0))


def with_backends(of: Service, *backends: Backend) -> Service:
    return replace(of, backends=backends)


def with_first(of: Service, **changes: object) -> Service:
    first, *rest = of.backends
    return with_backends(of, replace(first, **changes), *rest)  # type: ignore[arg-type]


def test_nothing_comes_of_nothing() -> None:
    still = ServiceForecast(0.0, 0, 0)
    assert told(healthy(WEB, DNS), WEB, DNS) == Forecast({"web1": still, "dns2": still}, 0, 0)
    assert told(healthy(WEB), WEB, DNS) == Forecast({"web1": still}, 0, 0)


def test_flows_of_a_backend_that_goes() -> None:
    fewer = with_backends(WEB, *WEB.backends[1:])
    assert told(healthy(WEB), fewer) == Forecast({"web1": ServiceForecast(25.0, 0, 7)}, 0, 7)


def test_flows_of_a_service_that_goes() -> None:
    assert told(healthy(WEB, DNS), DNS) == Forecast({"dns2": ServiceForecast(0.0, 0, 0)}, 0, 12)


@pytest.mark.parametrize("change", [{"address": IPv4Address("10.9.9.9")}, {"port": 8081}])
def test_a_backend_of_another_address_is_another_one(change: dict[str, object]) -> None:
    assert told(healthy(WEB), with_first(WEB, **change)).services["web1"] == ServiceForecast(25.0, 0, 7)


def test_a_service_that_listens_elsewhere_takes_none_of_its_flows_along() -> None:
    moved = replace(WEB, listen=replace(WEB.listen, address=IPv4Address("203.0.113.99")))
    assert told(healthy(WEB), moved).services["web1"] == ServiceForecast(0.0, 0, 12)


def test_more_ports_lose_nothing() -> None:
    ports = replace(WEB, listen=replace(WEB.listen, last_port=89))
    narrow = with_backends(ports, *(replace(backend, port=None) for backend in ports.backends))
    wide = replace(narrow, listen=replace(narrow.listen, first_port=70))
    assert told(healthy(narrow), wide).flows_on_removed == 0
    assert told(healthy(wide), narrow).flows_on_removed == 12


@pytest.mark.parametrize(
    "change",
    [
        {"scheduler": Scheduler.SOURCE_HASH},
        {"affinity": Affinity()},
        {"forward": Forward.DSR},
        {"flows": FlowMemory.NONE},
    ],
)
def test_flows_that_are_scheduled_anew_are_not_counted_but_not_denied(change: dict[str, object]) -> None:
    other = replace(WEB, **change)  # type: ignore[arg-type]
    found = told(healthy(WEB, DNS), other, DNS)
    assert (found.services["web1"].flows_broken, found.services["dns2"].flows_broken) == (None, 0)
    assert found.flows_broken is None


@pytest.mark.parametrize("change", [{"scheduler": Scheduler.LC}, {"flows": FlowMemory.ALL}, {"slow_start_s": 30.0}])
def test_other_changes_break_none(change: dict[str, object]) -> None:
    assert told(healthy(WEB), replace(WEB, **change)).flows_broken == 0  # type: ignore[arg-type]
    timeout = replace(WEB, affinity=Affinity())
    assert told(healthy(timeout), replace(timeout, affinity=Affinity(timeout_s=9))).flows_broken == 0


def test_a_new_backend_is_taken_for_a_healthy_one() -> None:
    more = with_backends(WEB, *WEB.backends, Backend("new", IPv4Address("10.1.0.99"), 8080))
    found = told(healthy(WEB), more)
    assert found.services["web1"].slots_moved_percent == pytest.approx(20, abs=0.2)
    assert found.flows_on_removed == 0


def test_what_was_set_by_hand_is_forgotten_where_the_file_changes_the_backend() -> None:
    drained = World((WEB,), {**healthy(WEB).statuses, BackendKey("web1", "b0"): replace(UP, admin=Admin.DRAIN)})
    assert told(drained, WEB).services["web1"].slots_moved_percent == 0
    heavier = told(drained, with_first(WEB, weight=3)).services["web1"]
    assert heavier.slots_moved_percent == pytest.approx(50, abs=0.2)


@pytest.mark.parametrize("status", [UP, DOWN, replace(UP, ramp=3)])
@pytest.mark.parametrize("weight", [1, 5])
def test_the_slots_are_those_that_the_planner_moves(status: BackendStatus, weight: int) -> None:
    before = World((WEB,), {**healthy(WEB).statuses, BackendKey("web1", "b0"): status})
    after = World((with_first(WEB, weight=weight),), before.statuses)
    machine = Machine()
    machine.become(before)
    table = machine.applied.services["web1"].table.copy()
    machine.become(after)
    moved = 100 * float((table != machine.applied.services["web1"].table).mean())
    assert told(before, *after.services).services["web1"].slots_moved_percent == pytest.approx(moved)
