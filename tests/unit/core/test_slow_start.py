"""Which backend ramps up to its weight, and when that begins and ends."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address

import pytest

from xdplb.core.slow_start import SlowStart
from xdplb.core.status import FULL_RAMP, BackendStatus, NextHop
from xdplb.model import (
    Admin,
    Backend,
    BackendKey,
    Check,
    Config,
    Forward,
    HealthState,
    Listen,
    Protocol,
    Scheduler,
    Service,
)

UP = BackendStatus(health=HealthState.UP, next_hop=NextHop(2, b"\2" * 6, b"\4" * 6, None, 1500))
DOWN = replace(UP, health=HealthState.DOWN)
UNKNOWN = replace(UP, health=HealthState.UNKNOWN)
A = BackendKey("web", "a")
SLOW_START_S = 19.0


def config(**addresses: str) -> Config:
    """One service; a backend's address is what follows 10.0.0."""
    listen = Listen(IPv4Address("203.0.113.1"), 80, 80, Protocol.TCP)
    backends = tuple(Backend(name, IPv4Address(f"10.0.0.{host}"), None) for name, host in addresses.items())
    web = Service("web", listen, Forward.NAT, Scheduler.MAGLEV, Check(), backends, slow_start_s=SLOW_START_S)
    return Config(("eth0",), (web,))


class Story:
    """One backend's statuses, from one to the next."""

    def __init__(self, slow_start: SlowStart, first: BackendStatus, now: float = 0.0) -> None:
        self.slow_start = slow_start
        self.status = slow_start.step(A, BackendStatus(), first, now)

    def becomes(self, status: BackendStatus, now: float) -> int:
        self.status = self.slow_start.step(A, self.status, status, now)
        return self.status.ramp

    def ramp(self, now: float) -> int:
        return self.becomes(self.status, now)


def following(*configs: Config, left: dict[str, list[str]] | None = None) -> SlowStart:
    slow_start = SlowStart()
    for number, each in enumerate(configs):
        slow_start.follow(each, left if number == 0 else None)
    return slow_start


@pytest.mark.parametrize("first", [UNKNOWN, UP])
def test_those_that_a_service_starts_with_do_not_grow(first: BackendStatus) -> None:
    story = Story(following(config(a="1", b="2")), first)
    assert story.becomes(UP, 3) == FULL_RAMP
    assert story.slow_start.ramping == []


@pytest.mark.parametrize("away", [DOWN, replace(UP, admin=Admin.MAINT), replace(UP, admin=Admin.DRAIN)])
def test_one_that_comes_back_begins_and_ends_when_it_is_full(away: BackendStatus) -> None:
    story = Story(following(config(a="1")), UP)
    assert story.becomes(away, 100) == FULL_RAMP
    assert story.slow_start.ramping == []
    assert story.becomes(UP, 200) == 1
    assert story.slow_start.ramping == [A]
    assert [story.ramp(200 + after) for after in (0.9, 1, 9, 18.9)] == [1, 2, 10, 19]
    assert story.ramp(219) == FULL_RAMP
    assert story.slow_start.ramping == []


def test_one_that_goes_away_begins_again() -> None:
    story = Story(following(config(a="1")), DOWN)
    assert story.becomes(UP, 0) == 1
    assert story.ramp(10) == 11
    assert story.becomes(DOWN, 11) == FULL_RAMP, "where everybody serves, by their weights"
    assert story.becomes(UP, 12) == 1
    assert story.ramp(13) == 2


def test_weight_and_way_have_nothing_to_do_with_it() -> None:
    story = Story(following(config(a="1")), DOWN)
    story.becomes(UP, 0)
    assert story.becomes(replace(UP, next_hop=None), 4) == 5
    assert story.becomes(replace(UP, weight=0), 5) == 6
    full = Story(following(config(a="1")), UP)
    full.becomes(replace(UP, next_hop=None, weight=0), 1)
    assert full.becomes(UP, 2) == FULL_RAMP


@pytest.mark.parametrize("first", [UNKNOWN, UP])
def test_one_that_joins_a_service_grows_from_its_first_verdict_on(first: BackendStatus) -> None:
    story = Story(following(config(b="2"), config(a="1", b="2")), first, now=5)
    assert story.becomes(UP, 5) == 1
    assert story.ramp(6) == 2


def test_one_of_another_address_joins() -> None:
    slow_start = following(config(a="1", b="2"))
    assert slow_start.follow(config(a="1", b="2")) == set()
    assert slow_start.follow(config(a="7", b="2")) == {A}
    assert Story(slow_start, UP).status.ramp == 1


def test_a_reload_neither_begins_nor_ends_it() -> None:
    story = Story(following(config(a="1")), DOWN)
    story.becomes(UP, 0)
    story.slow_start.follow(config(a="1", b="2"))
    assert story.ramp(9) == 10
    story.slow_start.follow(config(b="2"))
    assert story.slow_start.ramping == []


def test_a_shorter_slow_start_is_over_sooner() -> None:
    story = Story(following(config(a="1")), DOWN)
    story.becomes(UP, 0)
    (web,) = config(a="1").services
    story.slow_start.follow(Config(("eth0",), (replace(web, slow_start_s=0.0),)))
    assert story.ramp(1) == FULL_RAMP


def test_after_an_adoption_only_those_grow_that_were_not_there() -> None:
    slow_start = SlowStart()
    assert slow_start.follow(config(a="1", b="2"), {"web": ["b"]}) == {A}
    assert Story(slow_start, UP).status.ramp == 1
    slow_start = SlowStart()
    assert slow_start.follow(config(a="1", b="2"), {"web": ["a", "b"]}) == set()
    assert Story(slow_start, UP).status.ramp == FULL_RAMP
    assert slow_start.follow(config(a="9", b="2")) == {A}, "the address is known by now"
