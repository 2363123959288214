"""How many answers there are: the first at once, then as many as the kernel would give, for each source and in all."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest
from packets import CLIENT, Flow, Packet, Verdict, frame, tcp, udp
from test_answers import VIP, name_of
from world import MODES, Mode, World

RESETS, ERRORS, TOO_BIG = 0, 1, 2
HOUR_NS = 3600 * 10**9
BURST = 6
DATAGRAMS = 3000
VERSIONS = pytest.mark.parametrize("version", [4, 6])
OTHERS = {4: "198.51.100.{}", 6: "2001:db8:f::{:x}"}


@pytest.fixture(autouse=True)
def nothing_was_answered(world: World) -> Iterator[None]:
    world.forget()
    yield
    world.forget()


def datagram(version: int, source: str = "") -> Packet:
    return frame(udp()(Flow(source or CLIENT[version], VIP[version], port=53)))


def answered(world: World, packet: Packet | bytes) -> bool:
    verdict, _ = world.run(packet)
    assert verdict in (Verdict.TX, Verdict.DROP)
    return verdict is Verdict.TX


def exhaust(world: World, total: int) -> None:
    world.answer_totals[total] = time.monotonic_ns() + HOUR_NS


def pass_time(world: World, nanoseconds: int) -> None:
    """Of budgets that somebody used."""
    used = world.answer_budgets[:, 1] != 0
    world.answer_budgets[used, 1] -= np.uint64(nanoseconds)


@VERSIONS
def test_a_flood_of_datagrams_gets_few_errors(world: World, version: int) -> None:
    packet = bytes(datagram(version))
    before = world.counters()
    begun = time.monotonic()
    got = [answered(world, packet) for _ in range(DATAGRAMS)]
    took_s = time.monotonic() - begun
    assert all(got[:BURST]), "the first at once"
    assert sum(got) <= BURST + took_s + 1
    after, prefix = world.counters(), f"{name_of('udp', version)}.drops"
    for reason, count in (("rejected", sum(got)), ("answer_limited", DATAGRAMS - sum(got))):
        assert after[f"{prefix}.{reason}"] - before.get(f"{prefix}.{reason}", 0) == count


@VERSIONS
def test_another_source_gets_its_own(world: World, version: int) -> None:
    flood = bytes(datagram(version))
    while answered(world, flood):
        pass
    for number in (1, 2, 3):
        other = datagram(version, OTHERS[version].format(number))
        assert [answered(world, other) for _ in range(BURST)] == [True] * BURST
    assert not answered(world, flood)


@VERSIONS
@pytest.mark.parametrize("seconds, more", [(1, 1), (3, 3), (3600, BURST)])
def test_it_is_told_again_as_time_passes(world: World, version: int, seconds: int, more: int) -> None:
    packet = bytes(datagram(version))
    while answered(world, packet):
        pass
    pass_time(world, seconds * 10**9)
    got = [answered(world, packet) for _ in range(2 * BURST)]
    assert got[:more] == [True] * more and not got[-1]


@VERSIONS
def test_all_sources_together_are_limited(world: World, version: int) -> None:
    exhaust(world, ERRORS)
    first = datagram(version, OTHERS[version].format(9))
    assert not answered(world, first)
    world.answer_totals[ERRORS] = 0
    assert [answered(world, first) for _ in range(BURST)] == [True] * BURST, "none of them was paid for"


@VERSIONS
def test_many_sources_get_what_the_kernel_would_give_all_of_them(world: World, version: int) -> None:
    packets = [bytes(datagram(version, OTHERS[version].format(number))) for number in range(1, 251)]
    begun = time.monotonic()
    got = sum(answered(world, packet) for packet in packets)
    assert 50 <= got <= 50 + 1000 * (time.monotonic() - begun) + 1


@VERSIONS
def test_what_floods_takes_nothing_from_the_total(world: World, version: int) -> None:
    flood = bytes(datagram(version))
    for _ in range(DATAGRAMS):
        answered(world, flood)
    world.answer_totals[ERRORS] = time.monotonic_ns() - 10**6  # one is left
    assert not answered(world, flood)
    assert answered(world, datagram(version, OTHERS[version].format(4)))


@VERSIONS
def test_resets_are_limited_in_all_only(world: World, version: int) -> None:
    syn = bytes(frame(tcp()(Flow(CLIENT[version], VIP[version]))))
    assert all(answered(world, syn) for _ in range(100))
    exhaust(world, ERRORS)
    assert answered(world, syn)
    exhaust(world, RESETS)
    before = world.counters()
    assert not answered(world, syn)
    name = f"{name_of('tcp', version)}.drops.answer_limited"
    assert world.counters()[name] - before.get(name, 0) == 1


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_too_big_is_limited_in_all_only(world: World, mode: Mode) -> None:
    packet = udp(bytes(1400))(Flow(CLIENT[mode.version], mode.vip, port=90))
    if mode.version == 4:
        packet.flags = "DF"  # or it would be fragmented
    large = bytes(frame(packet))
    assert all(answered(world, large) for _ in range(100))
    exhaust(world, TOO_BIG)
    assert not answered(world, large)


@VERSIONS
def test_a_source_that_shares_a_line_with_another_gets_its_first_at_once(world: World, version: int) -> None:
    """Whoever had the line before, and however much."""
    world.answer_budgets[:, 0] = 12345
    world.answer_budgets[:, 1] = time.monotonic_ns()
    assert answered(world, datagram(version))
