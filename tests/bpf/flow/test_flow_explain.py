"""`explain` of flows whose slots change hands: what is said is what happens, in words, and leaves no trace."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from flowlab import ACK, FEATURES, FIN, SYN, WINDOW, Lab, loaded, service
from flowmodel import Flow

from xdplb.api import explanation
from xdplb.dataplane import frames, syscall
from xdplb.dataplane.frames import Endpoint
from xdplb.dataplane.trace import Reason, Trace
from xdplb.model import Admin, Affinity, BackendKey, FlowMemory, OnAllDown, OnDown, OnRemove, Protocol, Scheduler


def question(lab: Lab, flow: Flow) -> frames.Flow:
    listen = lab._service(flow.service).listen
    return frames.Flow(Endpoint(flow.client, flow.port), Endpoint(listen.address, 80), listen.protocol)


def ask(lab: Lab, flow: Flow) -> Trace:
    """What is found out; nothing may be different afterwards."""
    before = traces(lab)
    trace = lab.plane.explain(frames.build(question(lab, flow), bytes(6), bytes(6)), 1)
    assert traces(lab) == before
    return trace


def traces(lab: Lab) -> tuple[Any, ...]:
    plane = lab.plane
    counters = ("flow_counters", "verdict_counters", "backend_counters", "drop_counters")
    per_cpu = (*counters, "flow_budgets", "choices", "wrr_positions")
    shared = (plane.flow_words, plane.slots, plane.transitions, plane.nat_hints, plane.loads)
    shapes = {name: syscall.map_shape(plane.fd(name)).max_entries for name in per_cpu}
    return (
        *(memory.tobytes() for memory in shared),
        *(plane.read_counters(name, entries).tobytes() for name, entries in shapes.items()),
    )


def told(lab: Lab, flow: Flow) -> Any:
    """The answer as people get it; a tick is a second."""
    engine = lab.engine
    known = explanation.Known(
        engine.config,
        {service.id: name for name, service in engine.applied.services.items()},
        {id_: key for key, (id_, _) in engine.applied.backends.items()},
        engine.statuses.by_service,
        1.0,
    )
    return json.loads(json.dumps(explanation.answer(question(lab, flow), ask(lab, flow), known, "lo", "lo")))


def given_away(lab: Lab) -> Flow:
    """Drains a; a flow of a slot that b has now."""
    flows = lab.flows(100, of="a")
    lab.drain("a")
    return next(flow for flow in flows if lab.owner(flow) == "b")


def place(lab: Lab, flow: Flow) -> str:
    size = len(lab.engine.applied.services[flow.service].table)
    return f"slot {lab.hash(flow) % (1 << 32) % size} of {size}"


def test_a_settled_slot_has_its_flows(either: Lab) -> None:
    flow = either.flow(of="b")
    answer = told(either, flow)
    assert (answer["reason"], answer["backend"], answer["why"]) == (
        "settled",
        "b",
        f"{place(either, flow)} belongs to b",
    )
    assert (answer["flow_cache"], answer["remembered"], answer["new_connection"]) == ("not asked", None, None)
    slot = {"number": int(place(either, flow).split()[1]), "of": 512, "backend": "b", "in_transition": False}
    assert answer["slot"] == slot | {"previous": None, "window_left_s": None}


class TestASlotThatChangedHands:
    """a drains; its slots go to b and c."""

    @pytest.fixture
    def flow(self, lab: Lab) -> Flow:
        return given_away(lab)

    def test_an_old_flow_stays(self, lab: Lab, flow: Flow) -> None:
        lab.pass_time(60)
        answer = told(lab, flow)
        assert (answer["reason"], answer["backend"], answer["flow_cache"]) == ("previous", "a", "miss")
        assert answer["why"] == (
            "a drains, but had the slot before: flows older than the change stay with it, for 14m more"
        )
        assert answer["slot"] == {
            "number": int(place(lab, flow).split()[1]),
            "of": 512,
            "backend": "b",
            "in_transition": True,
            "previous": "a",
            "window_left_s": WINDOW - 60,
        }
        assert answer["new_connection"] == {"backend": "b", "why": f"{place(lab, flow)} belongs to b"}

    def test_one_that_began_since_is_remembered(self, lab: Lab, flow: Flow) -> None:
        assert lab.syn(flow) == "b"
        assert told(lab, flow)["remembered"]["state"] == "opening"
        lab.send(flow)
        lab.pass_time(7)
        answer = told(lab, flow)
        assert (answer["reason"], answer["backend"], answer["flow_cache"]) == ("remembered", "b", "hit")
        assert answer["why"] == "remembered: since the pool changed this flow stays with b"
        remembered = answer["remembered"]
        assert (remembered["backend"], remembered["state"], remembered["idle_s"]) == ("b", "established", 7)
        assert remembered["fingerprint"] == f"{int(lab.plane.flow_words[lab.plane.flow_words != 0][0]) >> 32:08x}"
        assert answer["new_connection"] is None

    def test_an_old_one_that_spoke_since_is_remembered_with_the_previous_backend(self, lab: Lab, flow: Flow) -> None:
        assert lab.send(flow, FIN | ACK) == "a"
        answer = told(lab, flow)
        assert (answer["reason"], answer["backend"]) == ("remembered", "a")
        assert answer["remembered"]["state"] == "closing"
        assert answer["new_connection"]["backend"] == "b"

    def test_the_question_does_not_keep_a_flow_alive(self, lab: Lab, flow: Flow) -> None:
        lab.syn(flow)
        lab.pass_time(30)
        assert [told(lab, flow)["remembered"]["idle_s"] for _ in range(3)] == [30, 30, 30]

    def test_after_the_window_who_is_not_remembered_is_new(self, lab: Lab, flow: Flow) -> None:
        lab.pass_time(WINDOW)
        answer = told(lab, flow)
        assert (answer["reason"], answer["backend"], answer["slot"]["window_left_s"]) == ("current", "b", 0)
        assert answer["why"] == f"the time of flows older than the change is over: {place(lab, flow)} belongs to b"

    def test_a_previous_backend_in_maintenance_has_nobody(self, lab: Lab, flow: Flow) -> None:
        lab.change("a", admin=Admin.MAINT)
        answer = told(lab, flow)
        assert (answer["reason"], answer["backend"]) == ("current", "b")
        assert answer["why"] == f"a had the slot before, but is in maintenance: {place(lab, flow)} belongs to b"

    def test_nor_has_one_that_is_gone(self, lab: Lab, flow: Flow) -> None:
        lab.send(flow)
        lab.pools("bc")
        answer = told(lab, flow)
        assert (answer["reason"], answer["flow_cache"]) == ("current", "miss")
        assert answer["why"].startswith("the backend that had the slot before is gone: ")

    def test_a_memory_of_who_takes_nothing_is_told_too(self, lab: Lab, flow: Flow) -> None:
        lab.send(flow)
        lab.change("a", admin=Admin.MAINT)
        answer = told(lab, flow)
        assert (answer["reason"], answer["flow_cache"], answer["remembered"]["backend"]) == ("current", "hit", "a")
        assert answer["why"].startswith("remembered with a, which is in maintenance; a had the slot before, but ")

    def test_there_and_back(self, lab: Lab, flow: Flow) -> None:
        lab.ready("a")
        answer = told(lab, flow)
        assert (answer["reason"], answer["backend"], answer["new_connection"]) == ("previous", "a", None)
        assert answer["why"].startswith("a had the slot before, and has it again: flows older than the change stay")


def test_a_failed_backend_is_passed_over_before_its_slots_are_given_away(lab: Lab) -> None:
    flow = lab.flow(of="a")
    lab.engine.withdraw(BackendKey("web", "a"))
    trace = ask(lab, flow)
    assert (trace.reason, lab.name_of(trace.backend)) == (Reason.REHASHED, lab.send(flow))
    assert told(lab, flow)["reason"] == "remembered", "the packet was"


def test_a_backend_that_keeps_its_flows_when_it_is_down_has_them(lab: Lab) -> None:
    lab.start(service(on_down=OnDown.KEEP))
    flow = lab.flow(of="a")
    lab.engine.withdraw(BackendKey("web", "a"))
    answer = told(lab, flow)
    assert (answer["reason"], answer["backend"]) == ("kept", "a")
    assert answer["why"].endswith(", but keeps the flows that it has")
    fresh = answer["new_connection"]
    assert fresh["backend"] == lab.syn(flow) != "a"
    assert fresh["why"].endswith(f": hashed again, to {fresh['backend']}")


@pytest.mark.parametrize("policy", OnAllDown)
def test_where_all_are_down(lab: Lab, policy: OnAllDown) -> None:
    lab.start(service(on_all_down=policy))
    flow = lab.flow()
    for name in "abc":
        lab.change(name, admin=Admin.MAINT)
    answer = told(lab, flow)
    assert (answer["reason"], answer["backend"]) == ("no_backend", None)
    how = "answered with a reset" if policy is OnAllDown.REJECT else "dropped"
    assert answer["why"] == f"no backend is up (a is in maintenance, b is in maintenance, c is in maintenance): {how}"
    assert answer["new_connection"] is None


def test_a_service_without_memory_goes_by_the_slot(lab: Lab) -> None:
    lab.start(service(flows=FlowMemory.NONE))
    flow = given_away(lab)
    answer = told(lab, flow)
    assert (answer["reason"], answer["backend"], answer["flow_cache"]) == ("current", "b", "not asked")
    assert answer["why"] == f"{place(lab, flow)} belongs to b (flows: none, so no flow stays with an earlier one)"


def test_a_connection_whose_backend_was_removed_is_reset_where_that_is_wanted(lab: Lab) -> None:
    lab.start(service(on_remove=OnRemove.RESET))
    flow = lab.flow(of="a")
    lab.pools("bc")
    answer = told(lab, flow)
    assert (answer["reason"], answer["backend"], answer["flow_cache"]) == ("orphan", None, "miss")
    assert answer["why"] == "its backend was removed from the service: answered with a reset (on_remove: reset)"
    assert answer["new_connection"]["backend"] == lab.owner(flow)
    assert lab.send(flow) is None
    assert lab.syn(flow) == lab.owner(flow)


def test_where_all_flows_are_remembered_that_is_no_affair_of_a_change(lab: Lab) -> None:
    lab.start(service(flows=FlowMemory.ALL))
    flow = lab.flow()
    answer = told(lab, flow)
    assert answer["reason"] == "current"
    assert answer["why"] == f"not remembered: {place(lab, flow)} belongs to {lab.owner(flow)}"
    lab.send(flow)
    assert told(lab, flow)["why"] == f"remembered: this flow stays with {lab.owner(flow)}"


def test_a_client_that_stays_has_no_new_connections(lab: Lab) -> None:
    lab.start(service(affinity=Affinity()))
    flows = [flow for flow in lab.flows(50) if told(lab, flow)["backend"] == "a"]
    lab.drain("a")
    for flow in flows:
        answer = told(lab, flow)
        assert (answer["reason"], answer["backend"], answer["new_connection"]) == ("previous", "a", None)
        assert lab.syn(flow) == "a"
        assert told(lab, flow)["why"] == "remembered: this client stays with a"
    assert len(flows) > 5


@pytest.fixture(scope="module")
def choosing(flow_pins: None) -> Iterator[Lab]:
    with loaded("asked-and-choosing", replace(FEATURES, choice=True)) as plane:
        yield Lab(plane)


class TestSchedulersThatChoose:
    """Round robin, which has no settled slots."""

    def test_an_open_connection_stays_and_a_new_one_is_chosen_for(self, choosing: Lab) -> None:
        choosing.start(service(scheduler=Scheduler.RR))
        flow = choosing.flow()
        chosen = choosing.syn(flow)
        answer = told(choosing, flow)
        assert (answer["reason"], answer["backend"]) == ("remembered", chosen)
        assert answer["why"] == f"remembered: this flow stays with {chosen}"
        assert answer["new_connection"] is None, "a SYN on its ports would go there as well"
        choosing.send(flow, FIN | ACK)
        fresh = told(choosing, flow)["new_connection"]
        assert fresh == {"backend": None, "why": "its backend is chosen at the SYN, by rr"}

    def test_a_packet_of_no_known_connection_goes_by_its_slot(self, choosing: Lab) -> None:
        choosing.start(service(scheduler=Scheduler.RR))
        flow = choosing.flow()
        answer = told(choosing, flow)
        assert answer["why"] == f"not remembered: {place(choosing, flow)} belongs to {answer['backend']}"
        assert answer["backend"] == choosing.send(flow)

    def test_for_a_datagram_it_is_chosen_when_it_comes(self, choosing: Lab) -> None:
        choosing.start(service(scheduler=Scheduler.RR, protocol=Protocol.UDP))
        flow = choosing.flow()
        answer = told(choosing, flow)
        assert (answer["reason"], answer["backend"], answer["verdict"]) == ("to_choose", None, None)
        assert answer["why"] == "not remembered: its backend is chosen when it comes, by rr"
        chosen = choosing.send(flow)
        answer = told(choosing, flow)
        assert (answer["reason"], answer["backend"], answer["new_connection"]) == ("remembered", chosen, None)

    @pytest.mark.parametrize("protocol", Protocol)
    def test_where_nobody_serves_nothing_is_chosen(self, choosing: Lab, protocol: Protocol) -> None:
        choosing.start(service(scheduler=Scheduler.RR, protocol=protocol))
        for name in "abc":
            choosing.fail(name)
        answer = told(choosing, choosing.flow())
        assert (answer["reason"], answer["new_connection"]) == ("no_backend", None)


def test_udp_has_no_new_connections(lab: Lab) -> None:
    lab.start(service(protocol=Protocol.UDP))
    flow = given_away(lab)
    answer = told(lab, flow)
    assert (answer["reason"], answer["backend"], answer["new_connection"]) == ("previous", "a", None)
    assert "flows not remembered stay with it" in answer["why"]
    lab.send(flow)
    assert told(lab, flow)["remembered"]["state"] == "datagram"


CHANGES: dict[str, Callable[[Lab], object]] = {
    "nothing": lambda lab: None,
    "a drain": lambda lab: lab.drain("a"),
    "a failure": lambda lab: lab.fail("b"),
    "a failure that is not repaired yet": lambda lab: lab.engine.withdraw(BackendKey("web", "b")),
    "a backend more": lambda lab: lab.pools("abcd"),
    "a backend less": lambda lab: lab.pools("ab"),
    "several": lambda lab: (lab.drain("a"), lab.pools("abcd"), lab.fail("c"), lab.ready("a")),
    "a change long ago": lambda lab: (lab.drain("a"), lab.pass_time(WINDOW + 1)),
    "the end": lambda lab: [lab.fail(name) for name in "abc"],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("scheduler", [Scheduler.MAGLEV, Scheduler.SOURCE_HASH])
def test_what_is_said_is_what_happens(lab: Lab, scheduler: Scheduler, change: Callable[[Lab], object]) -> None:
    lab.start(service(scheduler=scheduler))
    flows = lab.flows(150)
    change(lab)
    for number, flow in enumerate(flows):
        if number % 3 == 0:
            lab.syn(flow)
        elif number % 3 == 1:
            lab.send(flow)
    for flow in flows:
        answer = told(lab, flow)
        fresh = answer["new_connection"]
        if number % 2:
            assert answer["backend"] == lab.send(flow, ACK)
        else:
            assert (fresh["backend"] if fresh else answer["backend"]) == lab.send(flow, SYN)
