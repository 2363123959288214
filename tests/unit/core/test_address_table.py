"""The address table and its port intervals: read back as bpf/lookup.h reads them, compared with a plain rule."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import pairwise
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdplb import abi
from xdplb.core import address_table
from xdplb.core.address_table import Claim, Endpoints, TableFull
from xdplb.core.hash_key import HashKey
from xdplb.model import Address, Protocol

RUN = np.dtype([("first", "<u4"), ("count", "<u4")])
ADDRESS = np.dtype([("hi", "<u8"), ("lo", "<u8")])
ENTRY = np.dtype([("address", ADDRESS), ("services", RUN), ("replies", RUN)])
BUCKET = np.dtype([("entry", ENTRY, (2,))])
INTERVAL = np.dtype([("first", "<u4"), ("last", "<u4"), ("target", "<u4"), ("pad", "<u4")])
KEY = HashKey.derive("a test")
WORD = (1 << 64) - 1


def geometry(address_buckets: int = 64, intervals: int = 1024) -> abi.Geometry:
    return abi.Geometry(services=1, backends=1, slots=1, address_buckets=address_buckets, intervals=intervals)


def build(
    services: Sequence[Claim],
    replies: Sequence[Claim] = (),
    size: abi.Geometry | None = None,
    half: int = 0,
    key: HashKey = KEY,
) -> Endpoints:
    return address_table.build(services, replies, size or geometry(), key, half, BUCKET, INTERVAL)


def claim(address: str, ports: str, target: int, protocol: Protocol = Protocol.TCP) -> Claim:
    first, _, last = ports.partition("-")
    return Claim(ip_address(address), protocol, int(first), int(last or first), target)


class PacketPath:
    """bpf/hash.h and bpf/lookup.h in Python, on both halves of the maps; what was not written is poisoned."""

    def __init__(self, built: Endpoints, size: abi.Geometry, half: int, key: HashKey = KEY) -> None:
        self.size, self.half, self.key = size, half, key
        self.buckets = np.full(2 * size.address_buckets, np.frombuffer(b"\xee" * 64, BUCKET)[0], BUCKET)
        self.intervals = np.full(2 * size.intervals, np.frombuffer(b"\xee" * 16, INTERVAL)[0], INTERVAL)
        begin = half * size.address_buckets
        self.buckets[begin : begin + size.address_buckets] = built.buckets
        begin = half * size.intervals
        self.intervals[begin : begin + len(built.intervals)] = built.intervals

    def mix(self, hash_: int, word: int) -> int:
        hash_ ^= word
        hash_ ^= hash_ >> 32
        hash_ = hash_ * self.key.factor & WORD
        return hash_ ^ hash_ >> 32

    def finish(self, hash_: int) -> int:
        hash_ = hash_ * 0x9E3779B97F4A7C15 & WORD
        return hash_ ^ hash_ >> 32

    def find_address(self, address: Address) -> Any:
        if isinstance(address, IPv4Address):
            address = IPv6Address(f"::ffff:{address}")
        hi, lo = (int.from_bytes(address.packed[i : i + 8], "little") for i in (0, 8))
        hash_ = self.finish(self.mix(self.mix(self.key.seed, hi), lo))
        for _ in range(2):
            index = self.half * self.size.address_buckets + (hash_ & self.size.address_buckets - 1)
            for entry in self.buckets[index]["entry"]:
                if (entry["address"]["hi"], entry["address"]["lo"]) == (hi, lo):
                    return entry
            hash_ >>= 32
        return None

    def find_interval(self, run: Any, key: int) -> int:
        first, count = int(run["first"]), int(run["count"])
        for _ in range(17):
            if not count:
                break
            middle = first + count // 2
            interval = self.intervals[middle]
            if key < interval["first"]:
                count //= 2
            elif key > interval["last"]:
                first, count = middle + 1, count - (count // 2 + 1)
            else:
                return int(interval["target"])
        return 0

    def find(self, kind: str, address: Address, protocol: Protocol, port: int) -> int:
        entry = self.find_address(address)
        return self.find_interval(entry[kind], protocol.number << 16 | port) if entry is not None else 0


def owner(claims: Sequence[Claim], address: Address, protocol: Protocol, port: int) -> int:
    """The precedence rule, claim by claim."""

    def weakness(claim: Claim) -> tuple[int, int]:
        width = claim.last_port - claim.first_port
        return (0 if width == 0 else 2 if width == 65535 else 1), claim.target

    hits = [
        claim
        for claim in claims
        if (claim.address, claim.protocol) == (address, protocol) and claim.first_port <= port <= claim.last_port
    ]
    return min(hits, key=weakness).target if hits else 0


ADDRESSES = [ip_address(text) for text in ("10.0.0.1", "10.0.0.2", "192.0.2.1", "2001:db8::1", "2001:db8::2", "::1")]
PORTS = st.one_of(st.integers(0, 6), st.integers(65530, 65535), st.integers(0, 65535))
RANGES = st.one_of(
    PORTS.map(lambda port: (port, port)),
    st.tuples(PORTS, PORTS).map(lambda ports: (min(ports), max(ports))),
    st.just((0, 65535)),
)
CLAIMS = st.lists(
    st.builds(
        lambda address, protocol, ports, target: Claim(address, protocol, ports[0], ports[1], target),
        st.sampled_from(ADDRESSES),
        st.sampled_from(Protocol),
        RANGES,
        st.integers(1, 8),
    ),
    max_size=30,
)


def ports_of_interest(claims: Sequence[Claim]) -> set[int]:
    bounds = {port for claim in claims for port in (claim.first_port, claim.last_port)}
    return {near for port in bounds for near in (port - 1, port, port + 1) if 0 <= near <= 65535} | {0, 65535}


@given(CLAIMS, CLAIMS, st.integers(0, 1), st.text(max_size=4))
def test_the_packet_path_finds_the_owner_of_every_port(
    services: list[Claim], replies: list[Claim], half: int, secret: str
) -> None:
    key = HashKey.derive(secret)
    path = PacketPath(build(services, replies, half=half, key=key), geometry(), half, key)
    for port in ports_of_interest(services + replies):
        for protocol in Protocol:
            for address in ADDRESSES:
                assert path.find("services", address, protocol, port) == owner(services, address, protocol, port)
                assert path.find("replies", address, protocol, port) == owner(replies, address, protocol, port)


@given(CLAIMS, CLAIMS)
def test_runs_are_sorted_disjoint_and_as_few_as_possible(services: list[Claim], replies: list[Claim]) -> None:
    built = build(services, replies)
    entries = built.buckets["entry"].reshape(-1)
    seen = 0
    for kind in ("services", "replies"):
        for run in entries[kind]:
            run_of = built.intervals[run["first"] : run["first"] + run["count"]]
            assert (run_of["first"] <= run_of["last"]).all()
            for left, right in pairwise(run_of):
                assert left["last"] < right["first"]
                assert left["last"] + 1 < right["first"] or left["target"] != right["target"]
            seen += len(run_of)
    assert seen == len(built.intervals)


@given(CLAIMS, CLAIMS, st.randoms(use_true_random=False))
def test_the_order_of_claims_does_not_matter(services: list[Claim], replies: list[Claim], random: Random) -> None:
    expected = build(services, replies)
    random.shuffle(services)
    random.shuffle(replies)
    built = build(services, replies)
    assert np.array_equal(built.buckets, expected.buckets)
    assert np.array_equal(built.intervals, expected.intervals)


@pytest.mark.parametrize(
    ("claims", "pieces"),
    [
        (["80 1"], [(80, 80, 1)]),
        (["0-65535 9", "80 1"], [(0, 79, 9), (80, 80, 1), (81, 65535, 9)]),
        (["0-65535 9", "80-89 5", "84 1"], [(0, 79, 9), (80, 83, 5), (84, 84, 1), (85, 89, 5), (90, 65535, 9)]),
        (["0-65535 1", "0 2", "65535 3"], [(0, 0, 2), (1, 65534, 1), (65535, 65535, 3)]),
        (["80 1", "81 1", "82 2"], [(80, 81, 1), (82, 82, 2)]),
        (["80 1", "82 1"], [(80, 80, 1), (82, 82, 1)]),
        (["80 4", "80 3", "80 7"], [(80, 80, 3)]),
        (["10-20 2", "15-30 1"], [(10, 14, 2), (15, 30, 1)]),
        (["0-65534 2", "0-65535 1"], [(0, 65534, 2), (65535, 65535, 1)]),
    ],
)
def test_overlapping_claims_become_disjoint_intervals(claims: list[str], pieces: list[tuple[int, int, int]]) -> None:
    parsed = [claim("10.0.0.1", ports, int(target)) for ports, target in (text.split() for text in claims)]
    tcp = Protocol.TCP.number << 16
    found = [(first - tcp, last - tcp, target) for first, last, target, _ in build(parsed).intervals.tolist()]
    assert found == pieces


def test_the_claim_that_was_first_wins_whatever_came_later() -> None:
    old, range_, one = claim("10.0.0.1", "0-65535", 9), claim("10.0.0.1", "80-90", 2), claim("10.0.0.1", "80", 1)
    built = build((), [one, range_, replace(old, since=-1)])
    assert [(int(i["first"]) & 0xFFFF, int(i["last"]) & 0xFFFF, int(i["target"])) for i in built.intervals] == [
        (0, 65535, 9)
    ]
    built = build((), [replace(one, since=1), range_, replace(old, since=1)])
    targets = [int(i["target"]) for i in built.intervals]
    assert targets == [9, 2, 9]


def test_protocols_do_not_touch() -> None:
    both = [claim("10.0.0.1", "0-65535", 1, protocol) for protocol in Protocol]
    assert len(build(both).intervals) == 2


@pytest.mark.parametrize("half", [0, 1])
def test_runs_name_the_intervals_of_their_own_half(half: int) -> None:
    built = build([claim("10.0.0.1", "80", 1)], [claim("10.0.0.2", "80", 2)], half=half)
    entries = built.buckets["entry"].reshape(-1)
    runs = sorted(run for kind in ("services", "replies") for run in entries[kind].tolist() if run[1])
    assert runs == [(half * 1024, 1), (half * 1024 + 1, 1)]


def test_an_empty_run_refers_to_nothing() -> None:
    entries = build([claim("10.0.0.1", "80", 1)], half=1).buckets["entry"].reshape(-1)
    assert set(entries["replies"].tolist()) == {(0, 0)}


def test_no_claims_make_an_empty_table() -> None:
    built = build([])
    assert len(built.intervals) == 0
    assert built.buckets.tobytes() == bytes(64 * BUCKET.itemsize)


def test_the_dtypes_may_come_from_ctypes() -> None:
    class Words(ctypes.Structure):
        _fields_ = [("hi", ctypes.c_ulonglong), ("lo", ctypes.c_ulonglong)]

    class Run(ctypes.Structure):
        _fields_ = [("first", ctypes.c_uint), ("count", ctypes.c_uint)]

    class Entry(ctypes.Structure):
        _fields_ = [("address", Words), ("services", Run), ("replies", Run)]

    class Bucket(ctypes.Structure):
        _fields_ = [("entry", Entry * 2)]

    class Interval(ctypes.Structure):
        _fields_ = [(name, ctypes.c_uint) for name in ("first", "last", "target", "pad")]

    claims = [claim("10.0.0.1", "80", 1), claim("2001:db8::1", "0-65535", 2)]
    bucket: np.dtype[Any] = np.dtype(Bucket)
    interval: np.dtype[Any] = np.dtype(Interval)
    built = address_table.build(claims, claims, geometry(), KEY, 1, bucket, interval)
    assert built.buckets.tobytes() == build(claims, claims, half=1).buckets.tobytes()
    assert built.intervals.tobytes() == build(claims, claims, half=1).intervals.tobytes()


def test_address_words_are_loads_from_the_wire() -> None:
    assert address_table.address_words(IPv6Address("102:304:506:708:90a:b0c:d0e:f10")) == (
        0x0807060504030201,
        0x100F0E0D0C0B0A09,
    )
    assert address_table.address_words(IPv4Address("10.1.2.3")) == (0, 0x0302010AFFFF0000)
    assert address_table.address_words(IPv4Address("10.1.2.3")) == address_table.address_words(
        IPv6Address("::ffff:10.1.2.3")
    )


def test_an_entry_of_zeros_cannot_be_claimed() -> None:
    with pytest.raises(ValueError, match="::"):
        address_table.address_words(IPv6Address("::"))
    with pytest.raises(ValueError, match="::"):
        build([claim("::", "80", 1)])


@pytest.mark.parametrize("ports", [(80, 79), (-1, 5), (0, 65536)])
def test_ports_that_are_no_range_are_refused(ports: tuple[int, int]) -> None:
    good, bad = claim("10.0.0.1", "80", 1), Claim(ip_address("10.0.0.1"), Protocol.TCP, *ports, 1)
    with pytest.raises(ValueError, match="not a range of ports"):
        build([good, bad])


def test_target_0_is_refused() -> None:
    with pytest.raises(ValueError, match="with a target"):
        build([claim("10.0.0.1", "80", 0)])


@pytest.mark.parametrize(("addresses", "buckets"), [(0, 64), (64, 64), (65, 128), (65536, 65536), (69632, 131072)])
def test_address_buckets_for(addresses: int, buckets: int) -> None:
    assert address_table.address_buckets_for(addresses) == buckets


@pytest.mark.parametrize(("claims", "intervals"), [(0, 1024), (512, 1024), (513, 2048), (65536, 131072)])
def test_intervals_for(claims: int, intervals: int) -> None:
    assert address_table.intervals_for(claims) == intervals


def many(count: int, network: int = 0x0A000000) -> list[Claim]:
    """Consecutive addresses, as real networks have them."""
    return [Claim(IPv4Address(network + i), Protocol.TCP, 80, 80, 1 + i) for i in range(count)]


def test_all_services_and_backends_fit_the_geometry_made_for_them() -> None:
    services, replies = many(abi.MAX_SERVICES, 0xC6120000), many(abi.MAX_BACKENDS)
    count = len(services) + len(replies)
    size = geometry(address_table.address_buckets_for(count), address_table.intervals_for(count))
    started = time.process_time()
    built = build(services, replies, size, half=1)
    assert time.process_time() - started < 2.5
    path = PacketPath(built, size, 1)
    for claims, kind in ((services, "services"), (replies, "replies")):
        for one in claims[::13]:
            assert path.find(kind, one.address, Protocol.TCP, 80) == one.target
            assert path.find(kind, one.address, Protocol.TCP, 81) == 0
            assert path.find(kind, one.address, Protocol.UDP, 80) == 0


@pytest.mark.parametrize("seed", range(20))
def test_half_full_tables_always_fit(seed: int) -> None:
    random = Random(seed)
    claims = [Claim(IPv6Address(random.getrandbits(128)), Protocol.UDP, 53, 53, 1) for _ in range(1024)]
    size = geometry(address_table.address_buckets_for(len(claims)))
    path = PacketPath(build(claims, size=size), size, 0)
    assert all(path.find("services", one.address, Protocol.UDP, 53) == 1 for one in claims)


@pytest.mark.parametrize("step", [1, 4, 256, 65536, 1 << 32, 1 << 64, 1 << 80])
@pytest.mark.parametrize("secret", "abcdef")
def test_addresses_in_a_row_fit_whatever_the_key(step: int, secret: str) -> None:
    """Both buckets of an address must be its own: where one follows from the other, regular networks do not fit."""
    base = int(IPv6Address("2001:db8::1" if step > 65536 else "::ffff:10.0.0.1"))
    claims = [Claim(IPv6Address(base + step * i), Protocol.TCP, 80, 80, 1) for i in range(1024)]
    build(claims, size=geometry(address_table.address_buckets_for(len(claims))), key=HashKey.derive(secret))


def test_nothing_is_lost_when_many_entries_must_give_way() -> None:
    """At 0.85 of the entries about every third insertion has to move others."""
    claims = many(int(0.85 * 2 * 1024))
    size = geometry(1024, 4096)
    path = PacketPath(build(claims, size=size), size, 0)
    assert all(path.find("services", one.address, Protocol.TCP, 80) == one.target for one in claims)


def test_too_many_addresses_are_told_apart_from_mistakes() -> None:
    for _ in range(2):
        with pytest.raises(TableFull, match=r"no room for another address among \d+ in 128 entries"):
            build(many(129), size=geometry(64))


def test_one_bucket_too_few_is_found_out_by_searching_in_vain() -> None:
    with pytest.raises(TableFull):
        build(many(5), size=geometry(2))
    assert len(build(many(4), size=geometry(2)).intervals) == 4


def test_too_many_intervals_are_told_apart_from_mistakes() -> None:
    claims = [claim("10.0.0.1", str(port), 1 + port % 2) for port in range(1024)]
    assert len(build(claims).intervals) == 1024
    with pytest.raises(TableFull, match="1025 port intervals where there is room for 1024"):
        build([*claims, claim("10.0.0.1", "1024", 1)])


def test_the_longest_run_is_searched_in_full() -> None:
    """n claims of one address become at most 2 n - 1 intervals: with 65,536 of them, as many as 17 halvings reach."""
    claims = [claim("10.0.0.1", "0-65535", 60000, protocol) for protocol in Protocol]
    claims += [claim("10.0.0.1", str(port), 1 + port, protocol) for port in range(1, 65535, 2) for protocol in Protocol]
    size = geometry(intervals=address_table.intervals_for(len(claims)))
    built = build(claims, size=size)
    assert len(built.intervals) >= 1 << 16
    path = PacketPath(built, size, 0)
    for port in (*range(0, 65536, 997), 65535):
        expected = 1 + port if port % 2 and port < 65535 else 60000
        assert path.find("services", ip_address("10.0.0.1"), Protocol.UDP, port) == expected
