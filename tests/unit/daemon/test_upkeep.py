"""How often something is put right before one waits, and for how long."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from xdplb.daemon.upkeep import LONGEST_PAUSE_S, MENDS_AT_ONCE, SEVERAL, WITHIN_S, Difference, Patience, together

KEY = ("address-missing", "203.0.113.1")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_few_times_at_once_and_then_after_longer_and_longer_pauses() -> None:
    clock = Clock()
    patience = Patience(clock)
    pauses = []
    for _ in range(MENDS_AT_ONCE + 8):
        clock.now += patience.wait_s(KEY)
        patience.tried(KEY)
        pauses.append(patience.wait_s(KEY))
    assert pauses == [0, 0, 0, 0, 1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert patience.flapping().keys() == {KEY}


def test_once_it_stayed_right_for_long_enough_all_is_forgotten() -> None:
    clock = Clock()
    patience = Patience(clock)
    for _ in range(MENDS_AT_ONCE):
        patience.tried(KEY)
    clock.now += WITHIN_S
    assert patience.flapping()
    clock.now += 2
    assert not patience.flapping()
    patience.tried(KEY)
    assert patience.wait_s(KEY) == 0


def test_what_happens_seldom_is_never_waited_for() -> None:
    clock = Clock()
    patience = Patience(clock)
    for _ in range(100):
        patience.tried(KEY)
        clock.now += WITHIN_S / (MENDS_AT_ONCE - 1) + 0.1
        assert patience.wait_s(KEY) == 0 and not patience.flapping()


def test_one_that_flaps_does_not_hold_up_another() -> None:
    patience = Patience(Clock())
    for _ in range(MENDS_AT_ONCE):
        patience.tried(KEY)
    other = ("program-missing", "eth0")
    assert patience.wait_s(KEY) == 1 and patience.wait_s(other) == 0
    assert patience.next_s([KEY, other]) == 0 and patience.next_s([KEY]) == 1 and patience.next_s([]) is None


@given(st.lists(st.floats(0, 300), max_size=60))
def test_the_pause_has_an_end(waits: list[float]) -> None:
    clock = Clock()
    patience = Patience(clock)
    for wait in waits:
        clock.now += wait
        if patience.wait_s(KEY) == 0:
            patience.tried(KEY)
        assert patience.wait_s(KEY) <= LONGEST_PAUSE_S


def test_many_of_a_kind_are_told_as_one_and_mended_all_the_same() -> None:
    mended: list[int] = []

    def difference(number: int) -> Difference:
        async def mend() -> None:
            mended.append(number)

        return Difference("address-missing", str(number), f"{number} is missing", f"add {number}", mend)

    few = [difference(number) for number in range(SEVERAL)]
    assert together(few, "eth0", "addresses are missing") == few
    many = [difference(number) for number in range(SEVERAL + 1)]
    (one,) = together(many, "eth0", "addresses are missing")
    assert (one.key, one.text) == (
        ("address-missing", "eth0"),
        f"{SEVERAL + 1} addresses are missing, one of them: 0 is missing",
    )
    assert one.mend is not None
    asyncio.run(one.mend())  # type: ignore[arg-type]
    assert mended == list(range(SEVERAL + 1))
