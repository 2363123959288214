"""Without a daemon that shows itself alive, packets are the kernel's: where the configuration asks for that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from packets import CLIENT, Flow, Verdict, frame, tcp
from scapy.layers.l2 import Dot1Q
from world import MODES, NAT, World, open_world

from xdplb.dataplane.clock import Clock, clock


@pytest.fixture(scope="module")
def watched(world: World) -> Iterator[World]:
    with open_world(world.interfaces, replace(world.plane.features, watchdog=True), "watched") as watched:
        yield watched


@pytest.fixture(scope="module")
def ticks(world: World) -> Clock:
    """As the programs of this world count them."""
    return clock(world.plane.features.times.tick_shift)


PACKET = bytes(frame(tcp()(Flow(CLIENT[4], MODES[2].vip))))
KINDS = {
    "a tagged one": bytes(frame(tcp()(Flow(CLIENT[4], MODES[2].vip)), tags=(Dot1Q(vlan=5),))),
    "a reply": bytes(frame(tcp("SA")(Flow(NAT[4].backend, CLIENT[4], source_port=NAT[4].nat_ports["tcp"])))),
}
"""Which are balanced while a daemon lives."""


@pytest.mark.parametrize("ahead", [2, 1000, (1 << 31) - 2])
def test_packets_are_balanced_until_then(watched: World, ticks: Clock, ahead: int) -> None:
    watched.plane.trust_until(ticks.tick + ahead)
    assert watched.run(PACKET)[0] is Verdict.TX


@pytest.mark.parametrize("late", [2, 1000, (1 << 31) - 2, 1 << 29])
def test_and_passed_as_they_are_afterwards_also_when_ticks_have_come_round(
    watched: World, ticks: Clock, late: int
) -> None:
    """Most of these moments lie before tick 0."""
    assert ticks.tick < 1 << 29
    watched.plane.trust_until(ticks.tick - late)
    before = watched.counters().get("verdicts.pass", 0)
    assert watched.run(PACKET) == (Verdict.PASS, PACKET)
    assert watched.counters()["verdicts.pass"] == before + 1


@pytest.mark.parametrize("packet", KINDS.values(), ids=KINDS.keys())
def test_whatever_they_are(watched: World, ticks: Clock, packet: bytes) -> None:
    watched.plane.trust_until(ticks.tick + 5)
    assert watched.run(packet)[0] in (Verdict.TX, Verdict.REDIRECT)
    watched.plane.trust_until(ticks.tick - 5)
    assert watched.run(packet) == (Verdict.PASS, packet)


def test_the_next_daemon_has_them_balanced_at_once(watched: World, ticks: Clock) -> None:
    watched.plane.trust_until(ticks.tick - 5)
    assert watched.run(PACKET)[0] is Verdict.PASS
    watched.plane.trust_until(ticks.tick + 5)
    assert watched.run(PACKET)[0] is Verdict.TX


def test_turning_the_address_table_changes_nothing_about_it(watched: World, ticks: Clock) -> None:
    watched.plane.trust_until(ticks.tick + 5)
    half = watched.plane.half
    watched.plane.publish(half)
    assert watched.plane.half == half and watched.run(PACKET)[0] is Verdict.TX


def test_nobody_else_is_asked(world: World, ticks: Clock) -> None:
    world.plane.trust_until(ticks.tick - 1000)
    assert world.run(PACKET)[0] is Verdict.TX
