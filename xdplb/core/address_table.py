"""Whose address and port is it, as the packet path looks it up (bpf/lookup.h): pure arrays, ready for the maps.

An address leads, by a cuckoo hash, to two runs of port intervals: one for the services that listen on it, one for the
NAT backends that answer from it. Both maps have two halves, of which the packet path uses one at a time; the indices
written here are absolute, so the half must be named.

Source of the hash table: Pagh and Rodler, "Cuckoo Hashing", 2001; with buckets of two entries it works up to 0.89 full
(Dietzfelbinger and Weidling, 2007).
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xdplb import abi
from xdplb.core.hash_key import HashKey
from xdplb.model import Address, Protocol

ENTRIES_PER_BUCKET = 2
MIN_ADDRESS_BUCKETS = 64
MIN_INTERVALS = 1024
MAX_SEARCHED_BUCKETS = 512
"""How many buckets are searched for one that can take another's entry, before the table counts as full."""

_IPV4_PREFIX = bytes(10) + b"\xff\xff"
_UNSPECIFIED = bytes(16)
_EMPTY = -1
_ADDRESS_SHIFT = 24
"""Above protocol and port: makes one line of all the ports of all addresses, in which no two addresses touch."""

Words = NDArray[np.uint64]
Integers = NDArray[np.int64]
Records = NDArray[np.void]

_GOLDEN_RATIO = 0x9E3779B97F4A7C15


class TableFull(ValueError):
    """The geometry is too small for what is to be looked up; a larger one works."""


@dataclass(frozen=True, slots=True)
class Claim:
    """`target` (an id, never 0) owns the ports `first_port` to `last_port`, both included, of an address.

    Where claims overlap, the one that was first (`since`) wins. Among equals one port beats a range and a range beats
    all ports (0 to 65535); then the lowest target wins.
    """

    address: Address
    protocol: Protocol
    first_port: int
    last_port: int
    target: int
    since: int = 0


@dataclass(frozen=True, slots=True)
class Endpoints:
    """`buckets` fill a half of their map; `intervals`, only as many as are used, begin a half of theirs. `listening`
    has a bit for each address that services listen on.
    """

    buckets: Records
    intervals: Records
    listening: Words


def address_buckets_for(addresses: int) -> int:
    """How many buckets so many addresses need, so that half of the entries stay empty. A power of two."""
    return _power_of_two(max(addresses, MIN_ADDRESS_BUCKETS))


def intervals_for(claims: int) -> int:
    """How many intervals so many claims can become, however they overlap (2 n - 1). A power of two."""
    return _power_of_two(max(2 * claims, MIN_INTERVALS))


def address_words(address: Address) -> tuple[int, int]:
    """The words of `struct address`. ValueError for "::": an entry full of zeros is an empty one."""
    hi, lo = struct.unpack("<QQ", _wire(address))
    return hi, lo


def build(
    services: Iterable[Claim],
    replies: Iterable[Claim],
    geometry: abi.Geometry,
    key: HashKey,
    half: int,
    bucket_dtype: np.dtype[np.void],
    interval_dtype: np.dtype[np.void],
) -> Endpoints:
    """What the maps of this `geometry` hold in their `half` (0 or 1); the dtypes are those of their values.

    The same for any order of the claims. TableFull where they do not fit; ValueError for a claim that makes no sense.
    """
    service_claims, reply_claims = tuple(services), tuple(replies)
    service_wires = [_wire(claim.address) for claim in service_claims]
    reply_wires = [_wire(claim.address) for claim in reply_claims]
    wires = sorted({*service_wires, *reply_wires})
    number = {wire: index for index, wire in enumerate(wires)}
    service_pieces = _flatten(service_claims, [number[wire] for wire in service_wires])
    reply_pieces = _flatten(reply_claims, [number[wire] for wire in reply_wires])
    used = len(service_pieces.first) + len(reply_pieces.first)
    if used > geometry.intervals:
        raise TableFull(f"{used} port intervals where there is room for {geometry.intervals}")

    base = half * geometry.intervals
    words = np.frombuffer(b"".join(wires), "<u8").reshape(-1, 2).astype(np.uint64)
    place = _place(words, geometry.address_buckets, key)
    buckets = np.zeros(geometry.address_buckets, bucket_dtype)
    _write(buckets["entry"]["address"], place, hi=words[:, 0], lo=words[:, 1])
    _write_runs(buckets["entry"]["services"], place, service_pieces, base)
    _write_runs(buckets["entry"]["replies"], place, reply_pieces, base + len(service_pieces.first))
    intervals = np.zeros(used, interval_dtype)
    for field in ("first", "last", "target"):
        intervals[field] = np.concatenate([getattr(service_pieces, field), getattr(reply_pieces, field)])
    served = sorted({*service_wires})
    return Endpoints(buckets, intervals, _bits(words[[number[wire] for wire in served]], key))


def _power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()


def _wire(address: Address) -> bytes:
    """The 16 bytes under which an address is looked up: IPv4 as ::ffff:a.b.c.d."""
    packed = address.packed
    wire = packed if len(packed) == len(_UNSPECIFIED) else _IPV4_PREFIX + packed
    if wire == _UNSPECIFIED:
        raise ValueError("nothing can listen on, or answer from, the address ::")
    return wire


@dataclass(frozen=True, slots=True)
class _Pieces:
    """Disjoint intervals, sorted: the number of the address, and the fields of `struct interval`."""

    address: Integers
    first: Integers
    last: Integers
    target: Integers


def _flatten(claims: Sequence[Claim], addresses: Sequence[int]) -> _Pieces:
    """Cut overlapping claims into pieces of one owner each, as large as possible.

    The claims' bounds cut the line of all ports into cells; claims are painted over these, the weakest first.
    """
    number = {protocol: protocol.number for protocol in Protocol}
    first_port = np.array([claim.first_port for claim in claims], np.int64)
    last_port = np.array([claim.last_port for claim in claims], np.int64)
    target = np.array([claim.target for claim in claims], np.int64)
    _refuse_nonsense(claims, (first_port >= 0) & (first_port <= last_port) & (last_port <= 0xFFFF) & (target > 0))
    protocol = np.array([number[claim.protocol] for claim in claims], np.int64)
    begin = (np.array(addresses, np.int64) << _ADDRESS_SHIFT) + (protocol << 16) + first_port
    end = begin + (last_port - first_port) + 1

    cuts = np.unique(np.concatenate([begin, end]))
    first_cell, end_cell = np.searchsorted(cuts, begin), np.searchsorted(cuts, end)
    strength = 2 * (first_port == last_port) + (last_port - first_port < 0xFFFF)
    weakest_first = np.lexsort((-target, strength))
    since = np.array([claim.since for claim in claims], np.int64)[weakest_first]
    owner = np.zeros(len(cuts), np.int64)
    for age in np.unique(since)[::-1]:
        painted = weakest_first[since == age]
        exact = strength[painted] == 3
        for index in painted[~exact]:
            owner[first_cell[index] : end_cell[index]] = target[index]
        owner[first_cell[painted[exact]]] = target[painted[exact]]
    return _join(cuts, owner)


def _refuse_nonsense(claims: Sequence[Claim], sensible: NDArray[np.bool_]) -> None:
    if not sensible.all():
        raise ValueError(f"not a range of ports with a target: {claims[int(np.flatnonzero(~sensible)[0])]}")


def _join(cuts: Integers, owner: Integers) -> _Pieces:
    """Neighbouring cells of one owner as one piece. Cell i ends where cuts[i + 1] begins; the last is nobody's."""
    starts = np.flatnonzero(np.diff(owner, prepend=0))
    begin, target = cuts[starts], owner[starts]
    end = np.append(begin[1:], 0)
    owned = target > 0
    begin, last = begin[owned], end[owned] - 1
    mask = (1 << _ADDRESS_SHIFT) - 1
    return _Pieces(begin >> _ADDRESS_SHIFT, begin & mask, last & mask, target[owned])


@dataclass(frozen=True, slots=True)
class _Place:
    """Where entries go: bucket `bucket[i]`, entry `entry[i]` of it, is for address number `address[i]`."""

    bucket: Integers
    entry: Integers
    address: Integers


def _write(records: Records, place: _Place, **fields: Words | Integers) -> None:
    """Set fields, given by address number, of the (bucket, entry) `records`."""
    for name, values in fields.items():
        records[name][place.bucket, place.entry] = values[place.address]


def _write_runs(records: Records, place: _Place, pieces: _Pieces, base: int) -> None:
    """The run of each address among `pieces`, the first of which stands at `base`. An empty run is all zeros."""
    count = np.bincount(pieces.address, minlength=len(place.address))
    first = np.where(count > 0, base + np.cumsum(count) - count, 0)
    _write(records, place, first=first, count=count)


def _place(words: Words, buckets: int, key: HashKey) -> _Place:
    mask = np.uint64(buckets - 1)
    hashes = _hash_addresses(words, key)
    first: Any = (hashes & mask).tolist()  # the type of tolist() differs between releases of NumPy
    second: Any = (hashes >> np.uint64(32) & mask).tolist()
    table = _Cuckoo(first, second, buckets)
    for address in range(len(words)):
        table.insert(address)
    held = np.array(table.held, np.int64)
    where = np.flatnonzero(held != _EMPTY)
    return _Place(where // ENTRIES_PER_BUCKET, where % ENTRIES_PER_BUCKET, held[where])


def _bits(words: Words, key: HashKey) -> Words:
    """A bit for each, by listening_bit() of bpf/lookup.h."""
    places = (words[:, 0] ^ words[:, 1]) * np.uint64(key.factor) >> np.uint64(32)
    places = places * np.uint64(64 * abi.LISTENING_WORDS) >> np.uint64(32)
    bits = np.zeros(abi.LISTENING_WORDS, np.uint64)
    np.bitwise_or.at(bits, (places // 64).astype(np.intp), np.uint64(1) << places % np.uint64(64))
    return bits


def _hash_addresses(words: Words, key: HashKey) -> Words:
    """hash_address() of bpf/hash.h."""
    hashes = np.full(len(words), key.seed, np.uint64)
    for word in (words[:, 0], words[:, 1]):
        hashes ^= word
        hashes ^= hashes >> np.uint64(32)
        hashes *= np.uint64(key.factor)
        hashes ^= hashes >> np.uint64(32)
    hashes *= np.uint64(_GOLDEN_RATIO)
    hashes ^= hashes >> np.uint64(32)
    return hashes


class _Cuckoo:
    """Which address each entry holds, bucket after bucket; each address has two buckets to choose from.

    A bucket's entries are filled in order and never emptied, only exchanged. The first choice is preferred: the packet
    path looks there first.
    """

    def __init__(self, first_choice: list[int], second_choice: list[int], buckets: int) -> None:
        self.held = [_EMPTY] * (ENTRIES_PER_BUCKET * buckets)
        self._used = [0] * buckets
        self._first, self._second = first_choice, second_choice

    def insert(self, address: int) -> None:
        bucket = self._first[address]
        if self._used[bucket] == ENTRIES_PER_BUCKET:
            bucket = self._second[address]
        if self._used[bucket] == ENTRIES_PER_BUCKET:
            self.held[self._make_room(address)] = address
        else:
            self.held[self._next_entry(bucket)] = address

    def _next_entry(self, bucket: int) -> int:
        entry = ENTRIES_PER_BUCKET * bucket + self._used[bucket]
        self._used[bucket] += 1
        return entry

    def _make_room(self, address: int) -> int:
        """An entry for `address`, free because others moved on; found breadth first, so that the fewest move."""
        roots = (self._first[address], self._second[address])
        mover: dict[int, int] = dict.fromkeys(roots, _EMPTY)
        pending = deque(mover)
        while pending and len(mover) < MAX_SEARCHED_BUCKETS:
            bucket = pending.popleft()
            for entry in range(ENTRIES_PER_BUCKET * bucket, ENTRIES_PER_BUCKET * (bucket + 1)):
                other = self._first[self.held[entry]] ^ self._second[self.held[entry]] ^ bucket
                if other in mover:
                    continue
                mover[other] = entry
                if self._used[other] < ENTRIES_PER_BUCKET:
                    return self._move(self._next_entry(other), mover)
                pending.append(other)
        raise TableFull(f"no room for another address among {sum(self._used)} in {len(self.held)} entries")

    def _move(self, free: int, mover: dict[int, int]) -> int:
        """Fill the `free` entry from the one that may move there, and so on; the entry that is free at last.

        `mover` names for each bucket the entry that can move into it, or _EMPTY where the new address itself does.
        """
        while (entry := mover[free // ENTRIES_PER_BUCKET]) != _EMPTY:
            self.held[free] = self.held[entry]
            free = entry
        return free
