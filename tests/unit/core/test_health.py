"""The health state machine, beside a reference that keeps no state: it reads the verdict off the whole history."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdplb.core.health import CheckResult, Health, initial, next_interval_s, observe
from xdplb.model import Check, CheckType, HealthState

UNKNOWN, UP, DOWN = HealthState.UNKNOWN, HealthState.UP, HealthState.DOWN
CHECK = Check(rise=2, fall=3, interval_s=2.0, fast_interval_s=0.5)

histories = st.text(alphabet="+-", max_size=60)
checks = st.builds(Check, rise=st.integers(1, 5), fall=st.integers(1, 5))


def result(sign: str, at: int = 0) -> CheckResult:
    return CheckResult(sign == "+", "L4OK" if sign == "+" else "L4CON", at / 1000)


def healths(history: str, check: Check = CHECK) -> list[Health]:
    """The health before the first result and after each; the clock shows 100, 101, 102, …"""
    seen = [initial(check, 100.0)]
    for at, sign in enumerate(history, start=101):
        seen.append(observe(seen[-1], result(sign, at), check, float(at)))
    return seen


def state_by_history(history: str, check: Check) -> HealthState:
    """Search backwards for the latest moment at which the last results alone decided."""
    for end in range(len(history), 0, -1):
        if history[:end].endswith("-" * check.fall):
            return DOWN
        if history[:end].endswith("+" * check.rise):
            return UP
    return {"+": UP, "-": DOWN}[history[0]] if history else UNKNOWN


@given(histories, checks)
def test_state_is_what_the_last_results_say(history: str, check: Check) -> None:
    for length, health in enumerate(healths(history, check)):
        assert health.state is state_by_history(history[:length], check)


@given(histories, checks)
def test_since_is_the_time_of_the_latest_change_of_state(history: str, check: Check) -> None:
    seen = healths(history, check)
    states = [health.state for health in seen]
    for length, health in enumerate(seen):
        changes = [i for i in range(1, length + 1) if states[i] is not states[i - 1]]
        assert health.since == 100.0 + max(changes, default=0)


@given(histories, checks)
def test_reason_and_duration_are_the_latest_results(history: str, check: Check) -> None:
    for at, (sign, health) in enumerate(zip(history, healths(history, check)[1:], strict=True), start=101):
        assert (health.reason, health.duration_s) == (result(sign, at).reason, at / 1000)


@given(histories, checks)
def test_checked_fast_exactly_while_the_latest_result_contradicts_the_state(history: str, check: Check) -> None:
    for length, health in enumerate(healths(history, check)):
        agreeing = {UP: "+", DOWN: "-", UNKNOWN: None}[health.state]
        steady = length > 0 and history[length - 1] == agreeing
        assert next_interval_s(health, check) == (check.interval_s if steady else check.fast_interval_s)


@pytest.mark.parametrize(
    ("history", "state"),
    [
        ("", UNKNOWN),
        ("+", UP),
        ("-", DOWN),
        ("+--", UP),
        ("+---", DOWN),
        ("+--+--", UP),
        ("-+", DOWN),
        ("-++", UP),
        ("-+-+", DOWN),
        ("+---+", DOWN),
        ("+---++--", UP),
        ("+---++---", DOWN),
    ],
)
def test_examples_with_rise_2_and_fall_3(history: str, state: HealthState) -> None:
    assert healths(history)[-1].state is state


def test_before_the_first_result() -> None:
    assert initial(CHECK, 7.0) == Health(UNKNOWN, 0, "INI", 7.0, 0.0)


def test_without_a_check_a_backend_is_up_from_the_start() -> None:
    assert initial(Check(type=CheckType.NONE), 7.0) == Health(UP, 0, "no check", 7.0, 0.0)


def test_a_failure_keeps_the_state_but_shows_its_reason() -> None:
    up = healths("+")[-1]
    failing = observe(up, CheckResult(False, "L7STS/503", 0.02, "answered 503"), CHECK, 150.0)
    assert failing == Health(UP, 1, "L7STS/503", up.since, 0.02, "answered 503")
    assert failing.why == "L7STS/503: answered 503"


def test_a_cause_goes_with_the_failure() -> None:
    failed = observe(initial(CHECK, 7.0), CheckResult(False, "L4CON", 0.02, "connection refused"), CHECK, 150.0)
    assert (failed.state, failed.cause) == (DOWN, "connection refused")
    assert observe(failed, CheckResult(True, "L4OK", 0.02), CHECK, 151.0).why == "L4OK"


def test_a_reload_that_lowers_fall_takes_effect_on_the_next_failure() -> None:
    failing = healths("+--")[-1]
    assert observe(failing, result("-"), replace(CHECK, fall=1), 150.0).state is DOWN
