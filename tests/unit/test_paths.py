"""Names of interfaces become names of files, and stay apart."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from xdplb.paths import Instance, is_interface_name, pin_name

NAMES = st.text(min_size=1, max_size=20).filter(is_interface_name)


def test_ordinary_names_stay_as_they_are() -> None:
    assert Instance("eth0").pins.name == "eth0" and pin_name("br-lan_5") == "br-lan_5"
    assert pin_name("eth0.100") == "eth0%2e100"


@given(NAMES)
def test_a_pin_has_no_dot_and_nothing_that_a_string_of_c_would_mind(name: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_%-]+", pin_name(name))


@given(NAMES, NAMES)
def test_no_two_names_become_one(one: str, other: str) -> None:
    assert (pin_name(one) == pin_name(other)) == (one == other)
