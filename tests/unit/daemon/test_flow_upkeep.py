"""Slots in transition as the daemon tends them: what is looked at, where most of millions need nothing."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from xdplb.abi import SLOT_IN_TRANSITION, FlowTimes
from xdplb.core import flow_cache
from xdplb.core.operations import AppliedService
from xdplb.daemon import flow_upkeep

NOW = 1000


class Plane:
    """Slots of two services of 8, the second of which does not settle, and a place beside them. No flows."""

    def __init__(self, in_transition: dict[int, int]) -> None:
        self.slots = np.full(24, 5, np.uint32)
        self.transitions = np.zeros(24, flow_cache.TRANSITION)
        for slot, deadline in in_transition.items():
            self.slots[slot] |= np.uint32(SLOT_IN_TRANSITION)
            self.transitions["deadline"][slot] = deadline
        self.flows_looked_at = 0
        self.features = SimpleNamespace(times=FlowTimes())
        none = np.zeros(4, np.uint32)
        self.services = SimpleNamespace(entries={"slots": none, "slot_mask": none, "keep_idle": none})
        self.backends = SimpleNamespace(entries={"service": none})

    @property
    def flow_words(self) -> np.ndarray:
        self.flows_looked_at += 1
        return np.zeros(8, np.uint64)


def settled(in_transition: dict[int, int]) -> tuple[int, set[int], int]:
    """How many are left by the answer, which ones, and how often the flows were looked at."""
    plane, table = Plane(in_transition), np.full(8, 5, np.uint32)
    services = {"web": AppliedService(1, 0, table), "rr": AppliedService(2, 8, table, settles=False)}
    engine = SimpleNamespace(plane=plane, clock=SimpleNamespace(tick=NOW), applied=SimpleNamespace(services=services))
    left = flow_upkeep.settle(engine)  # type: ignore[arg-type]
    assert not np.any((plane.slots & ~np.uint32(SLOT_IN_TRANSITION)) != 5)
    return left, set(np.flatnonzero(plane.slots & np.uint32(SLOT_IN_TRANSITION)).tolist()), plane.flows_looked_at


def test_flows_are_looked_at_only_where_the_time_of_a_slot_is_over() -> None:
    assert settled({}) == (0, set(), 0)
    assert settled({1: NOW + 1, 7: NOW + 9}) == (2, {1, 7}, 0)
    assert settled({1: NOW + 1, 7: NOW}) == (1, {1}, 1)
    assert settled({0: NOW - 1, 2: NOW}) == (0, set(), 1)


def test_what_never_settles_stays_and_what_is_of_no_service_is_left_alone() -> None:
    assert settled({8: 0, 15: NOW}) == (2, {8, 15}, 0)
    assert settled({16: 0, 23: NOW}) == (0, {16, 23}, 0)
