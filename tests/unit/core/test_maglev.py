"""The slot table: its properties, and its definition played slowly, turn by turn, beside the vectorised one."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections import Counter
from fractions import Fraction
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xdplb import abi
from xdplb.core import maglev
from xdplb.core.maglev import Member, Table

SIZES = st.sampled_from([128, 256, 512, 1024])


def crowd(weights: list[int], first_id: int = 1) -> list[Member]:
    """Members whose identities do not sort like their ids."""
    return [Member(f"10.0.{i * 7 % 11}.{i}:80", first_id + i, weight) for i, weight in enumerate(weights)]


crowds = st.lists(st.integers(0, 300), max_size=24).map(crowd)
histories = st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=12), min_size=1, max_size=8)


def quota_by_id(members: list[Member], size: int) -> dict[int, int]:
    ordered = sorted(members, key=lambda member: member.identity)
    due = maglev.quotas([member.weight for member in ordered], size)
    return {member.id: int(quota) for member, quota in zip(ordered, due, strict=True)}


def counts(table: Table) -> dict[int, int]:
    return Counter(table.tolist())


def assert_quotas(table: Table, members: list[Member]) -> None:
    have = counts(table)
    assert {member.id: have.get(member.id, 0) for member in members} == quota_by_id(members, len(table))
    assert set(have) - {0} <= {member.id for member in members}


class Reference:
    """The definition in the module's docstring, one turn at a time, with exact fractions."""

    def __init__(self, table: list[int], members: list[Member]) -> None:
        self.table = list(table)
        self.size = len(table)
        self.members = sorted(members, key=lambda member: member.identity)
        self.quota = quota_by_id(members, self.size)

    def slot(self, member: Member, rank: int) -> int:
        digest = hashlib.blake2b(member.identity.encode(), digest_size=8).digest()
        offset, skip = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little") | 1
        half = self.size.bit_length() // 2
        slot = (offset + rank * skip) % self.size
        slot ^= slot >> half
        slot = slot * 0x85EBCA6B % self.size
        return slot ^ slot >> half

    def free(self) -> None:
        for slot, holder in enumerate(self.table):
            if not self.quota.get(holder):
                self.table[slot] = 0
        for member in self.members:
            preferred = [self.slot(member, rank) for rank in range(self.size)]
            own = [slot for slot in preferred if self.table[slot] == member.id]
            for slot in own[self.quota[member.id] :]:
                self.table[slot] = 0

    def turns(self) -> list[tuple[Member, int]]:
        have = Counter(self.table)
        turns = [
            (int(Fraction(2 * k + 1, 2 * self.quota[member.id]) * 2**16), order, k)
            for order, member in enumerate(self.members)
            for k in range(have[member.id], self.quota[member.id])
        ]
        return [(self.members[order], k) for _, order, k in sorted(turns)]

    def bid(self, member: Member, rank: int, free: list[int]) -> int:
        return free[bisect_left(free, self.slot(member, rank % self.size)) % len(free)]

    def play(self) -> None:
        pending, round_number = self.turns(), 0
        while pending:
            free = [slot for slot, holder in enumerate(self.table) if holder == 0]
            lost = []
            for member, k in pending:
                slot = self.bid(member, k + round_number * 0x9E3779B1, free)
                if self.table[slot] == 0:
                    self.table[slot] = member.id
                else:
                    lost.append((member, k))
            pending, round_number = lost, round_number + 1

    def repaired(self) -> list[int]:
        self.free()
        self.play()
        return self.table


@pytest.mark.parametrize(
    ("backends", "size"),
    [(0, 128), (1, 128), (2, 256), (3, 512), (50, 8192), (64, 8192), (65, 16384), (4096, 1 << 19), (8192, 1 << 20)],
)
def test_table_size_is_the_next_power_of_two(backends: int, size: int) -> None:
    assert maglev.table_size(backends) == size


def test_table_size_is_bounded() -> None:
    assert maglev.table_size(10**6) == abi.MAX_SLOTS_PER_SERVICE


@given(st.lists(st.integers(0, 2**24), min_size=1, max_size=200), SIZES)
def test_quotas_are_within_one_slot_of_the_ideal_and_use_every_slot(weights: list[int], size: int) -> None:
    due = maglev.quotas(weights, size).tolist()
    total = sum(weights)
    assert sum(due) == (size if total else 0)
    for weight, quota in zip(weights, due, strict=True):
        ideal = Fraction(size * weight, total) if total else 0
        assert abs(quota - ideal) < 1
        assert weight or quota == 0


def test_quotas_give_what_is_left_to_the_largest_remainders_and_to_the_first_of_equals() -> None:
    assert maglev.quotas([1, 1, 1], 128).tolist() == [43, 43, 42]
    assert maglev.quotas([10, 1, 10], 128).tolist() == [61, 6, 61]


@settings(max_examples=60)
@given(crowds, SIZES)
def test_build_is_its_definition(members: list[Member], size: int) -> None:
    assert maglev.build(members, size).tolist() == Reference([0] * size, members).repaired()


@settings(max_examples=40)
@given(histories, SIZES)
def test_repair_is_its_definition(history: list[list[int]], size: int) -> None:
    table = np.zeros(size, np.uint32)
    for weights in history:
        members = crowd(weights)
        expected = Reference(table.tolist(), members).repaired()
        table = maglev.repair(table, members)
        assert table.tolist() == expected


def test_build_is_its_definition_at_a_size_where_free_slots_are_found_in_every_way() -> None:
    members = crowd([3, 1, 1, 2] * 16)
    assert maglev.build(members, 8192).tolist() == Reference([0] * 8192, members).repaired()


@given(crowds, SIZES, st.randoms(use_true_random=False))
def test_build_does_not_depend_on_the_order_of_members(members: list[Member], size: int, random: Random) -> None:
    shuffled = list(members)
    random.shuffle(shuffled)
    assert np.array_equal(maglev.build(shuffled, size), maglev.build(members, size))


@given(st.lists(st.integers(0, 300), max_size=24), SIZES, st.integers(2, 60000))
def test_only_identities_decide_not_ids(weights: list[int], size: int, first_id: int) -> None:
    one, other = maglev.build(crowd(weights), size), maglev.build(crowd(weights, first_id), size)
    assert np.array_equal(np.where(one > 0, one + (first_id - 1), 0), other)


def test_build_is_the_same_in_every_process_and_version() -> None:
    """A change of this digest moves the flows of everyone who upgrades: gateways of two versions would disagree."""
    table = maglev.build(crowd([1, 2, 3, 4, 5]), 1024)
    assert hashlib.sha256(table.astype("<u4").tobytes()).hexdigest()[:16] == "78e4e27a46d6c133"


@given(crowds, SIZES)
def test_build_gives_everyone_its_quota(members: list[Member], size: int) -> None:
    assert_quotas(maglev.build(members, size), members)


@pytest.mark.parametrize("members", [[], crowd([0]), crowd([0, 0, 0])])
def test_where_nobody_has_a_weight_the_table_is_empty(members: list[Member]) -> None:
    assert not maglev.build(members, 128).any()
    assert not maglev.repair(maglev.build(crowd([1, 2]), 128), members).any()


@given(histories, SIZES)
def test_every_repair_meets_the_quotas_with_the_fewest_moves(history: list[list[int]], size: int) -> None:
    table = np.zeros(size, np.uint32)
    for weights in history:
        members = crowd(weights)
        due = quota_by_id(members, size)
        above = sum(max(0, have - due.get(holder, 0)) for holder, have in counts(table).items())
        fewest = above if any(due.values()) else np.count_nonzero(table)
        repaired = maglev.repair(table, members)
        assert_quotas(repaired, members)
        assert maglev.moved(table, repaired) == fewest
        assert np.array_equal(maglev.repair(repaired, members), repaired)
        table = repaired


@given(crowds, SIZES)
def test_repair_to_the_same_members_moves_nothing(members: list[Member], size: int) -> None:
    table = maglev.build(members, size)
    assert maglev.moved(table, maglev.repair(table, members)) == 0


def test_repair_leaves_its_argument_alone() -> None:
    table = maglev.build(crowd([1, 1]), 128)
    before = table.copy()
    maglev.repair(table, crowd([1]))
    assert np.array_equal(table, before)


def test_an_id_that_is_no_member_loses_its_slots_however_large_it_is() -> None:
    table = maglev.build(crowd([1, 1]), 128)
    table[:5] = 65535
    repaired = maglev.repair(table, crowd([1, 1]))
    assert maglev.moved(table, repaired) == 5
    assert_quotas(repaired, crowd([1, 1]))


def test_a_failure_moves_only_the_slots_of_the_one_that_failed() -> None:
    members = crowd([1] * 50)
    table = maglev.build(members, 8192)
    repaired = maglev.repair(table, members[:20] + members[21:])
    assert set(table[table != repaired].tolist()) == {members[20].id}


def test_the_slots_of_the_one_that_failed_go_to_everyone() -> None:
    members = crowd([1] * 50)
    table = maglev.build(members, 8192)
    repaired = maglev.repair(table, members[:20] + members[21:])
    heirs = counts(repaired[table == members[20].id])
    assert len(heirs) == 49
    assert max(heirs.values()) <= 5


@pytest.mark.parametrize("count", [10, 50, 200])
def test_builds_of_similar_members_are_similar(count: int) -> None:
    """Plain Maglev moves 1.5 to 7 times the minimum; independent tables would differ almost everywhere."""
    members = crowd([1] * count)
    size = maglev.table_size(count)
    table = maglev.build(members, size)
    for gone in (0, count // 2, count - 1):
        rebuilt = maglev.build(members[:gone] + members[gone + 1 :], size)
        assert maglev.moved(table, rebuilt) < 10 * size / count


@pytest.mark.parametrize("weights", [[1] * 64, [1, 2, 4, 8] * 16])
def test_slots_of_a_member_are_spread_evenly(weights: list[int]) -> None:
    """Chi-square of each member's slots over 16 stretches of the table, against the 99.99th percentile."""
    members = crowd(weights)
    table = maglev.build(members, 8192)
    for member in members:
        slots = np.flatnonzero(table == member.id)
        observed = np.bincount(slots * 16 // len(table), minlength=16)
        expected = len(slots) / 16
        assert ((observed - expected) ** 2 / expected).sum() < 44.3


def test_slots_of_a_member_do_not_stand_in_rows() -> None:
    """In a random table each slot is followed by one of the same member with a chance of one in fifty."""
    table = maglev.build(crowd([1] * 50), 8192)
    for distance in range(1, 9):
        pairs = np.count_nonzero(table == np.roll(table, distance))
        assert 100 < pairs < 250


@given(crowds, SIZES, st.integers(1, 3))
def test_a_grown_table_keeps_every_flow(members: list[Member], size: int, doublings: int) -> None:
    table = maglev.build(members, size)
    grown = maglev.resize(table, size << doublings)
    hashes = np.arange(size << doublings)
    assert np.array_equal(grown[hashes & len(grown) - 1], table[hashes & size - 1])


@given(crowds, SIZES)
def test_a_table_grown_and_shrunk_again_is_itself(members: list[Member], size: int) -> None:
    table = maglev.build(members, size)
    assert np.array_equal(maglev.resize(maglev.resize(table, 4 * size), size), table)


def test_a_resized_table_is_repaired_with_few_moves() -> None:
    members = crowd([1] * 60)
    table = maglev.resize(maglev.build(members, 8192), 16384)
    repaired = maglev.repair(table, members)
    assert_quotas(repaired, members)
    assert maglev.moved(table, repaired) <= len(members)


@pytest.mark.parametrize(
    "members",
    [
        [Member("a", 1, 1), Member("a", 2, 1)],
        [Member("a", 1, 1), Member("b", 1, 1)],
        [Member("a", 0, 1)],
    ],
)
def test_members_that_cannot_be_told_apart_are_refused(members: list[Member]) -> None:
    with pytest.raises(ValueError, match=r"same identity or the same id|at least 1"):
        maglev.build(members, 128)


@pytest.mark.parametrize("size", [0, 100, 65537])
def test_a_size_that_is_no_power_of_two_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        maglev.build(crowd([1]), size)


def test_4096_members_fill_their_table() -> None:
    members = crowd([1 + i % 7 for i in range(4096)])
    table = maglev.build(members, maglev.table_size(4096))
    assert_quotas(table, members)
    repaired = maglev.repair(table, members[:2000] + members[2001:])
    assert maglev.moved(table, repaired) == np.count_nonzero(table == members[2000].id)
