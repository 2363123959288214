"""What the packet path remembers while larger maps are made ready is not lost when they take over."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from edges import GEOMETRY, Plane, Ticks, config, engine

from xdplb.core.flow_cache import COUNTED, WAYS, Flows
from xdplb.core.status import Statuses
from xdplb.daemon import larger_maps


def word(fingerprint: int, backend: int, tick: int = Ticks.tick) -> np.uint64:
    """An established flow, counted."""
    return np.uint64(fingerprint << 32 | backend << 14 | (tick & 0xFFF) << 2 | 1) | COUNTED


def backends(plane: Plane) -> dict[int, set[int]]:
    """Of the remembered flows: backends by fingerprint."""
    flows = Flows.decode(plane.flow_words[plane.flow_words != 0], Ticks.tick)
    found: dict[int, set[int]] = {}
    for fingerprint, backend in zip(flows.fingerprint.tolist(), flows.backend.tolist(), strict=True):
        found.setdefault(fingerprint, set()).add(backend)
    return found


@pytest.mark.parametrize("sets", [GEOMETRY.flow_sets * 4, GEOMETRY.flow_sets // 4])
def test_flows_that_began_meanwhile_are_found_in_a_cache_of_another_size(sets: int) -> None:
    old, new = Plane("old", []), Plane("new", [], replace(GEOMETRY, flow_sets=sets))
    old.flow_words[3 * WAYS] = word(1, 5)
    old.flow_words[4 * WAYS + 1] = word(2, 6)
    before, after = (engine(plane, config(), Statuses()) for plane in (old, new))
    larger_maps.catch_up(after, before)
    assert backends(new) == {1: {5}, 2: {6}}


def test_what_the_new_maps_know_already_is_newer_and_stays() -> None:
    old, new = Plane("old", []), Plane("new", [], replace(GEOMETRY, flow_sets=2 * GEOMETRY.flow_sets))
    old.flow_words[3 * WAYS] = word(1, 5)
    new.flow_words[3 * WAYS] = word(9, 7)
    before, after = (engine(plane, config(), Statuses()) for plane in (old, new))
    larger_maps.catch_up(after, before)
    assert backends(new)[9] == {7}


def test_a_cache_of_the_same_size_is_the_same_map_and_left_alone() -> None:
    old, new = Plane("old", []), Plane("new", [])
    old.flow_words[3 * WAYS] = word(1, 5)
    before, after = (engine(plane, config(), Statuses()) for plane in (old, new))
    larger_maps.catch_up(after, before)
    assert not new.flow_words.any()
