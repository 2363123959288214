"""What the client of the demo saw, and whether it went as it should. Pure: all times come in, of CLOCK_MONOTONIC.

Shares are of new connections only. A connection that stays open stays with its server, whatever the weights say.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from xdplb.lab.services import HttpResult

_GRACE_S = 0.5
"""Connections that stay open are used, and found broken, only at their next request."""

_DEVIATIONS, _SLACK = 5.0, 0.01
"""How far a share may be off: so many standard deviations of a fair draw, and so much for slots that do not divide."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A request without an answer. `reason` is HttpResult's `error`."""

    started_s: float
    ended_s: float
    reason: str
    new_connection: bool


def reasons(failures: Iterable[Failure]) -> str:
    """`refused 12, reset 3`, the most frequent first."""
    counted = Counter(failure.reason for failure in failures)
    return ", ".join(f"{reason} {count}" for reason, count in counted.most_common())


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of time in which `weights` was in force; a server that is down has weight 0."""

    name: str
    since_s: float
    until_s: float
    weights: Mapping[str, int]

    def fair_share(self, server: str) -> float:
        return self.weights[server] / sum(self.weights.values())


@dataclass(frozen=True, slots=True)
class Change:
    """A server killed or started, and seen out of service or back. While that lasts requests may fail, else not.

    At a kill: those that reach the dead server. At a return: those on connections, opened meanwhile, whose slots move.
    """

    what: str
    at_s: float
    seen_s: float

    def explains(self, failure: Failure) -> bool:
        return failure.ended_s >= self.at_s and failure.started_s <= self.seen_s + _GRACE_S


class Tally:
    """Every request that came to an end, each of one attempt."""

    def __init__(self) -> None:
        self.answered: Counter[str] = Counter()
        self.failures: list[Failure] = []
        self._answers: list[tuple[float, str, bool]] = []

    @property
    def total(self) -> int:
        return self.answered.total() + len(self.failures)

    def add(self, results: Iterable[HttpResult], *, new_connections: bool) -> None:
        for result in results:
            ended_s = result.started_s + result.latency_s
            if result.backend is None:
                self.failures.append(Failure(result.started_s, ended_s, str(result.error), new_connections))
            else:
                self.answered[result.backend] += 1
                self._answers.append((ended_s, result.backend, new_connections))

    def answers(self, since_s: float, until_s: float) -> Counter[str]:
        """Answered requests in that time, by server."""
        return Counter(server for ended, server, _new in self._answers if since_s <= ended < until_s)

    def on_new_connections(self, since_s: float, until_s: float) -> Counter[str]:
        """Those of them that had a connection of their own."""
        return Counter(server for ended, server, new in self._answers if new and since_s <= ended < until_s)

    def failures_of(self, change: Change) -> list[Failure]:
        return [failure for failure in self.failures if change.explains(failure)]

    def failover_s(self, kill: Change) -> float | None:
        """From the kill to the end of the last request that failed of it; None where none did."""
        return max((failure.ended_s - kill.at_s for failure in self.failures_of(kill)), default=None)

    def problems(self, phases: Iterable[Phase], changes: Sequence[Change]) -> list[str]:
        """What a working load balancer would not let happen, a line each."""
        found = [problem for phase in phases for problem in self._unfair(phase)]
        unexplained = [failure for failure in self.failures if not any(c.explains(failure) for c in changes)]
        if unexplained:
            found.append(f"{len(unexplained)} requests failed while nothing changed: {reasons(unexplained)}")
        return found

    def _unfair(self, phase: Phase) -> list[str]:
        counted = self.on_new_connections(phase.since_s, phase.until_s)
        total = counted.total()
        if total == 0:
            return [f"{phase.name}: no request was answered"]
        found = []
        for server in phase.weights:
            fair, share = phase.fair_share(server), counted[server] / total
            if abs(share - fair) > _DEVIATIONS * math.sqrt(fair * (1 - fair) / total) + _SLACK:
                found.append(f"{phase.name}: {server} took {share:.1%} of new connections, {fair:.1%} is its share")
        return found
