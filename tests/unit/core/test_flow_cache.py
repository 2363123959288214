"""The flow cache's words and the slots in transition, beside references that go through them one by one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import aged

from xdplb.abi import FLOW_WRAPPING, SLOT_IN_TRANSITION, FlowState, FlowTimes
from xdplb.core import flow_cache
from xdplb.core.flow_cache import TICK_MASK, TRANSITION, WAYS, Flows, resized, settle, turn

TIMES = FlowTimes(opening=60, established=900, closing=120, datagram=300)
LIMITS = {
    FlowState.OPENING: 60,
    FlowState.ESTABLISHED: 900,
    FlowState.CLOSING: 120,
    FlowState.DATAGRAM: 300,
}


def word(fingerprint: int, backend: int, tick: int, state: FlowState, counted: bool = True) -> int:
    """By hand: 32 bits, 1, 17, 12 and 2, the fingerprint first."""
    bits = f"{fingerprint:032b}{int(counted)}{backend:017b}{tick % 4096:012b}{int(state):02b}"
    assert len(bits) == 64
    return int(bits, 2)


def words(*values: int) -> flow_cache.Words:
    return np.array(values, np.uint64)


fingerprints = st.integers(0, (1 << 32) - 1)
backends = st.integers(0, (1 << 17) - 1)
ticks = st.integers(0, (1 << 32) - 1)
states = st.sampled_from(FlowState)


@given(st.lists(st.tuples(fingerprints, backends, st.integers(0, TICK_MASK), states), max_size=20), ticks)
def test_a_word_says_who_where_since_when_and_how(remembered: list[tuple[int, int, int, FlowState]], last: int) -> None:
    packed = words(*(word(who, where, last - idle, state) for who, where, idle, state in remembered))
    decoded = Flows.decode(packed, last)
    seen = zip(decoded.fingerprint, decoded.backend, decoded.idle, decoded.state, strict=True)
    assert [tuple(map(int, one)) for one in seen] == [tuple(map(int, one)) for one in remembered]


@given(fingerprints, backends, ticks, states, st.integers(0, TICK_MASK))
def test_tests_make_a_word_older_whatever_the_time(who: int, where: int, now: int, state: FlowState, age: int) -> None:
    """By `reference.aged`; a machine that just booted is at any point of the 4096 ticks."""
    (older,) = aged(words(word(who, where, now, state)), age)
    assert int(older) == word(who, where, now - age, state)
    assert aged(np.uint64(word(who, where, now, state)), age) == older


@pytest.mark.parametrize("now", [0, 1, 59, 2000, 4095, 4096, 4097, (1 << 32) - 1])
@pytest.mark.parametrize("state", FlowState)
def test_a_flow_lives_as_long_as_its_state_allows_and_not_a_tick_more(state: FlowState, now: int) -> None:
    limit = LIMITS[state]
    packed = words(*(word(1, 1, now - idle, state) for idle in (0, 1, limit - 1, limit, limit + 1, 2 * limit, 4095)))
    assert Flows.decode(packed, now).live(TIMES).tolist() == [True, True, True, True, False, False, False]


@pytest.mark.parametrize("state", FlowState)
def test_after_4096_ticks_a_flow_would_look_alive_again(state: FlowState) -> None:
    """Why those that are idle for three quarters of that are forgotten: none of the states may be that long."""
    packed = words(word(1, 1, 100, state))
    assert not Flows.decode(packed, 100 + FLOW_WRAPPING).live(TIMES).any()
    assert Flows.decode(packed, 100 + 4096).live(TIMES).all()
    assert max(LIMITS.values()) < FLOW_WRAPPING < TICK_MASK


def test_each_state_has_its_own_time() -> None:
    for state in FlowState:
        short = FlowTimes(**{**{s.name.lower(): 4000 for s in FlowState}, state.name.lower(): 5})
        packed = words(*(word(1, 1, 94, other) for other in FlowState))
        dead = {int(Flows.decode(packed, 100).state[i]) for i in np.flatnonzero(~Flows.decode(packed, 100).live(short))}
        assert dead == {state}


def test_a_flow_lives_longer_where_its_service_says_so() -> None:
    packed = words(*(word(1, 1, 100 - idle, FlowState.CLOSING) for idle in (100, 150, 151)))
    assert Flows.decode(packed, 100).live(TIMES, np.array([0, 150, 150], np.uint16)).tolist() == [True, True, False]


@dataclass(frozen=True)
class Slot:
    """One slot, as the rule has it: who has it, whether flows of another may live on, whose, and until when."""

    owner: int = 0
    in_transition: bool = False
    previous: int = 0
    deadline: int = 0

    def given_to(self, owner: int, tick: int, window: int) -> Slot:
        if owner == self.owner:
            return self
        if self.owner == 0:
            return Slot(owner, self.in_transition, self.previous, self.deadline)
        if self.in_transition and tick < self.deadline:
            return Slot(owner, True, self.previous, self.deadline)
        return Slot(owner, True, self.owner, tick + window)


SIZE = 16
tables = st.lists(st.integers(0, 4), min_size=SIZE, max_size=SIZE)


def carry_out(
    words: flow_cache.SlotWords, transitions: np.ndarray, table: list[int], tick: int, window: int
) -> tuple[flow_cache.SlotWords, np.ndarray]:
    before = words.copy(), transitions.copy()
    result = turn(words, transitions, np.array(table, np.uint32), tick, window)
    assert (words == before[0]).all() and (transitions == before[1]).all(), "what was is not touched"
    return result


def assert_are(words: flow_cache.SlotWords, transitions: np.ndarray, slots: list[Slot]) -> None:
    assert words.dtype == np.uint32 and transitions.dtype == TRANSITION
    seen = zip(words.tolist(), transitions.tolist(), strict=True)
    for number, ((value, transition), slot) in enumerate(zip(seen, slots, strict=True)):
        assert value & ~SLOT_IN_TRANSITION == slot.owner, number
        assert bool(value & SLOT_IN_TRANSITION) is slot.in_transition, number
        if slot.in_transition:
            assert transition == (slot.previous, slot.deadline), number


@settings(max_examples=300)
@given(
    changes=st.lists(st.tuples(tables, st.sampled_from([0, 0, 1, 5, 9, 10, 11, 30])), max_size=8),
    window=st.sampled_from([1, 10]),
)
def test_turning_a_table_is_giving_each_slot_away(changes: list[tuple[list[int], int]], window: int) -> None:
    words, transitions = np.zeros(SIZE, np.uint32), np.zeros(SIZE, TRANSITION)
    slots, tick = [Slot()] * SIZE, 1000
    for table, later in changes:
        tick += later
        words, transitions = carry_out(words, transitions, table, tick, window)
        slots = [slot.given_to(owner, tick, window) for slot, owner in zip(slots, table, strict=True)]
        assert_are(words, transitions, slots)


class TestOneSlot:
    """The rule in sentences; the window is 10 ticks."""

    def after(self, *history: tuple[int, int]) -> Slot:
        """Given to each (owner, at that tick) in turn."""
        words, transitions = np.zeros(1, np.uint32), np.zeros(1, TRANSITION)
        for owner, tick in history:
            words, transitions = carry_out(words, transitions, [owner], tick, 10)
        in_transition = bool(words[0] & SLOT_IN_TRANSITION)
        previous, deadline = transitions[0].tolist()
        return Slot(int(words[0]) & ~SLOT_IN_TRANSITION, in_transition, previous, deadline)

    def test_nobodys_slot_begins_no_transition(self) -> None:
        assert self.after((1, 100)) == Slot(1)

    def test_a_change_of_hands_begins_one(self) -> None:
        assert self.after((1, 100), (2, 200)) == Slot(2, True, previous=1, deadline=210)

    def test_nothing_changes_for_who_keeps_it(self) -> None:
        assert self.after((1, 100), (1, 200)) == Slot(1)
        assert self.after((1, 100), (2, 200), (2, 205), (2, 230)) == Slot(2, True, previous=1, deadline=210)

    def test_a_second_change_within_the_window_keeps_the_first_previous_backend_and_its_deadline(self) -> None:
        assert self.after((1, 100), (2, 200), (3, 209)) == Slot(3, True, previous=1, deadline=210)

    def test_at_the_deadline_it_begins_a_transition_of_its_own(self) -> None:
        assert self.after((1, 100), (2, 200), (3, 210)) == Slot(3, True, previous=2, deadline=220)

    def test_there_and_back_is_still_a_transition(self) -> None:
        """Flows that began between belong to the other one, and are remembered."""
        assert self.after((1, 100), (2, 200), (1, 205)) == Slot(1, True, previous=1, deadline=210)

    def test_given_to_nobody_and_to_another(self) -> None:
        assert self.after((1, 100), (0, 200)) == Slot(0, True, previous=1, deadline=210)
        assert self.after((1, 100), (0, 200), (2, 205)) == Slot(2, True, previous=1, deadline=210)
        assert self.after((1, 100), (0, 200), (2, 300)) == Slot(2, True, previous=1, deadline=210)


@settings(max_examples=200)
@given(
    slots=st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.integers(90, 110)), min_size=1, max_size=20),
    data=st.data(),
)
def test_a_slot_settles_once_its_time_is_over_and_nobody_remembers_a_flow_of_another(
    slots: list[tuple[int, bool, int]], data: st.DataObject
) -> None:
    held = data.draw(st.lists(st.integers(0, len(slots) - 1), max_size=len(slots)))
    words = np.array([owner | moving * SLOT_IN_TRANSITION for owner, moving, _ in slots], np.uint32)
    transitions = np.array([(1, deadline) for *_, deadline in slots], TRANSITION)
    settled = settle(words, transitions, np.array(held, np.uint32), 100)
    assert settled.tolist() == [
        moving and deadline <= 100 and number not in held for number, (_, moving, deadline) in enumerate(slots)
    ]


@given(st.lists(st.tuples(st.integers(0, (1 << 64) - 1)), max_size=6), st.sampled_from([2, 4, 8]))
def test_a_larger_cache_has_each_flow_wherever_it_may_belong(keys: list[tuple[int]], times: int) -> None:
    """The set is chosen by the lowest bits of the key's upper half, of which a word does not have more."""
    before = np.zeros(4 * WAYS, np.uint64)
    for way, (key,) in enumerate(keys):
        before[(key >> 32) % 4 * WAYS + way] = word(key % (1 << 32), 5, 1, FlowState.ESTABLISHED)
    after = resized(before, times * len(before), 1).reshape(-1, WAYS)
    for key, *_ in keys:
        assert word(key % (1 << 32), 5, 1, FlowState.ESTABLISHED, counted=False) in after[(key >> 32) % (4 * times)]
    assert np.count_nonzero(after) == times * np.count_nonzero(before)


def test_a_smaller_cache_has_those_that_were_seen_last() -> None:
    now = 100
    before = np.zeros((4, WAYS), np.uint64)
    for place in range(4 * WAYS):
        before[place % 4, place // 4] = word(place, 5, now - place, FlowState.ESTABLISHED)
    after = resized(before.reshape(-1), 2 * WAYS, now)
    kept = sorted(Flows.decode(after, now).fingerprint.tolist())
    assert kept == list(range(2 * WAYS))
    assert all(number % 2 == place // WAYS for place, number in enumerate(Flows.decode(after, now).fingerprint))
