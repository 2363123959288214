"""The planner's invariant: cut a plan anywhere, no map entry refers to something that is not there, and planning
again from there converges. The maps are played by a model of their own, which sees nothing but the operations.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from ipaddress import IPv4Address

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from planning import (
    DOWN,
    ROOMY,
    Machine,
    World,
    cut,
    healthy,
    service,
    statuses,
    with_status,
    worlds,
)

from xdplb.abi import BackendFlag
from xdplb.core.operations import (
    AppliedService,
    BackendEntry,
    ClearBackend,
    ClearService,
    Operation,
    Publish,
    PutBackend,
    PutService,
    PutSlots,
)
from xdplb.core.status import BackendStatus
from xdplb.model import (
    Backend,
    BackendKey,
)


@settings(max_examples=60)
@given(history=st.lists(worlds(), min_size=2, max_size=4))
def test_a_plan_cut_anywhere_is_sound_and_converges_when_planned_again(history: list[World]) -> None:
    machine = Machine()
    for world in history:
        whole = machine.copy()
        operations = whole.become(world)
        whole.assert_is(world)
        for count in range(len(operations)):
            restarted, _ = cut(machine, world, count)
            restarted.become(world)
            restarted.assert_is(world)
            assert restarted.maps.by_name() == whole.maps.by_name()

            retried, planner = cut(machine, world, count)
            retried.carry_out(planner.whole(world.desired))
            retried.assert_is(world)
            assert retried.maps.by_name() == whole.maps.by_name()
        machine = whole


@settings(max_examples=60)
@given(before=worlds(), after=worlds(), third=worlds())
def test_a_plan_cut_anywhere_can_be_given_up_for_another(before: World, after: World, third: World) -> None:
    machine = Machine()
    machine.become(before)
    for count in range(len(machine.copy().become(after))):
        for goal in (before, third):
            given_up, _ = cut(machine, after, count)
            given_up.become(goal)
            given_up.assert_is(goal)


@settings(max_examples=100)
@given(before=worlds(), after=worlds(), data=st.data())
def test_services_that_stay_as_they_are_need_not_be_planned(before: World, after: World, data: st.DataObject) -> None:
    """By one planner, as a daemon has it."""
    machine = Machine()
    planner = machine.planner()
    machine.carry_out(planner.whole(before.desired))
    known = {desired.config.name: desired for desired in before.desired}
    stay = [s for s in after.desired if known.get(s.config.name) == s and data.draw(st.booleans())]
    changed = [s for s in after.desired if s not in stay]
    machine.carry_out(planner.whole(changed, [s.config for s in stay]))
    machine.assert_is(after)
    assert list(planner.whole([], [s.config for s in after.desired])) == []


@given(world=worlds(), verdicts=st.lists(st.tuples(st.integers(0, 14), statuses), max_size=8), data=st.data())
def test_verdicts_are_planned_service_by_service_and_sound_at_each_step(
    world: World, verdicts: list[tuple[int, BackendStatus]], data: st.DataObject
) -> None:
    machine = Machine()
    machine.become(world)
    planner = machine.planner()
    for which, status in verdicts if world.statuses else ():
        key = list(world.statuses)[which % len(world.statuses)]
        world = with_status(world, key, status)
        desired = next(d for d in world.desired if d.config.name == key.service)
        length = len(list(machine.copy().planner().service(desired)))
        machine.carry_out(planner.service(desired), data.draw(st.integers(0, length)))
        machine.carry_out(planner.service(desired))
    machine.assert_is(world)


@settings(max_examples=100)
@given(before=worlds(), after=worlds())
def test_whoever_goes_down_does_so_before_any_slot_changes_and_before_anybody_comes_up(
    before: World, after: World
) -> None:
    machine = Machine()
    machine.become(before)
    was_up = {key for key, (_, entry) in machine.applied.backends.items() if BackendFlag.UP in entry.flags}
    steps = []
    for operation in machine.become(after):
        match operation:
            case PutBackend(key, _, entry) if BackendFlag.UP not in entry.flags:
                steps.append("down" if key in was_up else "other")
            case PutBackend(key) if key not in was_up:
                steps.append("up")
            case PutSlots():
                steps.append("slots")
    downs = [index for index, step in enumerate(steps) if step == "down"]
    others = [index for index, step in enumerate(steps) if step in ("up", "slots")]
    assert max(downs, default=-1) < min(others, default=len(steps))


def test_adding_goes_from_backend_to_address_and_removing_back() -> None:
    machine = Machine()
    kinds = [type(operation) for operation in machine.become(healthy(service("s1")))]
    assert kinds == [PutBackend, PutBackend, PutSlots, PutService, Publish]
    kinds = [type(operation) for operation in machine.become(healthy())]
    assert kinds == [Publish, ClearService, ClearBackend, ClearBackend]


def test_a_removed_backend_leaves_the_slots_before_its_entry_goes() -> None:
    machine = Machine()
    machine.become(healthy(service("s1", 3)))
    kinds = [type(operation) for operation in machine.become(healthy(service("s1", 2)))]
    assert kinds == [PutSlots, Publish, ClearBackend], "the 512 slots stay, for all that 256 would do"


def test_a_verdict_moves_the_fewest_slots_and_its_reversal_restores_quotas() -> None:
    machine = Machine()
    up = healthy(service("s1", 4))
    machine.become(up)
    before = machine.maps.slots.copy()
    machine.become(with_status(up, ("s1", "b0"), DOWN))
    assert np.count_nonzero(machine.maps.slots != before) == 128
    machine.become(up)
    machine.assert_is(up)


def test_growing_leaves_every_flow_of_a_backend_that_stays_within_its_quota() -> None:
    """A table of twice the size repeats the old one before it is repaired."""
    machine = Machine()
    machine.become(healthy(service("s1", 2)))
    old = machine.maps.table(machine.maps.services[1][1]).copy()
    machine.become(healthy(service("s1", 3)))
    new = machine.maps.table(machine.maps.services[1][1])
    assert len(new) == 2 * len(old)
    moved = new != np.tile(old, 2)
    assert set(new[moved].tolist()) == {3}, "only the new backend gains"


def test_a_table_keeps_its_size_while_the_service_lives() -> None:
    """Half of it would move every other flow. A service that comes again begins anew."""
    machine = Machine()
    sizes = []
    for backends in (1, 5, 1, 2, 9, 1, 0, 1):
        machine.become(healthy(*([service("s1", backends)] if backends else [])))
        sizes += [len(applied.table) for applied in machine.applied.services.values()]
    assert sizes == [128, 1024, 1024, 1024, 2048, 2048, 128]


def test_slots_that_move_or_change_hands_tell_where_their_flows_are_from() -> None:
    machine = Machine()

    def origins(world: World) -> list[tuple[int, tuple[int, int] | None]]:
        return [(put.first, put.origin) for put in machine.become(world) if isinstance(put, PutSlots)]

    assert origins(healthy(service("s1", 2))) == [(0, None)]
    assert origins(with_status(healthy(service("s1", 2)), ("s1", "b0"), DOWN)) == [(0, (0, 256))]
    assert origins(healthy(service("s1", 3))) == [(512, (0, 256))]
    assert origins(healthy(service("s2", 2))) == [(0, None)], "another service, at slots that were the first one's"


def test_a_renamed_backend_never_meets_its_predecessors_id() -> None:
    machine = Machine()
    machine.become(healthy(service("s1", (Backend("old", IPv4Address("10.0.0.1"), 80),))))
    machine.become(healthy(service("s1", (Backend("new", IPv4Address("10.0.0.1"), 80),))))
    assert machine.applied.backends.keys() == {("s1", "new")}
    assert machine.applied.backends[BackendKey("s1", "new")][0] == 2
    machine.become(healthy(service("s1", (Backend("newest", IPv4Address("10.0.0.1"), 80),))))
    assert machine.applied.backends[BackendKey("s1", "newest")][0] == 1, "free ids are used again, the lowest first"


def test_swapped_addresses_move_no_slots() -> None:
    """The names stay, so do their ids: only what the entries say changes."""
    machine = Machine()
    one, two = Backend("one", IPv4Address("10.0.0.1"), 80), Backend("two", IPv4Address("10.0.0.2"), 80)
    machine.become(healthy(service("s1", (one, two))))
    swapped = (replace(one, address=two.address), replace(two, address=one.address))
    kinds = {type(operation) for operation in machine.become(healthy(service("s1", swapped)))}
    assert PutSlots not in kinds


def test_a_service_that_is_cut_off_before_its_entry_is_forgotten_without_harm() -> None:
    """It has slots but no id yet; id 0 must not get into circulation, with the same planner neither."""
    machine, planner = cut(Machine(), healthy(service("s1")), 3)
    assert isinstance(machine.applied.services["s1"], AppliedService)
    assert machine.applied.services["s1"].entry is None
    machine.carry_out(planner.whole([]))
    machine.carry_out(planner.whole(healthy(service("s2"), service("s3")).desired))
    assert 0 not in machine.maps.services


def test_a_service_is_looked_up_at_its_old_slots_until_its_entry_is_written() -> None:
    """Nobody else may move in there meanwhile, though with what is free behind it, it is the first gap."""
    machine = Machine(replace(ROOMY, slots=4096))
    machine.become(healthy(service("s1", 3)))
    grown = healthy(service("s1", 5))
    kinds = [type(operation) for operation in machine.copy().become(grown)]
    machine, _ = cut(machine, grown, kinds.index(PutSlots) + 1)
    filled = healthy(service("s3", 6), service("s1", 5))
    machine.become(filled)
    machine.assert_is(filled)


def test_slots_that_fill_a_gap_are_not_given_again_at_the_end() -> None:
    """The last service moves away, a large one fills the place and more behind it, then a small one comes."""
    machine = Machine(replace(ROOMY, slots=1024))
    applied = {"s1": (0, 1), "s2": (768, 1)}
    for name, (first, backends) in applied.items():
        world = healthy(service(name, backends))
        machine.carry_out(_at(first, planned) for planned in machine.planner().service(world.desired[0]))
    planner = machine.planner()
    machine.carry_out(planner.whole(healthy(service("s1", 1)).desired))
    for new in (service("s3", 4), service("s4", 1)):
        machine.carry_out(planner.service(healthy(new).desired[0]))


def _at(first: int, operation: Operation) -> Operation:
    match operation:
        case PutSlots():
            return replace(operation, first=first)
        case PutService(entry=entry):
            return replace(operation, entry=replace(entry, slots=first))
    return operation


def test_adopted_maps_are_written_anew_with_the_ids_and_slots_they_have() -> None:
    """What an earlier daemon left: ids, places and tables are known, entries are not."""
    machine = Machine()
    world = healthy(service("s1", 3), service("s2", 2))
    machine.become(world)
    before = machine.maps.by_name()
    for name, known in machine.applied.services.items():
        machine.applied.services[name] = AppliedService(known.id, known.first, known.table)
    for key, (id_, _) in machine.applied.backends.items():
        machine.applied.backends[key] = (id_, BackendEntry.unknown())
    machine.applied.published = Publish((), ())
    kinds = Counter(type(operation) for operation in machine.become(world))
    assert kinds == {PutBackend: 5, PutService: 2, Publish: 1}, "no slot is touched: no flow moves"
    assert machine.maps.by_name() == before
