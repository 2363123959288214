"""Schedulers that choose: who gets new flows, by weight, in turn or where there is least to do; and who gets none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction

import pytest
from flowlab import ACK, FIN, STILL, SYN, WINDOW, Lab, service
from flowmodel import Flow

from xdplb.model import Admin, BackendKey, FlowMemory, HealthState, OnAllDown, Protocol, Scheduler

FLOWS = 10_000
CHOOSING = [Scheduler.RR, Scheduler.WRR, Scheduler.LC, Scheduler.WLC, Scheduler.P2C]
HASHING = [Scheduler.MAGLEV, Scheduler.SOURCE_HASH]
WEIGHTS = {
    "equal": {"a": 1, "b": 1, "c": 1},
    "1:2:3": {"a": 1, "b": 2, "c": 3},
    "10:20:30": {"a": 10, "b": 20, "c": 30},
    "5:1:1": {"a": 5, "b": 1, "c": 1},
    "very uneven": {"a": 1000, "b": 10, "c": 1, "d": 331, "e": 7, "f": 50},
    "primes": {"a": 97, "b": 89, "c": 83, "d": 79, "e": 73},
    "a crowd and a giant": {"a": 60, **{f"n{number}": 1 for number in range(60)}},
}


def start(lab: Lab, scheduler: Scheduler, backends: Mapping[str, int], **settings: object) -> None:
    lab.start(service(backends=backends, scheduler=scheduler, **settings))  # type: ignore[arg-type]


def shares(weights: Mapping[str, int]) -> dict[str, Fraction]:
    return {name: Fraction(weight, sum(weights.values())) for name, weight in weights.items()}


def assert_shared(got: Counter[str | None], weights: Mapping[str, int], within: float = 0.01) -> None:
    """Each within 1 % of all new flows of its share."""
    total = got.total()
    off = {name: abs(got[name] - total * share) / total for name, share in shares(weights).items()}
    assert set(got) <= weights.keys() and max(off.values()) <= within, (got, off)


class TestShares:
    """Of ten thousand new flows."""

    @pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS.keys())
    @pytest.mark.parametrize("scheduler", CHOOSING)
    def test_of_flows_that_last(self, choosing: Lab, scheduler: Scheduler, weights: dict[str, int]) -> None:
        start(choosing, scheduler, weights)
        assert_shared(choosing.sent_to(choosing.flows(FLOWS), SYN), weights)
        assert choosing.counted() == {"remembered": FLOWS}

    @pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS.keys())
    @pytest.mark.parametrize("scheduler", CHOOSING)
    def test_of_flows_that_end_at_once(self, choosing: Lab, scheduler: Scheduler, weights: dict[str, int]) -> None:
        """When nobody has anything to do, weights alone count. Of p2c's two the first is drawn: chance takes part."""
        start(choosing, scheduler, weights)
        got: Counter[str | None] = Counter()
        for flow in choosing.flows(FLOWS):
            home = choosing.syn(flow)
            assert choosing.send(flow, FIN | ACK) == home
            got[home] += 1
        assert_shared(got, weights, 0.025 if scheduler is Scheduler.P2C else 0.01)

    @pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS.keys())
    @pytest.mark.parametrize("scheduler", HASHING)
    def test_hashes_go_by_slots_and_those_by_weight(
        self, choosing: Lab, scheduler: Scheduler, weights: dict[str, int]
    ) -> None:
        start(choosing, scheduler, weights)
        slots = choosing.table()
        for name, share in shares(weights).items():
            assert abs(slots.count(name) - len(slots) * share) <= 1
        flows = choosing.flows(FLOWS)
        assert all(choosing.syn(flow) == choosing.owner(flow) for flow in flows)
        assert choosing.counted() == {}

    @pytest.mark.parametrize("scheduler", CHOOSING)
    @pytest.mark.parametrize(
        "change", ["down", "drain", "maint", "weight 0", "weight", "added", "removed", "withdrawn"]
    )
    def test_after_a_change_of_the_pool(self, choosing: Lab, scheduler: Scheduler, change: str) -> None:
        """New flows alone: what the backends had before lets lc make up for."""
        weights = {"a": 2, "b": 1, "c": 3}
        start(choosing, scheduler, weights)
        before = choosing.flows(600)
        homes = {flow: choosing.syn(flow) for flow in before}
        assert {flow: choosing.send(flow, FIN | ACK) for flow in before} == homes
        weights = make(choosing, change, weights)
        assert_shared(choosing.sent_to(choosing.flows(FLOWS), SYN), weights)

    @pytest.mark.parametrize("scheduler", [Scheduler.RR, Scheduler.WRR])
    def test_of_datagrams_of_a_service_that_remembers_nothing(self, choosing: Lab, scheduler: Scheduler) -> None:
        """Each takes its turn, whosever it is."""
        weights = {"a": 1, "b": 2, "c": 3}
        start(choosing, scheduler, weights, protocol=Protocol.UDP, flows=FlowMemory.NONE)
        few = choosing.flows(10)
        assert_shared(Counter(choosing.send(flow) for _ in range(FLOWS // 10) for flow in few), weights)
        assert choosing.remembered == 0 and choosing.counted() == {}

    @pytest.mark.parametrize("scheduler", CHOOSING)
    def test_of_datagrams_and_those_of_a_flow_stay_together(self, choosing: Lab, scheduler: Scheduler) -> None:
        weights = {"a": 1, "b": 2, "c": 3}
        start(choosing, scheduler, weights, protocol=Protocol.UDP)
        homes = {flow: choosing.send(flow) for flow in choosing.flows(FLOWS)}
        assert_shared(Counter(homes.values()), weights)
        assert {flow: choosing.send(flow) for flow in homes} == homes

    @pytest.mark.parametrize("scheduler", CHOOSING)
    def test_over_ipv6(self, choosing: Lab, scheduler: Scheduler) -> None:
        weights = {"a": 1, "b": 2, "c": 3}
        start(choosing, scheduler, weights, version=6)
        assert_shared(choosing.sent_to(choosing.flows(FLOWS), SYN), weights)


def make(lab: Lab, change: str, weights: dict[str, int]) -> dict[str, int]:
    """Changes the pool of a, b and c; the weights that hold then."""
    others = {name: weight for name, weight in weights.items() if name != "b"}
    match change:
        case "down":
            lab.fail("b")
        case "withdrawn":
            lab.note(BackendKey("web", "b"), health=HealthState.DOWN)
            lab.engine.withdraw(BackendKey("web", "b"))
        case "drain":
            lab.drain("b")
        case "maint":
            lab.change("b", admin=Admin.MAINT)
        case "weight 0":
            lab.change("b", weight=0)
        case "weight":
            lab.change("b", weight=7)
            return {**weights, "b": 7}
        case "added":
            reload(lab, {**weights, "d": 4})
            return {**weights, "d": 4}
        case "removed":
            reload(lab, others)
    return others


def reload(lab: Lab, weights: Mapping[str, int] | None = None, **settings: object) -> None:
    """The one service anew."""
    (only,) = lab.engine.config.services
    version = only.listen.address.version
    pool = service(backends=weights, version=version).backends if weights is not None else only.backends
    lab.configure(replace(only, backends=pool, **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("scheduler", CHOOSING)
class TestFlowsStay:
    def test_a_syn_that_comes_again_goes_where_the_first_one_went(self, choosing: Lab, scheduler: Scheduler) -> None:
        start(choosing, scheduler, {"a": 1, "b": 2, "c": 3})
        homes = {flow: choosing.syn(flow) for flow in choosing.flows(100)}
        active = choosing.active()
        for _ in range(3):
            assert {flow: choosing.syn(flow) for flow in homes} == homes
        assert choosing.active() == active and choosing.remembered == 100

    def test_whatever_becomes_of_the_pool(self, choosing: Lab, scheduler: Scheduler) -> None:
        start(choosing, scheduler, {"a": 1, "b": 2, "c": 3})
        homes = {flow: choosing.syn(flow) for flow in choosing.flows(300)}
        assert {flow: choosing.send(flow) for flow in homes} == homes
        for change in ("weight", "drain", "added", "weight 0"):
            make(choosing, change, {"a": 1, "b": 2, "c": 3})
            assert {flow: choosing.send(flow) for flow in homes} == homes
        choosing.pass_time(WINDOW)
        choosing.settle()
        assert {flow: choosing.send(flow) for flow in homes} == homes

    def test_those_of_a_backend_that_fails_and_only_those_go_elsewhere(
        self, choosing: Lab, scheduler: Scheduler
    ) -> None:
        start(choosing, scheduler, {"a": 1, "b": 2, "c": 3})
        homes = {flow: choosing.syn(flow) for flow in choosing.flows(300)}
        assert {flow: choosing.send(flow) for flow in homes} == homes
        choosing.fail("b")
        moved = {flow: choosing.send(flow) for flow in homes}
        assert all(moved[flow] in "ac" if home == "b" else moved[flow] == home for flow, home in homes.items())
        assert choosing.active() == {"b": 0} | {n: list(moved.values()).count(n) for n in "ac"}
        choosing.recover("b")
        assert {flow: choosing.send(flow) for flow in homes} == moved

    def test_a_strangers_syn_moves_no_flow_and_counts_none(self, choosing: Lab, scheduler: Scheduler) -> None:
        start(choosing, scheduler, {"a": 1, "b": 2, "c": 3})
        homes = {flow: choosing.syn(flow) for flow in choosing.flows(100)}
        assert {flow: choosing.send(flow) for flow in homes} == homes
        choosing.pass_time(STILL.reuse - 1)
        active, words = choosing.active(), choosing.plane.flow_words.copy()
        for _ in range(3):
            assert {flow: choosing.syn(flow) for flow in homes} == homes
        assert choosing.active() == active
        assert (choosing.plane.flow_words == words).all()

    @pytest.mark.parametrize("end", ["closed", "silent"])
    def test_a_new_flow_on_the_ports_of_one_that_ended_begins_anew(
        self, choosing: Lab, scheduler: Scheduler, end: str
    ) -> None:
        start(choosing, scheduler, {"a": 1, "b": 1})
        flow = choosing.flow()
        home = str(choosing.syn(flow))
        assert choosing.send(flow) == home
        choosing.drain(home)
        if end == "closed":
            assert choosing.send(flow, FIN | ACK) == home
        else:
            choosing.pass_time(STILL.reuse)
        other = "ab".replace(home, "")
        assert choosing.syn(flow) == choosing.send(flow) == other
        assert choosing.active() == {home: 0, other: 1}

    @pytest.mark.parametrize("change", ["drain", "maint", "down", "weight 0", "withdrawn", "removed"])
    def test_who_takes_no_new_flows_gets_none(self, choosing: Lab, scheduler: Scheduler, change: str) -> None:
        start(choosing, scheduler, {"a": 1, "b": 2, "c": 3})
        assert set(choosing.sent_to(choosing.flows(100), SYN)) == set("abc")
        make(choosing, change, {"a": 1, "b": 2, "c": 3})
        assert set(choosing.sent_to(choosing.flows(1000), SYN)) == set("ac")

    def test_when_all_are_down_new_flows_are_refused_and_the_first_that_recovers_gets_them(
        self, choosing: Lab, scheduler: Scheduler
    ) -> None:
        start(choosing, scheduler, {"a": 1, "b": 2, "c": 3})
        for name in "abc":
            choosing.fail(name)
        assert choosing.sent_to(choosing.flows(20), SYN) == {None: 20}
        assert choosing.remembered == 0
        choosing.recover("b")
        assert choosing.sent_to(choosing.flows(20), SYN) == {"b": 20}

    def test_when_all_are_withdrawn_at_once(self, choosing: Lab, scheduler: Scheduler) -> None:
        start(choosing, scheduler, {"a": 1, "b": 2, "c": 3})
        for name in "abc":
            choosing.note(BackendKey("web", name), health=HealthState.DOWN)
            choosing.engine.withdraw(BackendKey("web", name))
        assert choosing.sent_to(choosing.flows(20), SYN) == {None: 20}
        assert choosing.remembered == 0

    def test_fail_open_serves_by_weight(self, choosing: Lab, scheduler: Scheduler) -> None:
        start(choosing, scheduler, {"a": 1, "b": 2, "c": 3}, on_all_down=OnAllDown.FAIL_OPEN)
        for name in "abc":
            choosing.fail(name)
        assert_shared(choosing.sent_to(choosing.flows(FLOWS // 10), SYN), {"a": 1, "b": 2, "c": 3}, 0.03)

    def test_two_services_do_not_disturb_each_other(self, choosing: Lab, scheduler: Scheduler) -> None:
        """Each gets what it would get alone, and changes of one leave the other's flows and counts alone."""
        ours = service(backends={"a": 1, "b": 2, "c": 3}, scheduler=scheduler)
        theirs = service("api", {"x": 3, "y": 1}, number=2, scheduler=scheduler)
        choosing.start(ours, theirs)
        got, other = Counter[str | None](), Counter[str | None]()
        homes = {}
        for flow in choosing.flows(1200):
            twin = Flow("api", flow.client, flow.port)
            homes[flow], homes[twin] = choosing.syn(flow), choosing.syn(twin)
            got[homes[flow]] += 1
            other[homes[twin]] += 1
        assert_shared(got, {"a": 1, "b": 2, "c": 3}, 0.02)
        assert_shared(other, {"x": 3, "y": 1}, 0.02)
        active = choosing.active("api")
        assert active == other
        choosing.fail("a")
        choosing.drain("b")
        choosing.configure(replace(ours, backends=ours.backends[1:]), theirs)
        assert choosing.active("api") == active
        assert all(choosing.send(flow) == home for flow, home in homes.items() if flow.service == "api")


@pytest.mark.parametrize("scheduler", CHOOSING)
class TestReload:
    """From one scheduler to another."""

    def test_from_a_hash_and_back_no_connection_moves_and_the_slots_settle(
        self, choosing: Lab, scheduler: Scheduler
    ) -> None:
        start(choosing, Scheduler.MAGLEV, {"a": 1, "b": 1, "c": 1})
        oldest = {flow: choosing.syn(flow) for flow in choosing.flows(200)}
        silent = {flow: choosing.syn(flow) for flow in choosing.flows(200)}
        reload(choosing, scheduler=scheduler)
        homes = oldest | {flow: choosing.syn(flow) for flow in choosing.flows(200)}
        assert {flow: choosing.send(flow) for flow in homes} == homes
        assert any(choosing.owner(flow) != home for flow, home in homes.items()), "these are not where their slots are"
        reload(choosing, scheduler=Scheduler.MAGLEV)
        homes |= silent | {flow: choosing.syn(flow) for flow in choosing.flows(200)}
        assert {flow: choosing.send(flow) for flow in homes} == homes
        elsewhere = {choosing.slot(flow) for flow, home in homes.items() if choosing.owner(flow) != home}
        assert choosing.settle() == len(elsewhere) > 0
        assert {flow: choosing.send(flow) for flow in homes} == homes
        choosing.pass_time(901)
        assert choosing.settle() == 0
        assert sum(choosing.active().values()) == 0

    def test_with_changes_in_between(self, choosing: Lab, scheduler: Scheduler) -> None:
        start(choosing, Scheduler.MAGLEV, {"a": 1, "b": 1, "c": 1})
        homes = {flow: choosing.syn(flow) for flow in choosing.flows(300)}
        choosing.drain("a")
        homes |= {flow: choosing.syn(flow) for flow in choosing.flows(300)}
        reload(choosing, {"a": 1, "b": 2, "c": 3, "d": 4}, scheduler=scheduler)
        homes |= {flow: choosing.syn(flow) for flow in choosing.flows(300)}
        choosing.drain("b")
        assert {flow: choosing.send(flow) for flow in homes} == homes
        reload(choosing, {"a": 1, "b": 2, "c": 3, "d": 4, "e": 9}, scheduler=Scheduler.MAGLEV)
        homes |= {flow: choosing.syn(flow) for flow in choosing.flows(300)}
        assert {flow: choosing.send(flow) for flow in homes} == homes

    def test_datagrams_that_were_on_their_way_are_chosen_for_once(self, choosing: Lab, scheduler: Scheduler) -> None:
        start(choosing, Scheduler.MAGLEV, {"a": 1, "b": 1, "c": 1}, protocol=Protocol.UDP)
        flows = choosing.flows(100)
        choosing.sent_to(flows)
        reload(choosing, scheduler=scheduler)
        homes = {flow: choosing.send(flow) for flow in flows}
        assert {flow: choosing.send(flow) for flow in flows} == homes
        assert choosing.active() == Counter(homes.values())


@pytest.mark.parametrize("scheduler", [Scheduler.RR, Scheduler.WLC, Scheduler.P2C])
def test_more_backends_than_one_stretch_of_the_search(choosing: Lab, scheduler: Scheduler) -> None:
    weights = {f"n{number}": 1 + number % 3 for number in range(1100)}
    start(choosing, scheduler, weights)
    rounds = 4
    total = rounds * sum(weights.values())
    got = choosing.sent_to(choosing.flows(total), SYN)
    assert Counter(choosing.active()) == got, "those that have none are not in it, or are with 0"
    if scheduler is Scheduler.P2C:
        assert max(abs(got[name] - rounds * weight) for name, weight in weights.items()) <= 4 * rounds
    else:
        assert max(abs(got[name] - rounds * weight) for name, weight in weights.items()) <= 1


@pytest.mark.parametrize("number", [511, 512, 513, 1024, 1025])
def test_the_last_one_of_a_stretch_is_found(choosing: Lab, number: int) -> None:
    """Everybody has a flow but one: the next goes there, wherever it stands."""
    names = [f"n{n}" for n in range(number)]
    start(choosing, Scheduler.LC, dict.fromkeys(names, 1))
    homes = {str(choosing.syn(flow)): flow for flow in choosing.flows(number)}
    assert homes.keys() == set(names)
    for name in (names[0], names[-1], names[number // 2], names[min(510, number - 2)]):
        assert choosing.send(homes[name], FIN | ACK) == name
        assert choosing.syn(choosing.flow()) == name


@pytest.mark.parametrize(("share", "most"), [(4, 1 / 1000), (2, 1 / 80)], ids=["a quarter full", "half full"])
def test_in_a_memory_that_fills_hardly_any_flow_finds_no_place(lab: Lab, share: int, most: float) -> None:
    """The advice of docs/flows.md on its size."""
    lab.start(service(flows=FlowMemory.ALL))
    count = len(lab.plane.flow_words) // share
    lab.sent_to(lab.flows(count), SYN)
    assert lab.counted().get("not_remembered", 0) < most * count
    assert lab.remembered > (1 - most) * count
