"""The engine's part of the rule: what is urgent, what is only rehearsed, larger maps, and time as it really passes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from flowlab import FEATURES, GEOMETRY, PIN_ROOT, SYN, WINDOW, Lab, loaded, service

from xdplb.abi import BackendFlag, FlowTimes
from xdplb.core.allocation import CapacityExceeded
from xdplb.core.flow_cache import Flows
from xdplb.daemon import flow_upkeep, larger_maps
from xdplb.daemon.larger_maps import SHARED_MAPS
from xdplb.dataplane import syscall
from xdplb.model import BackendKey, Config, HealthState, OnAllDown, Service

KEY = BackendKey("web", "a")


class TestWithdrawing:
    def test_it_takes_the_flag_away_and_leaves_the_slots(self, lab: Lab) -> None:
        slots = lab.plane.slots.copy()
        lab.note(KEY, health=HealthState.DOWN)
        lab.engine.withdraw(KEY)
        flags = [entry.flags for _, entry in lab.engine.applied.backends.values()]
        assert [BackendFlag.UP in flag for flag in flags] == [False, True, True]
        assert (lab.plane.slots == slots).all()
        assert "a" not in lab.sent_to(lab.flows(200))

    def test_the_repair_that_follows_makes_good_for_it_either_way(self, lab: Lab) -> None:
        lab.engine.withdraw(KEY)
        lab.engine.apply_service("web")
        flow = lab.flow(of="a")
        assert lab.send(flow) == "a", "it was a false alarm"
        lab.note(KEY, health=HealthState.DOWN)
        lab.engine.withdraw(KEY)
        lab.engine.apply_service("web")
        assert "a" not in lab.table()

    def test_nobody_is_withdrawn_where_all_serve_when_nobody_is_healthy(self, lab: Lab) -> None:
        lab.start(service(on_all_down=OnAllDown.FAIL_OPEN))
        for backend in "abc":
            lab.fail(backend)
            lab.engine.withdraw(BackendKey("web", backend))
        assert set(lab.sent_to(lab.flows(200))) == {"a", "b", "c"}

    def test_who_is_not_there_yet_needs_no_withdrawing(self, lab: Lab) -> None:
        lab.engine.adopt_config(replace(lab.engine.config, services=(service(backends="abcd"),)))
        lab.engine.withdraw(BackendKey("web", "d"))
        assert BackendKey("web", "d") not in lab.engine.applied.backends


def memories(lab: Lab) -> list[np.ndarray]:
    plane = lab.plane
    arrays = [plane.slots, plane.flow_words, plane.backends.raw, plane.services.raw]
    return [one.copy() for one in (*arrays, plane.transitions, plane.addresses.view(np.uint8))]


class TestRehearsing:
    def config(self, lab: Lab, *services: Service) -> Config:
        return replace(lab.engine.config, services=services)

    def assert_untouched(self, lab: Lab, config: Config) -> None:
        before, applied, statuses = memories(lab), lab.engine.applied.copy(), lab.engine.statuses.copy()
        try:
            lab.engine.rehearse(config)
        finally:
            assert all((a == b).all() for a, b in zip(before, memories(lab), strict=True))
            assert lab.engine.applied.backends == applied.backends
            assert lab.engine.applied.services.keys() == applied.services.keys()
            assert lab.engine.applied.published == applied.published
            assert lab.engine.statuses == statuses
            assert lab.engine.config != config

    def test_what_fits_raises_nothing_and_writes_nothing(self, lab: Lab) -> None:
        self.assert_untouched(lab, self.config(lab, service(backends="bcdef"), service("api", "xyz", number=2)))
        flows = lab.flows(100)
        assert all(lab.send(flow) == lab.owner(flow) for flow in flows)

    @pytest.mark.parametrize("what", ["services", "backends", "slots"])
    def test_what_does_not_fit_is_told_before_anything_is_written(self, lab: Lab, what: str) -> None:
        names = [f"n{number}" for number in range(300)]
        too_many = {
            "services": [service(f"s{number}", "a", number=number) for number in range(1, 18)],
            "backends": [service(f"s{number}", names, number=number) for number in range(1, 8)],
            "slots": [service(f"s{number}", names, number=number) for number in range(1, 5)],
        }[what]
        with pytest.raises(CapacityExceeded, match=what):
            self.assert_untouched(lab, self.config(lab, *too_many))


@contextmanager
def larger(lab: Lab) -> Iterator[Lab]:
    """The lab on maps of twice the size, with the flows' own still the same ones."""
    pins = PIN_ROOT / "larger"
    pins.mkdir(parents=True)
    for name in SHARED_MAPS:
        syscall.pin(lab.plane.fd(name), pins / name)
    sizes = ("backends", "slots", "address_buckets", "intervals")
    with loaded("larger", geometry=replace(GEOMETRY, **{name: 2 * getattr(GEOMETRY, name) for name in sizes})) as plane:
        grown = Lab(plane)
        grown.engine = larger_maps.moved(lab.engine, plane)
        yield grown


def test_larger_maps_go_on_with_every_flow(lab: Lab) -> None:
    lab.start(service(), service("api", "xyz", number=2))
    remembered, began, unknown = lab.flows(50, of="a"), lab.flows(50, of="a"), lab.flows(300)
    others = lab.flows(100, service="api")
    homes = {flow: lab.owner(flow) for flow in unknown + others}
    lab.drain("a")
    homes |= {flow: lab.send(flow) for flow in remembered} | {flow: lab.syn(flow) for flow in began}
    ids = {key: id_ for key, (id_, _) in lab.engine.applied.backends.items()}
    counted, table = lab.counted(), lab.table()
    packets = {id_: lab.plane.read_counter("backend_counters", id_).tolist() for id_ in ids.values()}
    with larger(lab) as grown:
        assert {key: id_ for key, (id_, _) in grown.engine.applied.backends.items()} == ids
        assert grown.table() == table
        assert grown.counted() == counted
        assert {id_: grown.plane.read_counter("backend_counters", id_).tolist() for id_ in packets} == packets
        assert list(grown.engine._planner.whole([grown.engine.desired(s) for s in grown.engine.config.services])) == []
        assert {flow: grown.send(flow) for flow in homes} == homes
        assert "a" not in grown.sent_to(lab.flows(200), SYN)
        assert flow_upkeep.remembered(grown.engine)[KEY] >= 50
        grown.pass_time(WINDOW)
        assert grown.settle() == len({grown.slot(flow) for flow in homes if grown.owner(flow) != homes[flow]})
        assert {flow: grown.send(flow) for flow in homes} == homes


def test_larger_maps_take_what_the_small_ones_could_not(lab: Lab) -> None:
    flows = lab.flows(200)
    homes = {flow: lab.owner(flow) for flow in flows}
    names = ["a", "b", "c", *(f"n{number}" for number in range(1200))]
    with pytest.raises(CapacityExceeded):
        lab.engine.rehearse(replace(lab.engine.config, services=(service(backends=names),)))
    with larger(lab) as grown:
        grown.pools(names)
        assert {flow: grown.send(flow) for flow in flows} == homes


QUICK = FlowTimes(opening=2, established=200, closing=4, datagram=10, tick_shift=0)


@pytest.fixture(scope="module")
def fast(flow_pins: None) -> Iterator[Lab]:
    with loaded("fast", replace(FEATURES, times=QUICK)) as plane:
        yield Lab(plane)


@pytest.mark.alone
class TestTimeThatReallyPasses:
    """A tick is a timer interrupt here, a hundredth of a second at most."""

    def wait_until(self, lab: Lab, tick: int) -> None:
        while lab.clock.tick < tick:
            time.sleep(1 / lab.clock.frequency)

    def test_the_program_and_the_control_plane_have_one_clock(self, fast: Lab) -> None:
        fast.start(service())
        flow = fast.flow(of="a")
        fast.drain("a")
        before = fast.clock.tick
        assert fast.send(flow) == "a"
        words = fast.plane.flow_words[np.flatnonzero(fast.plane.flow_words)]
        now = fast.clock.tick
        assert 0 <= int(Flows.decode(words, now).idle[0]) <= now - before

    def test_the_window_ends_and_flows_do(self, fast: Lab) -> None:
        fast.start(service(), window=100)
        early, late = fast.flows(2, of="a")
        fast.drain("a")
        changed = fast.clock.tick
        assert fast.send(early) == "a"
        self.wait_until(fast, changed + 100)
        assert fast.send(late) == fast.owner(late) != "a"
        assert fast.send(early) == "a"
        seen = fast.clock.tick
        assert fast.settle() == 1
        self.wait_until(fast, seen + 202)
        assert fast.settle() == 0
        assert fast.send(early) == fast.owner(early)
