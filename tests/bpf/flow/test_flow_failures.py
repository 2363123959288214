"""Backends that fail, come back, and go for good."""

from __future__ import annotations

import numpy as np
import pytest
from flowlab import SYN, WINDOW, Lab, healthy, service
from flowmodel import Flow

from xdplb.abi import SLOT_BACKEND
from xdplb.model import Admin, BackendKey, HealthState, OnDown

KEY = BackendKey("web", "a")


def homes_of(lab: Lab, flows: list[Flow]) -> dict[Flow, str | None]:
    return {flow: lab.owner(flow) for flow in flows}


def test_the_flows_of_a_backend_that_is_down_and_only_those_go_elsewhere(either: Lab) -> None:
    homes = homes_of(either, either.flows(300))
    either.fail("a")
    moved = {flow: either.send(flow) for flow in homes}
    assert all(now in ("b", "c") if homes[flow] == "a" else now == homes[flow] for flow, now in moved.items())
    either.pass_time(10)
    assert {flow: either.send(flow) for flow in homes} == moved, "and stay there"


class TestTheGap:
    """The flag is down already, the slots are not given away yet."""

    def withdraw(self, lab: Lab) -> None:
        lab.note(KEY, health=HealthState.DOWN)
        lab.engine.withdraw(KEY)

    def test_no_packet_goes_to_the_backend_and_no_other_flow_moves(self, either: Lab) -> None:
        homes = homes_of(either, either.flows(300))
        self.withdraw(either)
        assert not any(either.in_transition(flow) for flow in homes)
        for flow, home in homes.items():
            assert either.send(flow) in (("b", "c") if home == "a" else (home,))

    @pytest.mark.parametrize("flags", [SYN, 0x10], ids=["begun in it", "begun before"])
    def test_what_is_scheduled_in_it_stays_after_the_repair_and_after_the_recovery(
        self, either: Lab, flags: int
    ) -> None:
        flows = either.flows(100, of="a")
        self.withdraw(either)
        homes = {flow: either.send(flow, flags) for flow in flows}
        assert "a" not in homes.values()
        assert either.counted() == {"remembered": 100}
        either.engine.apply_service("web")
        assert any(either.owner(flow) != homes[flow] for flow in flows), "repair chose otherwise for some"
        assert {flow: either.send(flow) for flow in flows} == homes
        either.recover("a")
        assert {flow: either.send(flow) for flow in flows} == homes
        either.pass_time(WINDOW)
        assert {flow: either.send(flow) for flow in flows} == homes

    def test_errors_about_rescheduled_flows_follow_them(self, either: Lab) -> None:
        flows = either.flows(50, of="a")
        self.withdraw(either)
        homes = {flow: either.send(flow) for flow in flows}
        assert {flow: either.error_about(flow) for flow in flows} == homes


def test_a_flow_that_was_silent_during_the_failure_is_with_its_backend_again(either: Lab) -> None:
    silent = either.flows(100, of="a")
    either.fail("a")
    either.recover("a")
    assert either.sent_to(silent) == {"a": 100}


def test_all_down_and_one_comes_back(either: Lab) -> None:
    homes = homes_of(either, either.flows(100))
    for backend in "abc":
        either.fail(backend)
    assert either.sent_to(homes) == {None: 100}
    assert either.remembered == 0
    either.recover("b")
    assert either.sent_to(homes) == {"b": 100}


class TestKeep:
    """`on_down: keep`: a backend that is down gets no new flow, but keeps those it has."""

    @pytest.fixture(autouse=True)
    def keeping(self, lab: Lab) -> None:
        lab.start(service(on_down=OnDown.KEEP))

    def test_its_flows_stay_and_new_ones_go_elsewhere(self, lab: Lab) -> None:
        older, silent, new = (lab.flows(50, of="a") for _ in range(3))
        lab.fail("a")
        assert lab.sent_to(older) == {"a": 50}
        assert set(lab.sent_to(new, SYN)) == {"b", "c"}
        homes = {flow: lab.send(flow) for flow in new}
        lab.recover("a")
        assert lab.sent_to(older) == lab.sent_to(silent) == {"a": 50}
        assert {flow: lab.send(flow) for flow in new} == homes

    def test_in_the_gap_as_well(self, lab: Lab) -> None:
        older, new = lab.flows(50, of="a"), lab.flows(50, of="a")
        lab.note(KEY, health=HealthState.DOWN)
        lab.engine.withdraw(KEY)
        assert lab.sent_to(older) == {"a": 50}
        homes = {flow: lab.syn(flow) for flow in new}
        assert set(homes.values()) == {"b", "c"}
        lab.engine.apply_service("web")
        assert lab.sent_to(older) == {"a": 50}
        assert {flow: lab.send(flow) for flow in new} == homes

    def test_errors_about_them_too(self, lab: Lab) -> None:
        flow = lab.flow(of="a")
        lab.fail("a")
        assert lab.error_about(flow) == "a"
        assert lab.send(flow) == lab.error_about(flow) == "a"

    def test_one_that_is_in_maintenance_loses_them(self, lab: Lab) -> None:
        flows = lab.flows(50, of="a")
        lab.change("a", admin=Admin.MAINT)
        assert set(lab.sent_to(flows)) == {"b", "c"}

    def test_one_that_cannot_be_reached_loses_them(self, lab: Lab) -> None:
        flows = lab.flows(50, of="a")
        lab.change("a", next_hop=None)
        assert set(lab.sent_to(flows)) == {"b", "c"}
        lab.change("a", health=HealthState.DOWN, next_hop=healthy("a").next_hop)
        assert set(lab.sent_to(flows)) == {"b", "c"}, "and does not get them back"


class TestRemoval:
    def test_a_removed_backends_flows_and_only_those_go_elsewhere(self, either: Lab) -> None:
        homes = homes_of(either, either.flows(300))
        either.pools("bc")
        for flow, home in homes.items():
            now = either.send(flow)
            assert now == (either.owner(flow) if home == "a" else home)

    def test_its_id_is_forgotten(self, either: Lab) -> None:
        remembered, unknown = either.flows(100, of="a"), either.flows(100, of="a")
        either.drain("a")
        assert either.sent_to(remembered) == {"a": 100}
        former = either.id_of("a")
        either.pools("bc")
        plane = either.plane
        assert not (plane.flow_words >> np.uint64(14) & np.uint64(0x3FFFF) == former).any()
        assert not (plane.transitions["previous"] == former).any()
        assert not (plane.slots & np.uint32(SLOT_BACKEND) == former).any()
        for flow in remembered + unknown:
            assert either.send(flow) == either.owner(flow)

    def test_a_new_backend_that_gets_its_id_gets_none_of_its_flows(self, either: Lab) -> None:
        flows = either.flows(200, of="a")
        either.drain("a")
        assert either.sent_to(flows) == {"a": 200}
        former = either.id_of("a")
        either.pools("bc", "bcd")
        assert either.id_of("d") == former
        for flow in flows:
            assert either.send(flow) == either.owner(flow)
        others = either.flows(300, of="b")
        assert either.sent_to(others) == {"b": 300}

    def test_what_others_were_given_of_its_flows_stays_there(self, either: Lab) -> None:
        """Its flows were scheduled anew, and are as good as any other: a third change leaves them where they are."""
        flows = either.flows(100, of="a")
        either.pools("bc")
        homes = {flow: either.send(flow) for flow in flows}
        either.pools("bcd")
        either.drain("b")
        assert {flow: either.send(flow) for flow in flows} == homes

    def test_a_removed_service_leaves_no_flow_to_the_next_one(self, lab: Lab) -> None:
        old = lab.flows(50, of="a")
        lab.drain("a")
        assert lab.sent_to(old) == {"a": 50}
        lab.configure()
        assert lab.remembered == 0
        lab.configure(service("api", "xyz"))
        for flow in old:
            again = Flow("api", flow.client, flow.port)
            assert lab.send(again) == lab.owner(again)
