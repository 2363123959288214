"""The flow rule, as the loaded program keeps it: no connection breaks that did not have to."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
from flowlab import ACK, FIN, RST, STILL, SYN, WINDOW, Lab, service
from flowmodel import FIRST_WINDOW, Flow

from xdplb.model import Admin, FlowMemory, Protocol, Scheduler

MIDDLES = {"data": ACK, "the end": FIN | ACK, "a reset": RST, "nothing": 0, "a simultaneous open": SYN | ACK}


def by_way(lab: Lab, flows: list[Flow], *changes: tuple[str, str]) -> dict[tuple[str | None, ...], list[Flow]]:
    """Carries out the changes, and tells the flows apart by the backends that their slots had one after another."""
    ways: dict[Flow, list[str | None]] = {flow: [lab.owner(flow)] for flow in flows}
    for name, backend in changes:
        getattr(lab, name)(backend)
        for flow, way in ways.items():
            way.append(lab.owner(flow))
    found = defaultdict(list)
    for flow, way in ways.items():
        found[tuple(way)].append(flow)
    return found


def test_settled_slots_leave_no_trace(either: Lab) -> None:
    for flow in either.flows(10_000):
        home = either.owner(flow)
        assert either.syn(flow) == either.send(flow) == either.send(flow, FIN | ACK) == home
    assert either.remembered == 0
    assert either.counted() == {}


def test_slots_that_did_not_change_hands_go_on_without_a_trace(either: Lab) -> None:
    either.drain("a")
    for flow in either.flows(500):
        if not either.in_transition(flow):
            assert either.syn(flow) == either.send(flow) == either.owner(flow)
    assert either.remembered == 0


def test_a_flow_that_begins_after_the_change_goes_to_the_current_backend_and_stays(either: Lab) -> None:
    flow = either.flow(of="a")
    either.drain("a")
    current = either.owner(flow)
    assert either.syn(flow) == current != "a"
    assert either.counted() == {"remembered": 1}
    assert either.send(flow) == current
    assert either.counted() == {"remembered": 1, "recalled": 1}
    either.pass_time(WINDOW)
    assert either.send(flow) == current


@pytest.mark.parametrize("flags", MIDDLES.values(), ids=MIDDLES.keys())
def test_a_flow_that_began_before_the_change_goes_to_the_previous_backend_and_stays(either: Lab, flags: int) -> None:
    flow = either.flow(of="a")
    either.drain("a")
    assert either.send(flow, flags) == "a"
    assert either.counted() == {"remembered": 1}
    either.pass_time(STILL.opening)
    assert either.send(flow, flags) == "a"
    assert either.counted() == {"remembered": 1, "recalled": 1}


def test_after_the_window_a_flow_that_nobody_remembers_goes_to_the_current_backend(either: Lab) -> None:
    last, late = either.flows(2, of="a")
    either.drain("a")
    either.pass_time(WINDOW - 1)
    assert either.send(last) == "a"
    either.pass_time(1)
    assert either.send(late) == either.owner(late) != "a"
    assert either.send(last) == "a", "what is remembered stays, beyond the window too"


def test_who_sends_now_and_then_is_remembered_for_ever(lab: Lab) -> None:
    flow = lab.flow(of="a")
    lab.drain("a")
    for _ in range(10):
        assert lab.send(flow) == "a"
        lab.pass_time(WINDOW)
        assert lab.settle() > 0


LIMITS = {"a SYN alone": (SYN, 60), "data": (ACK, 900), "a FIN": (FIN | ACK, 120), "a reset": (RST, 120)}


@pytest.mark.parametrize(("flags", "limit"), LIMITS.values(), ids=LIMITS.keys())
def test_an_idle_flow_is_remembered_as_long_as_its_state_allows(lab: Lab, flags: int, limit: int) -> None:
    lab.start(service(), window=10)
    flow = lab.flow(of="a")
    lab.drain("a")
    home = lab.send(flow, flags)
    lab.ready("a")
    lab.drain(str(home))
    lab.pass_time(limit)
    lab.settle()
    assert lab.send(flow) == home
    lab.pass_time(901)
    assert lab.settle() == 0
    assert lab.send(flow) == lab.owner(flow) != home


@pytest.mark.parametrize(("flags", "limit"), LIMITS.values(), ids=LIMITS.keys())
def test_the_slot_of_a_flow_settles_when_it_has_been_idle_for_longer(lab: Lab, flags: int, limit: int) -> None:
    lab.start(service(), window=10)
    flow = lab.flow(of="a")
    lab.drain("a")
    home = str(lab.send(flow, flags))
    if home != "a":
        lab.drain(home)
        lab.ready("a")
    lab.pass_time(limit)
    assert lab.settle() == 1
    lab.pass_time(1)
    assert lab.settle() == 0


def test_the_last_acknowledgement_does_not_open_a_closing_flow_again(lab: Lab) -> None:
    lab.start(service(), window=10)
    flow = lab.flow(of="a")
    lab.drain("a")
    for flags in (ACK, FIN | ACK, ACK):
        assert lab.send(flow, flags) == "a"
    lab.pass_time(120)
    assert lab.settle() == 1
    lab.pass_time(1)
    assert lab.settle() == 0


def test_two_changes_within_a_window(either: Lab) -> None:
    """Older than the first: with a, though two have had the slot since. Begun between: with b. New ones: with c."""
    ways = by_way(either, either.flows(60), ("drain", "a"))
    older, between, new = ways["a", "b"][:3]
    assert either.syn(between) == "b"
    either.pass_time(WINDOW // 2)
    either.drain("b")
    assert either.send(older) == "a"
    assert either.send(between) == "b"
    assert either.syn(new) == either.send(new) == "c"
    either.pass_time(WINDOW // 2)
    assert (either.send(older), either.send(between), either.send(new)) == ("a", "b", "c")


def test_the_window_is_that_of_the_first_of_two_changes(either: Lab) -> None:
    ways = by_way(either, either.flows(60), ("drain", "a"))
    late = ways["a", "b"][0]
    either.pass_time(WINDOW // 2)
    either.drain("b")
    either.pass_time(WINDOW // 2)
    assert either.send(late) == "c"


def test_a_change_after_the_window_begins_one_of_its_own(either: Lab) -> None:
    """Flows older than that one are with b: either they began there, or lost their memory of a."""
    ways = by_way(either, either.flows(60), ("drain", "a"))
    remembered, unknown = ways["a", "b"][:2]
    assert either.send(remembered) == "a"
    either.pass_time(WINDOW)
    either.drain("b")
    assert either.send(remembered) == "a"
    assert either.send(unknown) == "b"


def test_there_and_back_within_a_window(either: Lab) -> None:
    """The slot is its first backend's again, but those that began with the second stay there."""
    flows = either.flows(200)
    first = {flow: either.owner(flow) for flow in flows}
    either.drain("a")
    homes = {flow: either.syn(flow) for flow in flows[::2]}
    either.ready("a")
    back = [flow for flow in flows if either.in_transition(flow) and either.owner(flow) == "a"]
    assert len(back) > 50
    for flow in back:
        if flow in homes:
            assert either.send(flow) == homes[flow] != "a"
        else:
            assert either.send(flow) == first[flow]
    new = [flow for flow in either.flows(200, of="a") if either.in_transition(flow)]
    assert either.sent_to(new, SYN) == {"a": len(new)}


def test_a_draining_backend_gets_no_new_flow_and_one_of_weight_0_neither(either: Lab) -> None:
    either.drain("a")
    either.change("b", weight=0)
    assert either.sent_to(either.flows(500), SYN) == {"c": 500}


class TestASynOnPortsInUse:
    """Anybody can send one, in anybody's name."""

    def test_goes_to_the_backend_that_has_the_flow_and_changes_nothing(self, either: Lab) -> None:
        flows = either.flows(10, of="a")
        either.drain("a")
        assert either.sent_to(flows) == {"a": 10}
        either.pass_time(STILL.reuse - 1)
        before = either.plane.flow_words.copy()
        for _ in range(20):
            assert either.sent_to(flows, SYN) == {"a": 10}
        assert (either.plane.flow_words == before).all()
        assert either.sent_to(flows) == {"a": 10}

    @pytest.mark.parametrize("last", [FIN | ACK, RST], ids=["closing", "reset"])
    def test_begins_anew_where_the_flow_is_at_its_end(self, either: Lab, last: int) -> None:
        flow = either.flow(of="a")
        either.drain("a")
        assert either.send(flow) == either.send(flow, last) == "a"
        assert either.syn(flow) == either.send(flow) == either.owner(flow) != "a"
        assert either.remembered == 1

    def test_begins_anew_where_the_flow_was_silent_for_long(self, either: Lab) -> None:
        flow = either.flow(of="a")
        either.drain("a")
        assert either.send(flow) == "a"
        either.pass_time(STILL.reuse)
        assert either.syn(flow) == either.send(flow) == either.owner(flow) != "a"
        assert either.remembered == 1

    def test_begins_anew_where_the_backend_is_down(self, either: Lab) -> None:
        flow = either.flow(of="a")
        either.drain("a")
        assert either.send(flow) == "a"
        either.fail("a")
        assert either.syn(flow) == either.send(flow) == either.owner(flow) != "a"


NEW = {
    "an acknowledgement": (ACK, 1),
    "data before it": (ACK, 1 + 1460),
    "data after that of a fast open": (ACK, 1 + 1200),
    "the last of a first window": (ACK, FIRST_WINDOW - 1),
    "a reset": (RST, 1),
    "a simultaneous open": (SYN | ACK, 0),
    "a short life": (FIN | ACK, 1),
}
OTHER = {
    "far ahead": (ACK, FIRST_WINDOW),
    "behind": (ACK, -1),
    "half round": (FIN | ACK, 1 << 31),
    "a reset": (RST, -9),
}


class TestASynOnThePortsOfAFlowThatIsNotRemembered:
    """It is older than the change and was silent since. Sequence numbers tell it from the one that the SYN began."""

    @pytest.fixture
    def flow(self, either: Lab) -> Flow:
        flow = either.flow(of="a")
        either.drain("a")
        return flow

    @pytest.mark.parametrize("number", [0, 7, (1 << 32) - 2], ids=["zero", "seven", "that comes round"])
    @pytest.mark.parametrize(("flags", "ahead"), NEW.values(), ids=NEW.keys())
    def test_a_segment_that_follows_the_syn_is_the_new_flows(
        self, either: Lab, flow: Flow, flags: int, ahead: int, number: int
    ) -> None:
        home = either.owner(flow)
        assert either.syn(flow, number) == either.send(flow, flags, number + ahead) == home != "a"
        assert either.send(flow, ACK, number + ahead + 1) == home, "from then on it is known"

    @pytest.mark.parametrize("number", [0, 7, (1 << 32) - 2], ids=["zero", "seven", "that comes round"])
    @pytest.mark.parametrize(("flags", "ahead"), OTHER.values(), ids=OTHER.keys())
    def test_another_is_the_older_ones_and_it_stays_where_it_is(
        self, either: Lab, flow: Flow, flags: int, ahead: int, number: int
    ) -> None:
        assert either.syn(flow, number) == either.owner(flow) != "a"
        assert either.send(flow, flags, number + ahead) == "a"
        assert either.send(flow, ACK, number + 1) == "a", "from then on it is known"
        assert either.remembered == 1

    def test_nor_do_many_syns_move_it(self, either: Lab, flow: Flow) -> None:
        for number in range(0, 1 << 32, 1 << 26):
            assert either.syn(flow, number) == either.owner(flow)
        assert either.send(flow, ACK, 12345) == "a"
        for number in range(0, 1 << 32, 1 << 26):
            assert either.syn(flow, number) == "a"

    @pytest.mark.parametrize("numbers", [(5000, 9 << 20), (9 << 20, 5000), (5000, 9 << 20, 5000)])
    def test_a_strangers_syn_beside_the_clients_own_does_not_make_the_new_flow_an_old_one(
        self, either: Lab, flow: Flow, numbers: tuple[int, ...]
    ) -> None:
        home = either.owner(flow)
        assert [either.syn(flow, number) for number in numbers] == [home] * len(numbers)
        assert either.send(flow, ACK, 5001) == home

    def test_a_syn_that_comes_again_and_again_is_one(self, either: Lab, flow: Flow) -> None:
        home = either.owner(flow)
        for _ in range(3):
            assert either.syn(flow, 5000) == home
            either.pass_time(7)
        assert either.send(flow, ACK, 5001) == home

    @pytest.mark.parametrize("end", [FIN | ACK, RST], ids=["closed", "reset"])
    def test_what_comes_late_of_a_flow_that_closed_is_no_older_flow(self, either: Lab, flow: Flow, end: int) -> None:
        assert either.send(flow, end, 1 << 20) == "a"
        assert either.syn(flow, 7 << 20) == either.owner(flow) != "a"
        assert either.send(flow, ACK, 1 << 20) == either.send(flow, ACK, (7 << 20) + 1) == either.owner(flow)

    def test_a_flow_that_was_silent_for_long_returns_to_the_backend_where_it_was_remembered(self, either: Lab) -> None:
        """Which had the slot in between, and was neither its first backend nor its last one."""
        flow = by_way(either, either.flows(60), ("drain", "a"))["a", "b"][0]
        assert either.syn(flow, 5000) == either.send(flow, ACK, 5001) == "b"
        either.drain("b")
        either.pass_time(STILL.reuse)
        assert either.owner(flow) == either.syn(flow, 9 << 20) == "c"
        assert either.send(flow, ACK, 5500) == either.send(flow, ACK, (9 << 20) + 1) == "b"

    def test_a_syn_that_goes_to_the_silent_flows_own_backend_changes_nothing_for_it(self, either: Lab) -> None:
        flow = by_way(either, either.flows(60), ("drain", "a"))["a", "b"][0]
        assert either.syn(flow, 5000) == either.send(flow, ACK, 5001) == "b"
        either.pass_time(STILL.reuse)
        assert either.syn(flow, 9 << 20) == "b"
        either.plane.syn_records["tag"] = 1
        either.drain("b")
        either.pass_time(STILL.opening + 1)
        assert either.owner(flow) == "c" and either.send(flow, ACK, 5500) == "b"

    def test_where_the_record_is_gone_the_cache_is_believed_until_the_handshake_must_have_failed(
        self, either: Lab
    ) -> None:
        early, late = either.flows(2, of="a")
        either.drain("a")
        assert either.sent_to([early, late], SYN) == Counter([either.owner(early), either.owner(late)])
        either.plane.syn_records["tag"] = 1
        either.pass_time(STILL.opening)
        assert either.send(early, ACK, 1 << 30) == either.owner(early) != "a"
        either.pass_time(1)
        assert either.send(late, ACK, 1 << 30) == "a"

    def test_the_record_of_another_flow_is_none(self, either: Lab) -> None:
        first = either.flow(of="a")
        second = either.flow(of="a")
        while either.record(second) != either.record(first):
            second = either.flow(of="a")
        either.drain("a")
        for flow in (first, second):
            assert either.syn(flow, 5000) == either.owner(flow) != "a"
        assert either.send(first, ACK, 1 << 30) == either.owner(first), "it may be a new one, so nothing breaks"
        assert either.send(second, ACK, 1 << 30) == "a"

    def test_the_counts_stay_right(self, choosing: Lab) -> None:
        choosing.start(service(flows=FlowMemory.ALL))
        flows = choosing.flows_apart(50, of="a")
        choosing.drain("a")
        choosing.sent_to(flows, SYN, 1 << 20)
        assert choosing.active()["a"] == 0
        choosing.sent_to(flows, ACK, 1 << 30)
        assert choosing.active() == {"a": 50, "b": 0, "c": 0}


def test_when_all_drain_new_flows_are_refused_and_old_ones_stay(either: Lab) -> None:
    flows = either.flows(100)
    homes = {flow: either.owner(flow) for flow in flows}
    for backend in "abc":
        either.drain(backend)
    assert all(either.send(flow) == homes[flow] for flow in flows)
    assert either.sent_to(either.flows(20), SYN) == {None: 20}


def test_weights_move_slots_and_no_flow(either: Lab) -> None:
    flows = either.flows(500)
    homes = {flow: either.owner(flow) for flow in flows}
    for weight in (5, 1, 20):
        either.change("a", weight=weight)
        assert all(either.send(flow) == homes[flow] for flow in flows)
    assert either.counted()["remembered"] < len(flows)


class TestDatagrams:
    """UDP tells no beginning: within the window everything that is not known is older than the change."""

    @pytest.fixture(params=[4, 6], ids=["ipv4", "ipv6"], autouse=True)
    def udp(self, lab: Lab, request: pytest.FixtureRequest) -> None:
        lab.start(service(version=request.param, protocol=Protocol.UDP))

    def test_within_the_window_they_go_to_the_previous_backend(self, lab: Lab) -> None:
        flow = lab.flow(of="a")
        lab.drain("a")
        assert lab.send(flow) == "a"
        lab.pass_time(WINDOW // 4)
        assert lab.send(flow) == "a"
        assert lab.counted() == {"remembered": 1, "recalled": 1}

    def test_after_it_to_the_current_one(self, lab: Lab) -> None:
        late = lab.flow(of="a")
        lab.drain("a")
        lab.pass_time(WINDOW)
        assert lab.send(late) == lab.owner(late) != "a"

    def test_they_are_forgotten_sooner(self, lab: Lab) -> None:
        lab.start(service(protocol=Protocol.UDP), window=10)
        flow = lab.flow(of="a")
        lab.drain("a")
        assert lab.send(flow) == "a"
        lab.pass_time(300)
        assert lab.settle() == 1
        lab.pass_time(1)
        assert lab.settle() == 0


class TestErrorsAboutFlows:
    """ICMP errors go where the flow's own packets would, and leave no trace."""

    def test_of_a_settled_slot(self, either: Lab) -> None:
        for flow in either.flows(50):
            assert either.error_about(flow) == either.owner(flow)

    def test_about_a_remembered_flow(self, either: Lab) -> None:
        older, newer = either.flows(2, of="a")
        either.drain("a")
        homes = either.send(older), either.syn(newer)
        either.pass_time(WINDOW)
        assert (either.error_about(older), either.error_about(newer)) == homes == ("a", either.owner(newer))

    def test_about_a_flow_older_than_the_change(self, either: Lab) -> None:
        flow = either.flow(of="a")
        either.drain("a")
        assert either.error_about(flow) == "a"
        either.pass_time(WINDOW)
        assert either.error_about(flow) == either.owner(flow)
        assert either.remembered == 0 and either.counted() == {}

    def test_they_do_not_keep_a_flow_alive(self, lab: Lab) -> None:
        lab.start(service(), window=10)
        flow = lab.flow(of="a")
        lab.drain("a")
        assert lab.send(flow, FIN) == "a"
        lab.pass_time(100)
        assert lab.error_about(flow) == "a"
        lab.pass_time(21)
        assert lab.settle() == 0

    def test_of_a_service_that_remembers_nothing(self, lab: Lab) -> None:
        lab.start(service(flows=FlowMemory.NONE))
        flows = lab.flows(50)
        lab.drain("a")
        assert all(lab.error_about(flow) == lab.send(flow) == lab.owner(flow) for flow in flows)


class TestSourceHash:
    """All flows of a client have one slot, yet each is remembered by itself."""

    @pytest.fixture(autouse=True)
    def by_source(self, lab: Lab) -> None:
        lab.start(service(scheduler=Scheduler.SOURCE_HASH))

    def test_a_clients_flows_share_a_slot(self, lab: Lab) -> None:
        one = lab.flow()
        flows = [Flow("web", one.client, port) for port in range(1024, 1074)]
        assert lab.sent_to(flows, SYN) == {lab.owner(one): 50}

    def test_a_new_flow_of_the_client_does_not_take_the_old_ones_along(self, lab: Lab) -> None:
        older = lab.flow(of="a")
        newer = Flow("web", older.client, older.port + 1)
        lab.drain("a")
        assert lab.syn(newer) == lab.owner(newer) != "a"
        assert lab.send(older) == "a"
        assert lab.send(newer) == lab.owner(newer)
        assert lab.error_about(older) == "a"

    def test_many_flows_of_one_client_are_told_apart(self, lab: Lab) -> None:
        client = lab.flow(of="a").client
        older = [Flow("web", client, port) for port in range(1024, 9024)]
        newer = [Flow("web", client, port) for port in range(9024, 17024)]
        lab.drain("a")
        current = lab.owner(older[0])
        for old, new in zip(older, newer, strict=True):
            assert (lab.send(old), lab.syn(new)) == ("a", current)
        assert lab.counted() == {"remembered": 16_000}
        lab.pass_time(WINDOW)
        assert lab.sent_to(older) == {"a": 8000}
        assert lab.sent_to(newer) == {current: 8000}


def test_maintenance_takes_the_flows_away_too(either: Lab) -> None:
    flows = either.flows(200)
    homes = {flow: either.owner(flow) for flow in flows}
    either.change("a", admin=Admin.MAINT)
    moved = Counter(homes[flow] for flow in flows if either.send(flow) != homes[flow])
    assert set(moved) == {"a"} and moved["a"] == sum(home == "a" for home in homes.values())
