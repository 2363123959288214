"""What a reload would do to flows, beside what the planner then does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from ipaddress import IPv4Address
from typing import Any

import pytest
from planning import DOWN, UP, Machine, World, healthy, service

from xdplb.core import desired
from xdplb.core import forecast as forecasts
from xdplb.core.desired import DesiredService
from xdplb.core.forecast import Forecast, ServiceForecast, forecast
from xdplb.core.status import BackendStatus
from xdplb.model import Admin, Affinity, Backend, BackendKey, Config, FlowMemory, Forward, Protocol, Scheduler, Service

WEB = service("web1", 4)
DNS = service("dns2", 2)
FLOWS = {BackendKey("web1", "b0"): 7, BackendKey("web1", "b1"): 5, BackendKey("dns2", "b0"): 3}


Pool = tuple[IPv4Address, ...]


def told(
    old: World, *new: Service, flows: Mapping[BackendKey, int] = FLOWS, pools: tuple[Pool, Pool] = ((), ())
) -> Forecast:
    """From the world `old`, with all that is in its maps."""
    machine = Machine()
    machine.become(old)
    by_service: dict[str, dict[str, BackendStatus]] = {}
    for key, status in old.statuses.items():
        by_service.setdefault(key.service, {})[key.backend] = status
    both = zip((old.services, new), pools, strict=True)
    configs = (Config(("eth0",), services, source_pool=pool) for services, pool in both)
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


def test_a_service_that_stays_as_it_is_costs_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be a thousand, and each table takes milliseconds."""
    asked: list[str] = []

    def desire(service: Service, *args: Any) -> DesiredService:
        asked.append(service.name)
        return desired.desire(service, *args)

    monkeypatch.setattr(forecasts, "desire", desire)
    told(healthy(WEB, DNS), WEB, with_first(DNS, weight=7))
    assert asked == [DNS.name]


def test_flows_of_a_backend_that_goes() -> None:
    fewer = with_backends(WEB, *WEB.backends[1:])
    gone = ServiceForecast(25.0, 0, 7)
    assert told(healthy(WEB), fewer) == Forecast({"web1": gone}, 0, 7, ("backend web1/b0",))
    all_known = replace(WEB, flows=FlowMemory.ALL)
    fewer = with_backends(all_known, *WEB.backends[1:])
    assert told(healthy(all_known), fewer) == Forecast({"web1": gone}, 0, 7)


def test_flows_of_a_service_that_goes() -> None:
    rest = {"dns2": ServiceForecast(0.0, 0, 0)}
    assert told(healthy(WEB, DNS), DNS) == Forecast(rest, 0, 12, ("service web1",))
    counting = replace(WEB, scheduler=Scheduler.LC)
    assert told(healthy(counting, DNS), DNS) == Forecast(rest, 0, 12)


@pytest.mark.parametrize("change", [{"address": IPv4Address("10.9.9.9")}, {"port": 8081}])
def test_a_backend_of_another_address_is_another_one(change: dict[str, object]) -> None:
    assert told(healthy(WEB), with_first(WEB, **change)).services["web1"] == ServiceForecast(25.0, 0, 7)


def test_a_service_that_listens_elsewhere_takes_none_of_its_flows_along() -> None:
    moved = replace(WEB, listen=replace(WEB.listen, address=IPv4Address("203.0.113.99")))
    assert told(healthy(WEB), moved).services["web1"] == ServiceForecast(0.0, 0, 12)


def on_ports(of: Service, first: int, last: int) -> Service:
    ports = replace(of, listen=replace(of.listen, first_port=first, last_port=last))
    return with_backends(ports, *(replace(backend, port=None) for backend in ports.backends))


RANGE, WIDE, ONE = on_ports(WEB, 80, 89), on_ports(WEB, 70, 89), on_ports(WEB, 85, 85)
EXACT = replace(on_ports(DNS, 85, 85), listen=replace(WEB.listen, first_port=85, last_port=85))


def test_more_ports_lose_nothing() -> None:
    for before, after in ((RANGE, WIDE), (ONE, WIDE), (ONE, RANGE)):
        found = told(healthy(before), after)
        assert (found.flows_broken, found.flows_on_removed, found.uncounted) == (0, 0, ())


def test_fewer_ports_lose_flows_of_which_nobody_knows_the_port() -> None:
    for before, after in ((WIDE, RANGE), (WIDE, ONE), (RANGE, on_ports(WEB, 81, 95))):
        found = told(healthy(before), after)
        assert (found.services["web1"].flows_broken, found.flows_on_removed) == (None, 0)
        all_known = (replace(service, flows=FlowMemory.ALL) for service in (before, after))
        assert told(healthy(next(all_known)), next(all_known)).flows_broken is None


def test_an_exact_port_takes_flows_from_the_range_around_it_and_leaves_none_to_it() -> None:
    found = told(healthy(RANGE), RANGE, EXACT)
    assert (found.services["web1"].flows_broken, found.flows_broken) == (None, None)
    found = told(healthy(RANGE, EXACT), RANGE)
    assert (found.flows_broken, found.flows_on_removed, found.uncounted) == (0, 3, ("service dns2",))
    elsewhere = replace(EXACT, listen=replace(EXACT.listen, first_port=90, last_port=90))
    assert told(healthy(RANGE), RANGE, elsewhere).flows_broken == 0


def test_a_range_takes_flows_from_all_ports_and_a_port_that_was_taken_already_is_no_loss() -> None:
    all_ports = on_ports(WEB, 0, 65535)
    taken = replace(on_ports(DNS, 80, 89), listen=replace(RANGE.listen))
    assert told(healthy(all_ports), all_ports, taken).services["web1"].flows_broken is None
    assert told(healthy(all_ports, taken), on_ports(WEB, 0, 65535), taken).flows_broken == 0
    narrower = on_ports(WEB, 80, 84)
    assert told(healthy(RANGE, EXACT), narrower, EXACT).services["web1"].flows_broken is None
    without_last = on_ports(WEB, 80, 85)
    exact_last = told(healthy(without_last, EXACT), on_ports(WEB, 80, 84), EXACT)
    assert exact_last.flows_broken == 0, "the exact port had these flows before"


def test_datagrams_are_scheduled_anew_between_a_hash_and_a_scheduler_that_counts() -> None:
    udp = replace(WEB, listen=replace(WEB.listen, protocol=Protocol.UDP))
    assert told(healthy(udp), replace(udp, scheduler=Scheduler.LC)).flows_broken is None
    assert told(healthy(udp), replace(udp, flows=FlowMemory.ALL)).flows_broken == 0


def test_where_no_flow_is_remembered_each_slot_that_moves_breaks_some() -> None:
    stateless = replace(WEB, flows=FlowMemory.NONE)
    assert told(healthy(stateless), with_first(stateless, weight=3)).services["web1"].flows_broken is None
    assert told(healthy(stateless), stateless).services["web1"].flows_broken == 0


def test_other_source_addresses_break_what_full_nat_sent_from_the_old_ones() -> None:
    one, other = ((IPv4Address(f"10.0.0.{n}"),) for n in (200, 201))
    full = replace(WEB, forward=Forward.FULL_NAT)
    found = told(healthy(full, DNS), full, DNS, pools=(one, other))
    assert (found.services["web1"].flows_broken, found.services["dns2"].flows_broken) == (None, 0)
    assert told(healthy(full), full, pools=(one, one)).flows_broken == 0


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
