"""Maps that are too small: what runs out, when it shows, and that what is freed is used again."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning import (
    ROOMY,
    Machine,
    World,
    healthy,
    service,
    worlds,
)

from xdplb.abi import Geometry
from xdplb.core import maglev
from xdplb.core.allocation import CapacityExceeded


def test_ids_run_out_before_anything_is_written() -> None:
    machine = Machine(replace(ROOMY, backends=4))
    machine.become(healthy(service("s1", 2)))
    before = machine.maps.by_name()
    with pytest.raises(CapacityExceeded, match=r"backends \(now s2/b2\)"):
        machine.become(healthy(service("s1", 2), service("s2", 3)))
    assert machine.maps.by_name() == before
    fitting = healthy(service("s1", 2), service("s2", 2))
    machine.become(fitting)
    machine.assert_is(fitting)


def test_services_run_out() -> None:
    machine = Machine(replace(ROOMY, services=1))
    with pytest.raises(CapacityExceeded, match=r"services \(now s2\)"):
        machine.become(healthy(service("s1", 1), service("s2", 1)))
    assert not machine.applied.backends


def test_new_and_old_must_fit_together_for_a_while() -> None:
    machine = Machine(replace(ROOMY, services=2, backends=4, slots=512))
    for names in (("s1", 2), ("s2", 2), ("s3", 2), ("s4", 2)):
        world = healthy(service(*names))
        machine.become(world)
        machine.assert_is(world)
    assert set(machine.maps.services) <= {1, 2}


def test_one_planner_gives_again_what_it_saw_freed() -> None:
    machine = Machine(replace(ROOMY, services=2, backends=4, slots=512))
    planner = machine.planner()
    for number in range(1, 6):
        world = healthy(service(f"s{number}", 2))
        machine.carry_out(planner.whole(world.desired))
        machine.assert_is(world)


def test_everything_freed_is_used_again() -> None:
    machine = Machine(replace(ROOMY, services=4, backends=8, slots=1024))
    full = healthy(*(service(f"s{n}", 2) for n in range(1, 5)))
    for _ in range(3):
        machine.become(full)
        machine.assert_is(full)
        machine.become(healthy())
        assert not (machine.maps.services or machine.maps.backends or machine.applied.services)


@settings(max_examples=150)
@given(
    history=st.lists(st.tuples(worlds(), st.integers(1, 40)), min_size=1, max_size=6),
    slots=st.sampled_from([512, 1024, 2048]),
)
def test_running_out_and_being_cut_short_leave_something_sound_from_which_less_is_reached(
    history: list[tuple[World, int]], slots: int
) -> None:
    machine = Machine(Geometry(services=4, backends=12, slots=slots, address_buckets=64, intervals=1024))
    for world, stop_after in history:
        with suppress(CapacityExceeded):
            machine.carry_out(machine.planner().whole(world.desired), stop_after)
    machine.become(healthy())
    assert not (machine.maps.services or machine.maps.backends)
    least = healthy(service("s1", 1))
    machine.become(least)
    machine.assert_is(least)


@settings(max_examples=30)
@given(sizes=st.lists(st.sampled_from([1, 2, 5]), min_size=8, max_size=16), order=st.randoms(use_true_random=False))
def test_maps_of_twice_the_size_can_be_filled_anew_from_the_start(sizes: list[int], order: Random) -> None:
    """Whatever the order of large and small tables, and though no name stays."""
    wanted = 2 * sum(maglev.table_size(size) for size in sizes)
    machine = Machine(
        Geometry(2 * len(sizes), 2 * sum(sizes), 1 << (wanted - 1).bit_length(), address_buckets=64, intervals=1024)
    )
    for generation in range(4):
        order.shuffle(sizes)
        world = healthy(*(service(f"s{100 * (generation % 2) + n}", size) for n, size in enumerate(sizes)))
        machine.become(world)
        machine.assert_is(world)


def test_the_order_of_services_does_not_scatter_them() -> None:
    """Placed as they come, 256, 128 and 512 slots, then twice 128, 256 and 512, would leave the last one no room."""
    machine = Machine(replace(ROOMY, slots=2048))
    for generation, sizes in enumerate([(2, 1, 4), (1, 2, 4), (1, 2, 4)]):
        world = healthy(*(service(f"s{generation}{size}", size) for size in sizes))
        machine.become(world)
        machine.assert_is(world)


@pytest.mark.parametrize("seed", range(4))
def test_a_quarter_full_no_history_of_growing_and_shrinking_scatters_the_free_slots_too_much(seed: int) -> None:
    random = Random(seed)
    machine = Machine(replace(ROOMY, services=64, backends=256))
    sizes: dict[str, int] = {}
    tables: dict[str, int] = {}
    for _ in range(60):
        for number in range(20):
            if random.random() < 0.4:
                sizes[f"s{number}"] = random.choice([0, 1, 1, 2, 3, 5])
        sizes = {name: size for name, size in sizes.items() if size}
        tables = {name: max(tables.get(name, 0), maglev.table_size(size)) for name, size in sizes.items()}
        while sum(tables.values()) > ROOMY.slots // 4:
            gone = random.choice(sorted(sizes))
            del sizes[gone], tables[gone]
        world = healthy(*(service(name, size) for name, size in sizes.items()))
        machine.become(world)
        assert {name: len(applied.table) for name, applied in machine.applied.services.items()} == tables
        machine.assert_is(world)


def test_scattered_free_slots_are_no_room_but_larger_maps_are() -> None:
    """Services do not make room for others: one of each pair of neighbours leaves, a large one comes."""
    small = [service(f"s{n}", 1) for n in range(8)]
    machine = Machine(replace(ROOMY, slots=1024))
    machine.become(healthy(*small))
    rest = healthy(*small[::2])
    machine.become(rest)
    wanted = healthy(*small[::2], service("s9", 2))
    with pytest.raises(CapacityExceeded, match=r"slots \(now s9\)"):
        machine.become(wanted)
    machine.become(rest)
    machine.assert_is(rest)
    larger = Machine(replace(ROOMY, slots=2048))
    larger.become(wanted)
    larger.assert_is(wanted)
