"""Alarms: said once when they come and once when they go, and there for who asks in between."""

from __future__ import annotations

import itertools
import logging

import pytest

from xdplb.daemon.alarms import Alarms


@pytest.fixture
def alarms() -> Alarms:
    ticks = itertools.count(100)
    return Alarms(lambda: float(next(ticks)))


def test_one_is_logged_when_it_comes_and_when_it_goes_and_not_in_between(
    alarms: Alarms, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(3):
        alarms.raise_("address-missing", "203.0.113.1 is gone from eth0", "ip addr add 203.0.113.1/32 dev eth0")
    alarms.clear("address-missing")
    alarms.clear("address-missing")
    assert [record.message for record in caplog.records] == [
        "alarm: 203.0.113.1 is gone from eth0; ip addr add 203.0.113.1/32 dev eth0",
        "alarm over: 203.0.113.1 is gone from eth0",
    ]


def test_it_keeps_the_time_when_it_came_and_takes_new_words(alarms: Alarms) -> None:
    alarms.raise_("stale", "one", "do this")
    alarms.raise_("other", "two", "do that")
    alarms.raise_("stale", "one, and more", "do this")
    assert [(alarm.name, alarm.since, alarm.text) for alarm in alarms] == [
        ("stale", 100.0, "one, and more"),
        ("other", 101.0, "two"),
    ]


def test_alarms_of_one_name_are_told_apart_by_what_they_are_about(alarms: Alarms) -> None:
    for address in ("203.0.113.1", "203.0.113.2"):
        alarms.set(True, "address-missing", f"{address} is gone", "add it", about=address)
    alarms.set(False, "address-missing", "", "", about="203.0.113.1")
    assert [alarm.about for alarm in alarms] == ["203.0.113.2"] and alarms
    alarms.clear("address-missing", "203.0.113.2")
    assert not alarms
