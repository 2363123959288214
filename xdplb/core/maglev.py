"""A service's slot table: weighted Maglev with exact quotas, and the smallest possible repair of it.

Source: Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016, section 3.4. As there,
each member has a permutation of the slots of its own, and members take turns at the slots they like best. Different are
the quotas (exact), the order of turns (by deadline) and the procedure (in rounds, which NumPy plays for all turns at
once). By definition:

- A member's *quota* q is its share of the slots by weight; see `quotas`. It has the turns k = 0 … q-1, the k-th with
  the *deadline* floor((k + 1/2) / q · 2^16). Turns are ordered by deadline, then by the member's identity, then by k.
- A member's *rank-j slot* is scatter(offset + j · skip mod size): offset and odd skip are the halves of a digest of its
  identity, scatter is one fixed permutation. The identity is all that counts; ids only stand in the result.
- In round r = 0, 1, … every turn still pending bids for its member's slot of rank k + r · STRIDE mod size or, where
  that is taken, for the next free one after it, cyclically. A slot goes to the first of its bidders in the order of
  turns. A round serves at least one turn, in practice half of them; the rounds end when no turn is pending.

A *repair* frees the slots of highest rank of each member above its quota, and all slots of whoever is no member. Then
members below their quota play for the free slots, by the same rounds, the turns k = (slots they have) … q-1. No other
slot moves. To build is to repair an empty table.

Tables are arrays of `uint32`, one id a slot, 0 for nobody; their sizes are powers of two, at most 2^20.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xdplb import abi

STRIDE = 0x9E3779B1
"""How far apart in a member's permutation two bids of one turn are; odd, 2^32 over the golden ratio."""

_SCATTER = np.uint32(0x85EBCA6B)
_GATHER = np.uint32(pow(0x85EBCA6B, -1, 1 << 32))
_DEADLINE_BITS = 16

_IDENTITY = attrgetter("identity")

Table = NDArray[np.uint32]
Indices = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Member:
    """`identity` (as "10.0.0.11:80") decides which slots are its own; `id` is what stands in them.

    Ids are indices into the map of backends: never 0, and small (time and memory go with the largest).
    """

    identity: str
    id: int
    weight: int


def table_size(backends: int) -> int:
    """The smallest power of two that gives each backend its SLOTS_PER_BACKEND, within what a table may have."""
    wanted = max(abi.MIN_SLOTS, abi.SLOTS_PER_BACKEND * backends)
    return min(1 << (wanted - 1).bit_length(), abi.MAX_SLOTS_PER_SERVICE)


def quotas(weights: ArrayLike, size: int) -> NDArray[np.int64]:
    """How many of `size` slots each weight is due: floor(size · w / W), and the rest to the largest remainders.

    Each is less than one slot off the ideal; the sum is `size`, unless no weight is above 0. The first of equals wins.
    """
    weight = np.asarray(weights, np.int64)
    total = int(weight.sum())
    if total == 0:
        return np.zeros(len(weight), np.int64)
    due, remainder = np.divmod(weight * size, total)
    left = size - int(due.sum())
    due[np.argsort(-remainder, kind="stable")[:left]] += 1
    return due


def build(members: Iterable[Member], size: int) -> Table:
    """A new table. Zeros where no member has a weight."""
    return repair(np.zeros(size, np.uint32), members)


def repair(table: Table, members: Iterable[Member]) -> Table:
    """A copy of `table` that gives `members` their quotas; the fewest slots possible have changed.

    That is the sum of max(0, slots it has - quota) over all ids that stand in the table. ValueError if two members have
    the same identity or id, or if the table's size is not a power of two.
    """
    size = len(table)
    if size.bit_count() != 1:
        raise ValueError(f"a table has a power of two of slots, not {size}")
    crowd = _Crowd.of(members)
    quota = quotas(crowd.weights, size)
    holder = table.astype(np.intp)
    have = np.bincount(holder, minlength=crowd.id_end)
    free = _slots_to_free(holder, crowd, quota, have)
    repaired = table.copy()
    repaired[free] = 0
    if quota.any():
        _play(repaired, _FreeSlots(free, size), _pending_turns(crowd, np.minimum(have[crowd.ids], quota), quota))
    return repaired


def resize(table: Table, size: int) -> Table:
    """The table at another size, with each flow (its hash masked by size - 1) where it was, as far as possible.

    A larger table repeats the old one: no flow moves. A smaller one is its beginning.
    """
    return np.resize(table, size)


def moved(before: Table, after: Table) -> int:
    """How many slots differ between two tables of one size."""
    return int(np.count_nonzero(before != after))


@dataclass(frozen=True, slots=True)
class _Crowd:
    """Members in the order of their identities."""

    identities: Sequence[str]
    ids: Indices
    weights: NDArray[np.int64]
    id_end: int

    @classmethod
    def of(cls, members: Iterable[Member]) -> _Crowd:
        ordered = sorted(members, key=_IDENTITY)
        identities = [member.identity for member in ordered]
        ids = [member.id for member in ordered]
        if len(set(identities)) < len(ordered) or len(set(ids)) < len(ordered):
            raise ValueError("two members with the same identity or the same id")
        if ids and min(ids) < 1:
            raise ValueError("a member's id is at least 1")
        weights = np.array([member.weight for member in ordered], np.int64)
        return cls(identities, np.array(ids, np.intp), weights, max(ids, default=0) + 1)

    def permutations(self, who: Indices) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """Offsets and skips of the members at the indices `who`."""
        digests = np.array([_digest(self.identities[i]) for i in who], np.uint64)
        return digests.astype(np.uint32), (digests >> np.uint64(32)).astype(np.uint32) | np.uint32(1)


@lru_cache(maxsize=2 * abi.MAX_BACKENDS)
def _digest(identity: str) -> int:
    return int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=8).digest(), "little")


def _slots_to_free(holder: Indices, crowd: _Crowd, quota: NDArray[np.int64], have: Indices) -> Indices:
    """Sorted: all slots of those who are no members, and the worst-ranked ones of members above their quota.

    `holder` is the table; `have` counts its slots by id.
    """
    quota_of = np.zeros(len(have), np.int64)
    quota_of[crowd.ids] = quota
    above = have > quota_of
    slots = _where(above.take(holder))
    shrinking = _where(above[crowd.ids] & (quota > 0))
    if not len(shrinking):
        return slots
    owner = holder[slots]
    bits = len(holder).bit_length() - 1
    key = ((owner << bits) + _ranks(slots, owner, len(holder), crowd, shrinking, len(have)) << bits) + slots
    key.sort()
    owner, slots = key >> 2 * bits, key & len(holder) - 1
    first_of = np.cumsum(np.where(above, have, 0)) - have
    place = np.arange(len(owner)) - first_of[owner]
    return np.sort(slots[place >= quota_of[owner]])


def _ranks(slots: Indices, owner: Indices, size: int, crowd: _Crowd, members: Indices, id_end: int) -> Indices:
    """What rank each slot has for its owner; anything for owners not among `members` (indices into the crowd)."""
    offset, inverse = np.zeros((2, id_end), np.uint32)
    ids = crowd.ids[members]
    offset[ids], skip = crowd.permutations(members)
    inverse[ids] = _inverse(skip)
    rank: NDArray[np.uint32] = (_gather(slots.astype(np.uint32), size) - offset[owner]) * inverse[owner]
    return (rank & np.uint32(size - 1)).astype(np.intp)


@dataclass(frozen=True, slots=True)
class _Turns:
    """Turns in their order: what each writes, where it bids (before `_scatter`) and how far on it bids next."""

    id: NDArray[np.uint32]
    position: NDArray[np.uint32]
    step: NDArray[np.uint32]

    def again(self, lost: Indices) -> _Turns:
        step = self.step.take(lost)
        return _Turns(self.id.take(lost), self.position.take(lost) + step, step)


def _pending_turns(crowd: _Crowd, have: NDArray[np.int64], quota: NDArray[np.int64]) -> _Turns:
    """Turn k of a member is pending for have <= k < quota.

    Deadlines are exact: the dividend is, and a fractional quotient is farther from an integer than rounding carries it.
    Sorting 16 bits stably is linear in NumPy.
    """
    who = _where(have < quota)
    have, quota = have[who], quota[who]
    count = quota - have
    member = np.repeat(np.arange(len(who), dtype=np.int32), count)
    k = np.repeat((have - np.cumsum(count) + count).astype(np.int32), count)
    k += np.arange(len(k), dtype=np.int32)
    deadline = (k + 0.5) * 2.0**_DEADLINE_BITS
    deadline /= np.repeat(quota.astype(np.float64), count)
    order = np.argsort(deadline.astype(np.uint16), kind="stable")
    member = member.take(order).astype(np.intp)
    offset, skip = crowd.permutations(who)
    position = offset.take(member) + k.take(order).astype(np.uint32) * skip.take(member)
    return _Turns(crowd.ids[who].astype(np.uint32).take(member), position, (skip * np.uint32(STRIDE)).take(member))


def _play(table: Table, free: _FreeSlots, turns: _Turns) -> None:
    """Write the ids of the `turns` into the `free` slots, of which there are as many.

    Of repeated indices an assignment leaves the last value: backwards, that is the first bidder.
    """
    while len(turns.id):
        bid = free.find(_scatter(turns.position, len(table)))
        first_bidder = np.full(len(free.slots), -1, np.int32)
        first_bidder[bid[::-1]] = np.arange(len(bid) - 1, -1, -1, dtype=np.int32)
        taken = first_bidder >= 0
        winner = first_bidder.take(_where(taken))
        table[free.take(taken)] = turns.id.take(winner)
        pending = np.ones(len(bid), np.bool_)
        pending[winner] = False
        turns = turns.again(_where(pending))


class _FreeSlots:
    """The free slots of a table, sorted. While they are many, they are counted over the table rather than searched."""

    def __init__(self, slots: Indices, size: int) -> None:
        self.slots = slots
        self._size = size
        if self._many:
            self._is_free = np.zeros(size, np.bool_)
            self._is_free[slots] = True
            self._counted = np.zeros(size + 1, np.int32)

    @property
    def _many(self) -> bool:
        return len(self.slots) > self._size // 64

    def find(self, wishes: NDArray[np.uint32]) -> NDArray[np.integer[Any]]:
        """For each of `wishes`, where in `slots` the first one at or after it stands, cyclically."""
        if len(self.slots) == self._size:
            return wishes
        index: NDArray[np.integer[Any]]
        if self._many:
            np.cumsum(self._is_free, out=self._counted[1:])
            index = self._counted.take(wishes)
        else:
            index = np.searchsorted(self.slots, wishes.astype(np.intp))
        index[index == len(self.slots)] = 0
        return index

    def take(self, chosen: NDArray[np.bool_]) -> Indices:
        """Remove the `chosen` ones of `slots` and return them."""
        taken = self.slots.take(_where(chosen))
        if self._many:
            self._is_free[taken] = False
        self.slots = self.slots.take(_where(~chosen))
        return taken


def _scatter(position: NDArray[np.uint32], size: int) -> NDArray[np.uint32]:
    """One fixed permutation of the slots: without it a member of small skip would have its slots in a row."""
    mask, half = np.uint32(size - 1), np.uint32(size.bit_length() // 2)
    slot = position & mask
    slot ^= slot >> half
    slot = slot * _SCATTER & mask
    return slot ^ slot >> half


def _gather(slot: NDArray[np.uint32], size: int) -> NDArray[np.uint32]:
    """The inverse of `_scatter`. Folding the upper half of the bits onto the lower one is its own inverse."""
    mask, half = np.uint32(size - 1), np.uint32(size.bit_length() // 2)
    position = slot ^ slot >> half
    position = position * _GATHER & mask
    return position ^ position >> half


def _where(chosen: NDArray[np.bool_]) -> Indices:
    """Indexing by these is quicker than by the random booleans themselves."""
    return chosen.nonzero()[0]


def _inverse(odd: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Of odd numbers modulo 2^32, by Newton's iteration: each step doubles the 3 bits in which x is its own inverse."""
    inverse = odd.copy()
    for _ in range(4):
        inverse *= np.uint32(2) - odd * inverse
    return inverse
