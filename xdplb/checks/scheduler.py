"""Health checking as it runs: who is checked when, and who hears of it.

Time is the event loop's. A probe waits as one timer in the loop's own heap; the checks themselves are carried out
elsewhere (process.py). Every verdict goes to `on_result`, whose owner keeps the Health and says when to look again.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from itertools import count

from xdplb.checks.endpoint import Endpoint
from xdplb.checks.frames import Report, Result
from xdplb.checks.process import Checker, OpenChecker, open_process
from xdplb.checks.targets import Target
from xdplb.core.health import AgentWord, CheckResult
from xdplb.model import Address, Admin, BackendKey, Check, CheckType

_log = logging.getLogger(__name__)

FIRST_CHECKS_WITHIN_S = 0.3
FIRST_CHECKS_PER_S = 2000
STARTS_PER_LOOP_PASS = 64
"""Bounds how long a burst keeps the event loop from its other work: a start costs some 10 µs."""

_RESTART_AFTER_S = (0.0, 0.1, 1.0, 5.0)
_RAN_WELL_S = 30.0


def first_checks_within_s(count: int, interval_s: float) -> float:
    """The time over which the first checks of `count` new endpoints spread: soon, but never a storm."""
    return min(interval_s, max(FIRST_CHECKS_WITHIN_S, count / FIRST_CHECKS_PER_S))


def _check_result(result: Result) -> CheckResult:
    word = None
    if result.word is not None:
        admin, percent = result.word
        word = AgentWord(None if admin is None else Admin(admin), percent)
    return CheckResult(bool(result.ok), result.reason, result.duration_s, result.cause, word)


def next_start(started: float, interval_s: float, check: Check, phase: float) -> float:
    """When to check again after a check that began at `started`.

    In the steady state on a fixed grid (phase·interval + n·interval), at most one interval later: whatever brought many
    endpoints together (the start, a burst), they part again at once and never drift. Otherwise `interval_s` later.
    """
    latest = started + interval_s
    if interval_s != check.interval_s:
        return latest
    offset = phase * interval_s
    timer_slack_s = interval_s / 1000  # a timer that fires a hair early must not find its own grid point again
    return offset + math.floor((latest + timer_slack_s - offset) / interval_s) * interval_s


def _log_trouble(trouble: str | None) -> None:
    if trouble is None:
        _log.info("health checks are no longer left out")
    else:
        _log.error("health checks are left out, and say nothing about backends: %s", trouble)


@dataclass(slots=True, eq=False)
class _Probe:
    """At most one of `timer`, `queued` and `in_flight` is set; none while the prober does not run.

    `trouble`: what this host lacked for the latest check.
    """

    number: int
    endpoint: Endpoint
    phase: float
    keys: dict[BackendKey, None] = field(default_factory=dict)
    timer: asyncio.TimerHandle | None = None
    queued: bool = False
    in_flight: bool = False
    started: float = 0.0
    again_at_once: bool = False
    removed: bool = False
    trouble: str = ""


class Prober:
    """Checks all targets, each endpoint once however many targets share it, until `run` is cancelled.

    `next_interval` is asked after `on_result`, in seconds from start to start. At most `max_in_flight` checks are on
    the wire, or fewer where descriptors are short; where even that many do not answer, checks come late but in order.
    `on_trouble` is told what this host lacks for checks, and None when it lacks nothing any more. For the event loop's
    thread only.
    """

    def __init__(
        self,
        on_result: Callable[[BackendKey, CheckResult], None],
        next_interval: Callable[[BackendKey], float],
        *,
        on_trouble: Callable[[str | None], None] = _log_trouble,
        open_checker: OpenChecker = open_process,
        max_in_flight: int = 4096,
    ) -> None:
        self._on_result = on_result
        self._next_interval = next_interval
        self._on_trouble = on_trouble
        self._open_checker = open_checker
        self._max_in_flight = max_in_flight
        self._room = max_in_flight
        self._targets: dict[BackendKey, Target] = {}
        """Those that are checked."""
        self._probes: dict[Endpoint, _Probe] = {}
        self._by_number: dict[int, _Probe] = {}
        self._at_address: dict[Address, set[_Probe]] = {}
        self._queue: deque[_Probe] = deque()
        self._in_flight = 0
        self._numbers = count(1)
        self._pump_scheduled = False
        self._logged: set[str] = set()
        self._troubles: Counter[str] = Counter()
        self._unable = ""
        self._told_room = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._checker: Checker

    @property
    def trouble(self) -> str | None:
        """What this host lacks to carry out checks, in words; None where it lacks nothing."""
        left_out = [f"{number} left out: {what}" for what, number in self._troubles.most_common()]
        return "; ".join([*filter(None, [self._unable]), *left_out]) or None

    async def run(self) -> None:
        """What carries the checks out is started anew when it ends."""
        loop, failures = asyncio.get_running_loop(), 0
        while True:
            await asyncio.sleep(_RESTART_AFTER_S[min(failures, len(_RESTART_AFTER_S) - 1)])
            began = loop.time()
            try:
                await self._run_once(loop)
                reason = "it was killed, crashed or hung"
            except OSError as error:
                reason = f"it cannot start: {error}"
            failures = 1 if loop.time() - began > _RAN_WELL_S else failures + 1
            if failures <= len(_RESTART_AFTER_S):
                _log.error("the process of the health checks has ended (%s); it is started anew", reason)
            if failures > 1:
                self._set_unable("no process carries them out")

    async def _run_once(self, loop: asyncio.AbstractEventLoop) -> None:
        async with self._open_checker(self._on_report) as checker:
            self._checker, self._loop = checker, loop
            try:
                for probe in self._probes.values():
                    checker.define(probe.number, probe.endpoint)
                self._tell_room()
                self._hasten(self._probes.values())
                await checker.ended()
            finally:
                self._stop()

    def set_targets(self, targets: Iterable[Target]) -> None:
        """From now on check exactly these; their keys are unique. `check: none` is never checked.

        An endpoint that stays keeps its rhythm and its check in flight; one that goes gives no more results; a new one,
        or one with a new target, is checked soon.
        """
        wanted = {target.key: target for target in targets}
        self.change_targets(self._targets.keys() - wanted.keys(), wanted.values())

    def change_targets(self, gone: Iterable[BackendKey], new: Iterable[Target], among: int = 0) -> None:
        """No more of these, and those as well, in place of what had their keys; the others stay as they are. `among`
        is how many are new where they come in several calls.
        """
        left, hurried = dict[_Probe, None](), dict[_Probe, None]()
        for key in gone:
            self._leave(key, left)
        for target in new:
            before = self._targets.get(target.key)
            if before is target or (before is not None and before.endpoint == target.endpoint):
                self._targets[target.key] = target
                continue
            self._leave(target.key, left)
            if target.check.type is not CheckType.NONE:
                endpoint = target.endpoint
                probe = self._probes.get(endpoint) or self._add(endpoint)
                probe.keys[target.key] = None
                self._targets[target.key] = target
                hurried[probe] = None
        for probe in left:
            if not probe.keys:
                self._remove(probe.endpoint)
        self._tell_room()
        self._hasten(hurried, among)

    def _leave(self, key: BackendKey, left: dict[_Probe, None]) -> None:
        before = self._targets.pop(key, None)
        if before is not None:
            probe = self._probes[before.endpoint]
            del probe.keys[key]
            left[probe] = None

    def burst(self, address: Address) -> None:
        """Check everything at this address now. A check in flight is not doubled, but followed by another at once."""
        for probe in self._at_address.get(address, ()):
            if probe.in_flight:
                probe.again_at_once = True
            elif not probe.queued:
                self._enqueue(probe)

    def _add(self, endpoint: Endpoint) -> _Probe:
        probe = self._probes[endpoint] = _Probe(next(self._numbers), endpoint, endpoint.phase)
        self._by_number[probe.number] = probe
        self._at_address.setdefault(endpoint.address, set()).add(probe)
        if self._loop is not None:
            self._checker.define(probe.number, endpoint)
        return probe

    def _remove(self, endpoint: Endpoint) -> None:
        probe = self._probes.pop(endpoint)
        del self._by_number[probe.number]
        probe.removed = True
        self._disarm(probe)
        self._note_trouble(probe, "")
        if self._loop is not None:
            self._checker.forget(probe.number)
        if probe.in_flight:
            self._land(probe)
        neighbours = self._at_address[endpoint.address]
        neighbours.remove(probe)
        if not neighbours:
            del self._at_address[endpoint.address]

    def _stop(self) -> None:
        """No more starts, and no results of what is in flight."""
        self._loop = None
        for probe in self._probes.values():
            self._disarm(probe)
            probe.queued = probe.in_flight = probe.again_at_once = False
        self._queue.clear()
        self._in_flight = 0

    def _hasten(self, probes: Collection[_Probe], among: int = 0) -> None:
        """Check these soon, one after the other as their phases say."""
        if self._loop is None:
            return
        count, now = max(len(probes), among), self._loop.time()
        for probe in probes:
            within_s = first_checks_within_s(count, probe.endpoint.check.interval_s)
            self._schedule(probe, now + probe.phase * within_s)

    def _schedule(self, probe: _Probe, due: float) -> None:
        """Check no later than `due`. What is queued or in flight is checked sooner than that anyway."""
        if self._loop is None or probe.queued or probe.in_flight:
            return
        if probe.timer is not None and probe.timer.when() <= due:
            return
        self._disarm(probe)
        probe.timer = self._loop.call_at(due, self._enqueue, probe)

    def _disarm(self, probe: _Probe) -> None:
        if probe.timer is not None:
            probe.timer.cancel()
            probe.timer = None

    def _enqueue(self, probe: _Probe) -> None:
        if self._loop is None:
            return
        self._disarm(probe)
        probe.queued = True
        self._queue.append(probe)
        self._pump_soon()

    def _pump_soon(self) -> None:
        if self._loop is None or self._pump_scheduled or not self._queue or self._in_flight >= self._room:
            return
        self._pump_scheduled = True
        self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        """Start what is queued, as far as there is room and the other work of the loop allows."""
        self._pump_scheduled = False
        if self._loop is None:
            return
        room = min(STARTS_PER_LOOP_PASS, self._room - self._in_flight)
        while self._queue and room > 0:
            probe = self._queue.popleft()
            probe.queued = False
            if probe.removed:
                continue
            room -= 1
            self._in_flight += 1
            probe.in_flight = True
            probe.started = self._loop.time()
            self._checker.start(probe.number)
        self._pump_soon()

    def _land(self, probe: _Probe) -> None:
        probe.in_flight = False
        self._in_flight -= 1
        self._pump_soon()

    def _on_report(self, report: Report) -> None:
        if "room" in report:
            self._room = max(1, min(self._max_in_flight, report["room"]))
        if "bug" in report:
            kind = report["bug"].rstrip().rpartition("\n")[2].partition(":")[0]
            self._log_once(kind, f"a health check failed oddly\n{report['bug']}")
        if report.get("results"):
            self._set_unable("")
        for result in report.get("results", ()):
            probe = self._by_number.get(result.number)
            if probe is not None and probe.in_flight:
                self._landed(probe, result)

    def _landed(self, probe: _Probe, result: Result) -> None:
        self._land(probe)
        check = probe.endpoint.check
        if result.ok is None:
            self._note_trouble(probe, result.cause)
            interval_s = check.fast_interval_s
        else:
            self._note_trouble(probe, "")
            interval_s = self._deliver(probe, _check_result(result))
        again_at_once, probe.again_at_once = probe.again_at_once, False
        if probe.removed:
            return
        if again_at_once:
            self._enqueue(probe)
        else:
            self._schedule(probe, next_start(probe.started, interval_s, check, probe.phase))

    def _deliver(self, probe: _Probe, result: CheckResult) -> float:
        """Tell the owner; return when the first of the probe's targets wants to be checked again, in seconds.

        An owner that fails for one backend must not end the checks of it or of the others.
        """
        intervals_s = []
        for key in tuple(probe.keys):
            if probe.removed or key not in probe.keys:  # the owner may have changed the targets a moment ago
                continue
            try:
                self._on_result(key, result)
                intervals_s.append(self._next_interval(key))
            except Exception as error:
                self._log_once(type(error).__qualname__, f"health of {key} not updated", error)
        return min(intervals_s, default=probe.endpoint.check.interval_s)

    def _note_trouble(self, probe: _Probe, trouble: str) -> None:
        """A kind of trouble is told when it begins, and when the last check that had it is over it."""
        before, probe.trouble = probe.trouble, trouble
        if before == trouble:
            return
        kinds = self._troubles.keys() | ()
        self._troubles.update({trouble: 1} if trouble else {})
        self._troubles.subtract({before: 1} if before else {})
        self._troubles = +self._troubles
        if self._troubles.keys() != kinds:
            self._tell_trouble()

    def _set_unable(self, unable: str) -> None:
        if unable != self._unable:
            self._unable = unable
            self._tell_trouble()

    def _tell_trouble(self) -> None:
        self._on_trouble("; ".join([*filter(None, [self._unable]), *self._troubles]) or None)

    def _tell_room(self) -> None:
        """Where fewer checks can be on the wire than there are: it matters once many backends do not answer."""
        if (
            self._loop is None
            or self._told_room
            or len(self._probes) <= self._room
            or self._room == self._max_in_flight
        ):
            return
        self._told_room = True
        _log.warning(
            "%d health checks, but only %d at a time: more take more open files (ulimit -Hn, LimitNOFILE=)",
            len(self._probes),
            self._room,
        )

    def _log_once(self, kind: str, message: str, error: BaseException | None = None) -> None:
        """Once for each kind of error, not for each of thousands of checks."""
        if kind not in self._logged:
            self._logged.add(kind)
            _log.error(message, exc_info=error)
