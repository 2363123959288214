"""What a configuration needs of program and maps."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from functools import cache
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from xdplb import abi
from xdplb.abi import Features, FlowTimes, Geometry
from xdplb.core import address_table, flow_cache, maglev
from xdplb.core.requirements import features, fits, geometry
from xdplb.dataplane import bundle
from xdplb.model import Address, Backend, Check, Config, FlowCache, Forward, Listen, Protocol, Scheduler, Service

NOTHING = Features(
    ipv4=False,
    ipv6=False,
    nat=False,
    dsr=False,
    ipip=False,
    gue=False,
    outer_ipv4=False,
    outer_ipv6=False,
    tx_by_redirect=False,
)

V4, V6 = IPv4Address("10.0.0.1"), IPv6Address("2001:db8::1")
LARGEST_OFFSET = 1 << 29
"""What the verifier lets a program add to a pointer: BPF_MAX_VAR_OFF, include/linux/bpf_verifier.h."""


@cache
def backends(count: int, first: int) -> tuple[Backend, ...]:
    return tuple(Backend(f"b{i}", IPv4Address(0x0A000000 + first + i), None) for i in range(count))


def config(*sizes: int, forward: Forward = Forward.NAT) -> Config:
    """A service of each of the sizes; no two have an address in common."""
    services, first = [], 0
    for number, size in enumerate(sizes):
        listen = Listen(IPv4Address(0xCB000000 + number), 80, 80, Protocol.TCP)
        services.append(Service(f"s{number}", listen, forward, Scheduler.MAGLEV, Check(), backends(size, first)))
        first += size
    return Config(("eth0",), tuple(services))


def one(forward: Forward, listen: Address, *addresses: Address) -> Service:
    members = tuple(Backend(f"b{i}", address, None) for i, address in enumerate(addresses))
    return Service("s", Listen(listen, 80, 80, Protocol.TCP), forward, Scheduler.MAGLEV, Check(), members)


@pytest.mark.parametrize(
    ("services", "wanted"),
    [
        ((), {}),
        ((one(Forward.NAT, V4, V4),), {"ipv4", "nat"}),
        ((one(Forward.NAT, V6, V6),), {"ipv6", "nat"}),
        ((one(Forward.DSR, V4, V4),), {"ipv4", "dsr"}),
        ((one(Forward.IPIP, V4, V4),), {"ipv4", "ipip", "outer_ipv4"}),
        ((one(Forward.IPIP, V4, V6),), {"ipv4", "ipv6", "ipip", "outer_ipv6"}),
        ((one(Forward.IPIP, V6, V4, V6),), {"ipv4", "ipv6", "ipip", "outer_ipv4", "outer_ipv6"}),
        ((one(Forward.GUE, V6, V4),), {"ipv4", "ipv6", "gue", "outer_ipv4"}),
        ((one(Forward.NAT, V4, V4), one(Forward.GUE, V6, V6)), {"ipv4", "ipv6", "nat", "gue", "outer_ipv6"}),
    ],
)
@pytest.mark.parametrize("redirect", [False, True])
def test_only_what_some_service_needs_is_compiled_in(
    services: tuple[Service, ...], wanted: set[str], redirect: bool
) -> None:
    got = features(Config(("eth0",), services), redirect)
    assert {f.name for f in fields(Features) if getattr(got, f.name) is True} == {
        *wanted,
        *({"tx_by_redirect"} if redirect else ()),
    }


def test_every_feature_and_size_reaches_the_compiler() -> None:
    size = geometry(config(1))
    flags = abi.defines(NOTHING, size)
    for field in fields(Features):
        if field.name == "times":
            continue
        flipped = abi.defines(replace(NOTHING, **{field.name: True}), size)
        assert sum(flags[name] != flipped[name] for name in flags) == 1, field.name
    for field in fields(FlowTimes):
        slower = abi.defines(replace(NOTHING, times=replace(NOTHING.times, **{field.name: 7})), size)
        assert sum(flags[name] != slower[name] for name in flags) == 1, field.name
    for field in fields(Geometry):
        changed = abi.defines(NOTHING, replace(size, **{field.name: 3}))
        followers = {"SNAT_SETS"} if field.name.startswith("sources") else set()
        assert {name for name in flags if flags[name] != changed[name]} - followers == {field.name.upper()}


sizes = st.lists(st.integers(1, 40), max_size=40)


@given(sizes)
@example([40] * 60)
def test_the_geometry_of_a_configuration_holds_it_twice_over(counts: list[int]) -> None:
    of = config(*counts)
    size = geometry(of)
    assert fits(of, size)
    assert size.services >= 2 * len(counts)
    assert size.backends >= 2 * sum(counts)
    assert size.slots >= 2 * sum(maglev.table_size(count) for count in counts)
    assert address_table.ENTRIES_PER_BUCKET * size.address_buckets >= 2 * 2 * (len(counts) + sum(counts))
    assert size.intervals >= 2 * (2 * (len(counts) + sum(counts))) - 1


@given(sizes)
def test_all_but_services_are_powers_of_two(counts: list[int]) -> None:
    size = geometry(config(*counts))
    for field in fields(Geometry):
        if field.name not in ("services", "sources4", "sources6"):
            assert getattr(size, field.name).bit_count() == 1, field.name


@settings(max_examples=200)
@given(small=sizes, more=sizes, other=sizes, data=st.data())
def test_what_fits_does_so_with_less_and_in_more(
    small: list[int], more: list[int], other: list[int], data: st.DataObject
) -> None:
    size = geometry(config(*other))
    if fits(config(*small, *more), size):
        assert fits(config(*small), size)
    if fits(config(*small), size):
        name = data.draw(st.sampled_from([field.name for field in fields(Geometry) if field.name != "flow_sets"]))
        assert fits(config(*small), replace(size, **{name: 2 * getattr(size, name)}))


def test_a_configuration_that_outgrows_any_one_map_does_not_fit() -> None:
    large = config(*[40] * 60)
    size = geometry(large)
    assert fits(large, size)
    for name in ("services", "backends", "slots", "address_buckets", "intervals"):
        assert not fits(large, replace(size, **{name: getattr(size, name) // 2})), name


@pytest.mark.parametrize(("capacity", "sets"), [(1024, 128), (1025, 128), (262_144, 32768), (300_000, 65536)])
def test_the_flow_cache_has_sets_of_eight_and_fits_no_other_size(capacity: int, sets: int) -> None:
    of = replace(config(3), flow_cache=FlowCache(capacity=capacity))
    size = geometry(of)
    assert size.flow_sets == sets
    assert fits(of, size)
    for other in (sets // 2, 2 * sets):
        assert not fits(of, replace(size, flow_sets=other)), "its sets are found by another part of the hash"


@pytest.mark.parametrize("forward", Forward)
def test_only_nat_backends_take_up_addresses(forward: Forward) -> None:
    buckets = geometry(config(*[40] * 60, forward=forward)).address_buckets
    assert (buckets > address_table.MIN_ADDRESS_BUCKETS * 2) is (forward is Forward.NAT)


EXTREMES = {
    "many small services": [16] * 4096,
    "one of each at least, and few as large as can be": [4096] * 15 + [1] * 4080,
    "tables as empty as can be": [17] * 3855 + [1],
    "large tables as empty as can be": [2049] * 31 + [65] * 31,
    "all in one size just beyond a power of two": [33] * 1985 + [1] * 31,
}


@pytest.mark.parametrize("counts", EXTREMES.values(), ids=EXTREMES.keys())
def test_the_largest_configurations_are_within_what_the_packet_path_can_address(counts: list[int]) -> None:
    assert len(counts) <= abi.MAX_SERVICES
    assert abi.MAX_BACKENDS - 2048 <= sum(counts) <= abi.MAX_BACKENDS
    of = config(*counts)
    size = geometry(of)
    assert fits(of, size)
    assert size.backends <= abi.MAX_BACKEND_IDS < abi.SLOT_BACKEND
    assert size.slots <= 1 << 25
    assert flow_cache.TRANSITION.itemsize * size.slots < LARGEST_OFFSET
    assert size.services >= 2 * abi.MAX_SERVICES
    assert 2 * size.intervals < 1 << 32
    assert all(maglev.table_size(count) <= abi.MAX_SLOTS_PER_SERVICE for count in counts)


def test_no_table_is_half_empty_so_that_all_slots_are_below_2_to_the_24() -> None:
    """The bound behind the extremes: less than 2 * SLOTS_PER_BACKEND slots a backend, for any size of service."""
    assert all(maglev.table_size(count) < 2 * abi.SLOTS_PER_BACKEND * count for count in range(1, 4097))
    assert 2 * abi.SLOTS_PER_BACKEND * abi.MAX_BACKENDS == 1 << 24


def test_one_address_has_no_more_intervals_than_the_packet_path_searches() -> None:
    """All backends at one address: 65536 claims, cut into less than twice as many pieces."""
    lookup = (bundle.source_directory() / "lookup.h").read_text(encoding="utf-8")
    steps = re.search(r"#define INTERVAL_STEPS (\d+)", lookup)
    assert steps is not None
    assert (1 << int(steps[1])) - 1 >= 2 * abi.MAX_BACKENDS - 1
