"""The order in which backends take turns: exact, and without bursts."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from xdplb.core import maglev, wrr
from xdplb.core.maglev import Member

LONGEST = 4096


def members(weights: list[int]) -> list[Member]:
    return [Member(f"10.0.0.{number:03}:80", number + 1, weight) for number, weight in enumerate(weights)]


def sequence(weights: list[int], longest: int = LONGEST) -> list[int]:
    found: list[int] = wrr.sequence(members(weights), longest).tolist()
    return found


def longest_run(ids: list[int]) -> int:
    """Of one backend, from one pass of the sequence into the next."""
    longest = run = 1
    for one, next_one in zip(ids * 2, (ids * 2)[1:], strict=False):
        run = run + 1 if one == next_one else 1
        longest = max(longest, run)
    return longest


def unevenness(ids: list[int]) -> float:
    """By how many turns anybody is off its share at most in any stretch of consecutive turns."""
    worst = 0.0
    for id_ in set(ids):
        his = np.array(ids) == id_
        ahead = np.concatenate([[0], np.cumsum(his)]) - np.arange(len(ids) + 1) * his.mean()
        worst = max(worst, float(ahead.max() - ahead.min()))
    return worst


pools = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any)


@given(pools)
def test_everybody_has_as_many_turns_as_it_weighs(weights: list[int]) -> None:
    divisor = math.gcd(*weights)
    counted = Counter(sequence(weights))
    assert counted == {number + 1: weight // divisor for number, weight in enumerate(weights) if weight}


@given(st.lists(st.integers(1, 65535), min_size=2, max_size=9), st.integers(16, 2000))
def test_where_that_takes_too_long_everybody_is_less_than_a_turn_off(weights: list[int], longest: int) -> None:
    found = Counter(sequence(weights, longest))
    length = found.total()
    assert length <= max(longest, 1)
    for number, weight in enumerate(weights):
        assert abs(found[number + 1] - length * weight / sum(weights)) < 1


@settings(max_examples=300)
@given(pools)
def test_turns_are_evenly_spread(weights: list[int]) -> None:
    assert unevenness(sequence(weights)) < 3.5


@pytest.mark.parametrize(
    ("weights", "bound"),
    [([1, 1, 1], 1), ([5, 1, 1], 1), ([10, 20, 30], 1.1), ([60, *[1] * 60], 1.1), ([1] * 100, 1), ([97, 89, 83], 1.5)],
    ids=str,
)
def test_those_of_common_weights_more_so(weights: list[int], bound: float) -> None:
    assert unevenness(sequence(weights)) <= bound


@settings(max_examples=1000)
@example([3, 4, 18, 3])
@given(pools.filter(lambda weights: sum(1 for weight in weights if weight) > 1))
def test_there_are_no_bursts(weights: list[int]) -> None:
    """Turns of one backend are 1 / weight of a pass apart: between two of the second heaviest there is room for no more
    than this many of the heaviest.
    """
    second, heaviest = sorted(weights)[-2:]
    assert longest_run(sequence(weights)) <= heaviest // second + 1


@given(pools, st.randoms())
def test_the_order_does_not_depend_on_who_was_named_first(weights: list[int], random: object) -> None:
    crowd = members(weights)
    shuffled = crowd.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert (wrr.sequence(crowd, LONGEST) == wrr.sequence(shuffled, LONGEST)).all()


def test_nobody_has_no_turns() -> None:
    assert sequence([]) == sequence([0, 0]) == []


@pytest.mark.parametrize("backends", [1, 2, 3, 8, 9, 100, 1000, 4096])
def test_the_room_of_a_service_holds_its_turns_and_all_of_its_backends(backends: int) -> None:
    room = wrr.room(maglev.table_size(backends))
    assert room.bit_count() == 1 and room >= 2 * backends
    uneven = [1 + number * 7919 % 65535 for number in range(backends)]
    assert len(sequence(uneven, room - backends)) + backends <= room
