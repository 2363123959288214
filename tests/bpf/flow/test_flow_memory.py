"""The flow cache: who gives place to whom when it is full, what ends, what settles, who is told apart."""

from __future__ import annotations

import numpy as np
import pytest
from flowlab import ACK, FIN, STILL, SYN, WINDOW, Lab, service
from flowmodel import Flow
from reference import aged

from xdplb.abi import FLOW_WRAPPING, SLOT_IN_TRANSITION, FlowState
from xdplb.core.flow_cache import Flows
from xdplb.daemon import flow_upkeep
from xdplb.model import FlowMemory

PLACES = 8


def counted(lab: Lab, *names: str) -> tuple[int, ...]:
    found = lab.counted()
    return tuple(found.get(name, 0) for name in names)


class TestAFullSet:
    """Eight flows are remembered, and there is no place for more."""

    def fill(self, lab: Lab, flags: int = ACK) -> list[Flow]:
        """Eight of a, which drains; the first has been silent for longest."""
        flows = lab.flows(PLACES, of="a")
        lab.drain("a")
        for flow in flows:
            lab.pass_time(1)
            assert lab.send(flow, flags) == ("a" if flags != SYN else lab.owner(flow))
        lab.pass_time(1)
        assert lab.remembered == PLACES
        return flows

    def fresh(self, lab: Lab, number: int = 1) -> list[Flow]:
        """New flows of slots that a had."""
        found: list[Flow] = []
        while len(found) < number:
            flow = lab.flow()
            found += [flow] if lab.in_transition(flow) else []
        return found

    def test_no_syn_takes_the_place_of_a_live_flow(self, tiny: Lab) -> None:
        flows = self.fill(tiny)
        before = tiny.plane.flow_words.copy()
        assert tiny.sent_to(self.fresh(tiny, 500), SYN) == {"a": 500}
        assert (tiny.plane.flow_words == before).all()
        assert counted(tiny, "not_remembered", "evicted_live", "evicted_idle") == (500, 0, 0)
        assert tiny.sent_to(flows) == {"a": PLACES}

    def test_a_flow_without_a_place_is_like_those_older_than_the_change_from_its_syn_on(self, tiny: Lab) -> None:
        self.fill(tiny)
        (flow,) = self.fresh(tiny)
        assert tiny.owner(flow) != "a"
        for flags in (SYN, ACK, ACK, FIN | ACK, ACK):
            assert tiny.send(flow, flags) == "a"

    def test_the_next_packet_takes_the_place_of_the_one_that_was_silent_for_longest_and_that_is_counted(
        self, tiny: Lab
    ) -> None:
        flows = self.fill(tiny)
        newcomers = self.fresh(tiny, 3)
        assert tiny.sent_to(newcomers) == {"a": 3}
        assert counted(tiny, "evicted_live", "not_remembered") == (3, 0)
        recalled = counted(tiny, "recalled")[0]
        assert tiny.sent_to(flows[3:] + newcomers) == {"a": PLACES}
        assert counted(tiny, "recalled")[0] == recalled + PLACES, "all but the first three are still there"
        assert tiny.sent_to(flows[:3]) == {"a": 3}, "they are back with their backend: the window is open"
        assert counted(tiny, "evicted_live") == (6,)

    def test_a_new_flow_takes_the_place_of_one_that_ended(self, tiny: Lab) -> None:
        flows = self.fill(tiny)
        tiny.pass_time(500)
        assert tiny.sent_to(flows[1:]) == {"a": PLACES - 1}
        tiny.pass_time(500)
        (flow,) = self.fresh(tiny)
        assert tiny.syn(flow) == tiny.send(flow) == tiny.owner(flow)
        assert counted(tiny, "evicted_idle", "evicted_live", "not_remembered") == (1, 0, 0)
        assert tiny.sent_to(flows[1:]) == {"a": PLACES - 1}

    def test_what_closes_has_ended_sooner(self, tiny: Lab) -> None:
        flows = self.fill(tiny)
        tiny.pass_time(100)
        assert tiny.send(flows[5], FIN | ACK) == "a"
        early, late = self.fresh(tiny, 2)
        tiny.pass_time(120)
        assert tiny.syn(early) == "a"
        tiny.pass_time(1)
        assert tiny.syn(late) == tiny.send(late) == tiny.owner(late)
        assert counted(tiny, "evicted_idle", "evicted_live", "not_remembered") == (1, 0, 1)

    def test_and_of_one_that_never_got_beyond_its_syn(self, tiny: Lab) -> None:
        self.fill(tiny, SYN)
        newcomers = self.fresh(tiny, PLACES)
        for flow in newcomers:
            assert tiny.syn(flow) == tiny.owner(flow)
        assert counted(tiny, "evicted_idle", "evicted_live", "not_remembered") == (PLACES, 0, 0)
        (late,) = self.fresh(tiny)
        assert tiny.syn(late) == "a", "but not within the tick: a flood would drive out its own century of beginners"

    def test_a_free_place_is_taken_before_one_that_ended_and_that_before_a_beginner(self, tiny: Lab) -> None:
        flows = self.fill(tiny)
        tiny.plane.flow_words[3] = 0
        words = tiny.plane.flow_words
        words[5] = words[5] & ~np.uint64(3) | np.uint64(FlowState.OPENING)
        tiny.pass_time(50)
        words[6] = aged(words[6], 901)
        newcomers = self.fresh(tiny, 4)
        places = []
        for flow in newcomers:
            before = words.copy()
            tiny.syn(flow)
            places += np.flatnonzero(words != before).tolist()
        assert places == [3, 6, 5]
        assert counted(tiny, "evicted_idle", "evicted_live", "not_remembered") == (2, 0, 1)
        assert flows

    def test_ports_that_begin_anew_need_no_other_place(self, tiny: Lab) -> None:
        flows = self.fill(tiny, FIN | ACK)
        for flow in flows:
            assert tiny.syn(flow) == tiny.owner(flow) != "a"
        assert tiny.remembered == PLACES
        assert counted(tiny, "remembered", "not_remembered") == (PLACES, 0)


class TestTheBudget:
    """A CPU remembers so many flows a tick and no more."""

    def test_beyond_it_flows_are_like_those_older_than_the_change(self, either: Lab) -> None:
        flows = either.flows(5, of="a")
        either.drain("a")
        either.spend_budget(STILL.budget - 2)
        assert [either.syn(flow) for flow in flows] == [*(either.owner(flow) for flow in flows[:2]), "a", "a", "a"]
        assert counted(either, "remembered", "not_remembered") == (2, 3)
        assert [either.send(flow) for flow in flows[2:]] == ["a", "a", "a"]
        assert either.remembered == 2
        either.pass_time(1)
        either.spend_budget(0)
        assert [either.send(flow) for flow in flows[2:]] == ["a", "a", "a"]
        assert either.remembered == 5

    def test_the_next_tick_has_its_own(self, lab: Lab) -> None:
        flow = lab.flow(of="a")
        lab.drain("a")
        lab.spend_budget(STILL.budget, tick=lab.clock.tick - 1)
        assert lab.syn(flow) == lab.owner(flow)
        assert counted(lab, "remembered", "not_remembered") == (1, 0)

    def test_what_is_remembered_costs_nothing_of_it(self, lab: Lab) -> None:
        flow = lab.flow(of="a")
        lab.drain("a")
        assert lab.send(flow) == "a"
        lab.spend_budget(STILL.budget)
        assert lab.send(flow) == "a"
        assert lab.send(flow, FIN | ACK) == "a"
        assert lab.syn(flow) == lab.send(flow) == lab.owner(flow)
        assert counted(lab, "not_remembered") == (0,)


class TestServicesThatRememberNothing:
    """`flows: none`, for questions and answers."""

    @pytest.fixture(autouse=True)
    def stateless(self, lab: Lab) -> None:
        lab.start(service(flows=FlowMemory.NONE))

    def test_every_packet_goes_to_the_current_backend(self, lab: Lab) -> None:
        flows = lab.flows(300)
        for change, backend in (("drain", "a"), ("ready", "a"), ("fail", "b"), ("recover", "b")):
            getattr(lab, change)(backend)
            for flow in flows:
                assert lab.syn(flow) == lab.send(flow) == lab.owner(flow)
        assert lab.remembered == 0 and lab.counted() == {}

    def test_in_the_gap_after_a_failure_all_packets_of_a_flow_agree(self, lab: Lab) -> None:
        flows = lab.flows(100, of="a")
        key = next(key for key in lab.engine.applied.backends if key.backend == "a")
        lab.engine.withdraw(key)
        for flow in flows:
            assert lab.syn(flow) == lab.send(flow) == lab.error_about(flow) in ("b", "c")
        assert lab.remembered == 0


class TestServicesAreToldApart:
    def test_the_same_client_and_ports_to_two_services(self, lab: Lab) -> None:
        lab.start(service(), service("api", "xyz", number=2))
        ours = lab.flows(200)
        theirs = [Flow("api", flow.client, flow.port) for flow in ours]
        homes = {flow: lab.owner(flow) for flow in ours + theirs}
        lab.drain("a")
        lab.drain("x", "api")
        for _ in range(2):
            for flow in ours + theirs:
                assert lab.send(flow) == homes[flow]
        assert lab.counted() == {"remembered": lab.remembered, "recalled": lab.remembered}

    def test_in_one_set_as_well(self, tiny: Lab) -> None:
        names = ["web", "s1", "s2", "s3"]
        tiny.start(*(service(name, "abc", number=number + 1) for number, name in enumerate(names)))
        flows = [tiny.flow()]
        while len(flows) < len(names) or {tiny.owner(flow) for flow in flows} != {"a"}:
            one = tiny.flow(of="a")
            flows = [Flow(name, one.client, one.port) for name in names]
        for name in names:
            tiny.drain("a", name)
        homes = {flow: tiny.send(flow) for flow in flows}
        assert tiny.remembered == 4
        for _ in range(3):
            assert {flow: tiny.send(flow) for flow in flows} == homes
        assert counted(tiny, "remembered", "recalled") == (4, 12)

    def test_no_packet_goes_to_another_services_backend_whatever_the_maps_say(self, lab: Lab) -> None:
        """An id that was given again while a packet was on its way may stand where nobody forgot it."""
        lab.start(service(), service("api", "xyz", number=2))
        flow, unknown = lab.flows(2, of="a")
        lab.drain("a")
        assert lab.send(flow) == "a"
        (place,) = np.flatnonzero(lab.plane.flow_words)
        backends = np.uint64(0x1FFFF << 14)
        foreign = lab.id_of("x", "api")
        lab.plane.flow_words[place] = lab.plane.flow_words[place] & ~backends | np.uint64(foreign << 14)
        lab.plane.transitions["previous"] = foreign
        for one in (flow, unknown):
            assert lab.error_about(one) == lab.send(one) == lab.owner(one)


class TestSettling:
    def test_only_slots_that_need_it_no_longer_are_taken_out_of_transition(self, either: Lab) -> None:
        elder, younger = either.flows(20, of="a"), either.flows(20, of="a")
        homes = {flow: either.owner(flow) for flow in either.flows(500)}
        either.drain("a")
        began = {flow: either.syn(flow) for flow in younger}
        assert {flow: either.send(flow) for flow in younger} == began
        assert either.sent_to(elder) == {"a": 20}
        moving = np.flatnonzero(either.plane.slots & np.uint32(SLOT_IN_TRANSITION))
        assert either.settle() == len(moving), "not before the window is over"
        either.pass_time(WINDOW)
        words = either.plane.flow_words.copy()
        held = {either.slot(flow) for flow in elder}
        assert either.settle() == len(held)
        assert set(np.flatnonzero(either.plane.slots & np.uint32(SLOT_IN_TRANSITION))) == held
        assert (either.plane.flow_words == words).all(), "nobody is forgotten who lives"
        assert either.sent_to(elder) == {"a": 20}
        assert {flow: either.send(flow) for flow in younger} == began
        for flow, home in homes.items():
            assert either.send(flow) == either.owner(flow) and (home == "a" or either.owner(flow) == home)

    def test_a_flow_of_the_current_backend_needs_no_memory(self, lab: Lab) -> None:
        flow = lab.flow(of="a")
        lab.drain("a")
        home = lab.syn(flow)
        assert lab.send(flow) == home
        lab.pass_time(WINDOW)
        assert lab.settle() == 0
        assert lab.send(flow) == home
        assert "recalled" not in lab.counted() or lab.counted()["recalled"] == 1

    def test_with_several_services_each_has_its_own_slots(self, lab: Lab) -> None:
        lab.start(service(), service("api", "xyz", number=2), service("dns", "klm", number=3))
        held = {}
        for name, first in (("web", "a"), ("api", "x"), ("dns", "k")):
            (flow,) = lab.flows(1, first, name)
            lab.drain(first, name)
            assert lab.send(flow) == first
            held[lab.slot(flow)] = flow
        lab.pass_time(WINDOW)
        assert lab.settle() == 3
        assert set(np.flatnonzero(lab.plane.slots & np.uint32(SLOT_IN_TRANSITION))) == held.keys()

    def test_a_flow_that_ended_is_not_taken_for_a_later_one_of_the_same_ports(self, lab: Lab) -> None:
        """Remembered with a, ended; its slot settles with b; its ports begin anew there, unseen; the slot moves on."""
        flow = lab.flow(of="a")
        lab.drain("a")
        assert lab.send(flow, FIN | ACK) == "a"
        lab.pass_time(WINDOW)
        assert lab.settle() == 0
        home = str(lab.owner(flow))
        assert lab.syn(flow) == lab.send(flow) == home != "a"
        lab.drain(home)
        assert lab.owner(flow) != home
        assert lab.send(flow) == home

    def test_a_flow_that_sleeps_longer_than_its_time_is_remembered_while_its_slot_is_in_transition(
        self, lab: Lab
    ) -> None:
        """It ended, as far as one can tell; but a window that is longer still costs nothing to keep to."""
        lab.start(service(), window=2000)
        flow = lab.flow(of="a")
        lab.drain("a")
        home = lab.syn(flow)
        assert lab.send(flow) == home != "a"
        lab.pass_time(1500)
        lab.settle()
        assert lab.send(flow) == home

    def test_who_sleeps_until_its_tick_comes_round_again_is_forgotten_before(self, lab: Lab) -> None:
        lab.start(service(), window=4000)
        flow = lab.flow(of="a")
        lab.drain("a")
        assert lab.send(flow) == "a"
        lab.pass_time(FLOW_WRAPPING)
        lab.settle()
        assert lab.remembered == 1
        lab.pass_time(1)
        lab.settle()
        assert lab.remembered == 0


def test_live_flows_are_counted_by_backend(lab: Lab) -> None:
    flows = lab.flows(30, of="a")
    lab.drain("a")
    assert lab.sent_to(flows[:10]) == {"a": 10}
    began = lab.sent_to(flows[10:], SYN)
    lab.pass_time(60)
    assert {key.backend: n for key, n in flow_upkeep.remembered(lab.engine).items()} == {"a": 10, **began}
    lab.pass_time(1)
    assert {key.backend: n for key, n in flow_upkeep.remembered(lab.engine).items()} == {"a": 10}


def test_a_word_is_what_the_control_plane_takes_it_for(either: Lab) -> None:
    flow = either.flow(of="a")
    either.drain("a")
    assert either.send(flow) == "a"
    (word,) = either.plane.flow_words[np.flatnonzero(either.plane.flow_words)]
    seen = Flows.decode(np.array([word], np.uint64), either.clock.tick)
    assert (int(seen.backend[0]), int(seen.idle[0]), int(seen.state[0])) == (
        either.id_of("a"),
        0,
        FlowState.ESTABLISHED,
    )
    applied = either.engine.applied.services["web"]
    assert applied.first + int(seen.fingerprint[0]) % len(applied.table) == either.slot(flow)


def test_a_table_that_grows_and_moves_takes_every_flow_along(either: Lab) -> None:
    """From 3 backends to 600: other slots, 256 times as many, and nearly all of them change hands."""
    lab = either
    remembered, began, unknown = lab.flows(100, of="a"), lab.flows(100, of="a"), lab.flows(300)
    homes = {flow: lab.owner(flow) for flow in unknown}
    lab.drain("a")
    assert lab.sent_to(remembered) == {"a": 100}
    homes |= dict.fromkeys(remembered, "a") | {flow: lab.syn(flow) for flow in began}
    before = lab.engine.applied.services["web"].first
    names = ["a", "b", "c", *(f"n{number}" for number in range(597))]
    lab.pools(names)
    applied = lab.engine.applied.services["web"]
    assert applied.first != before and len(applied.table) == 1 << 17
    assert {flow: lab.send(flow) for flow in homes} == homes
    new = lab.flows(300)
    assert len(lab.sent_to(new, SYN)) > 150
    lab.pass_time(WINDOW)
    left = lab.settle()
    assert left == len({lab.slot(flow) for flow, home in homes.items() if lab.owner(flow) != home})
    assert {flow: lab.send(flow) for flow in homes} == homes
