"""Whether a backend works, as told by the results of its checks. Pure: the caller brings the results and the time.

    UNKNOWN ── first result ──► UP ── `fall` failures in a row ──► DOWN ── `rise` successes in a row ──► UP

The reasons are the codes people know from HAProxy ("show servers state", check_status in the statistics):

    INI         no check has ended yet          L7OK/200    HTTP status as expected
    no check    `check: none`                   L7STS/500   HTTP status not expected
    L4OK        TCP connection opened           L7RSP       no valid HTTP answer
    L4CON       refused or unreachable          L7TOUT      connected, no answer in time
    L4TOUT      no TCP connection in time
    L6RSP       TLS handshake failed
    L6TOUT      no TLS handshake in time
    L3OK        ping answered               PROCOK      program ended well
    L3CON       host unreachable            PROCERR/3   program failed
    L3TOUT      no answer to the ping       PROCTOUT    program did not end in time

Beside the code, a failed check has a cause in words: "connection refused", "answered 500 Internal Server Error".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from xdplb.model import Admin, Check, CheckType, HealthState

NOT_CHECKED_YET = "INI"
NO_CHECK = "no check"


class AgentWord(NamedTuple):
    """What a backend's agent asks for: None where it did not speak of it. `percent` is of the weight."""

    admin: Admin | None
    percent: int | None


@dataclass(frozen=True, slots=True)
class CheckResult:
    """How one check ended. `duration_s` is from its start to its verdict; `cause` says why it failed; `word` is an
    agent's.
    """

    ok: bool
    reason: str
    duration_s: float
    cause: str = ""
    word: AgentWord | None = None


@dataclass(frozen=True, slots=True)
class Health:
    """`streak` counts the latest results in a row that speak against `state`; it is 0 while UNKNOWN.

    `reason`, `duration_s` and `cause` are the latest result's; `since` is when `state` last changed, on the caller's
    clock.
    """

    state: HealthState
    streak: int
    reason: str
    since: float
    duration_s: float
    cause: str = ""

    @property
    def why(self) -> str:
        return f"{self.reason}: {self.cause}" if self.cause else self.reason


def initial(check: Check, now: float) -> Health:
    """Before the first result. A backend without a check is UP from the start."""
    if check.type is CheckType.NONE:
        return Health(HealthState.UP, 0, NO_CHECK, now, 0.0)
    return Health(HealthState.UNKNOWN, 0, NOT_CHECKED_YET, now, 0.0)


def observe(health: Health, result: CheckResult, check: Check, now: float) -> Health:
    """The health after one more result. An UNKNOWN backend takes its first result for a verdict."""
    claimed = HealthState.UP if result.ok else HealthState.DOWN
    if health.state is claimed:
        return Health(health.state, 0, result.reason, health.since, result.duration_s, result.cause)
    streak = health.streak + 1
    needed = 1 if health.state is HealthState.UNKNOWN else check.rise if result.ok else check.fall
    if streak < needed:
        return Health(health.state, streak, result.reason, health.since, result.duration_s, result.cause)
    return Health(claimed, 0, result.reason, now, result.duration_s, result.cause)


def next_interval_s(health: Health, check: Check) -> float:
    """From the start of the latest check to the start of the next: shorter while a verdict is pending."""
    transitional = health.state is HealthState.UNKNOWN or health.streak > 0
    return check.fast_interval_s if transitional else check.interval_s
