"""Health checking as it runs: who is checked when, and who hears of it.

Time is the event loop's. A probe waits as one timer in the loop's own heap, not as a sleeping task; a task lives only
as long as its check. Every verdict goes to `on_result`, whose owner keeps the Health and says when to look again.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import aiohttp

from xdplb.checks.endpoint import Endpoint, Perform, Progress
from xdplb.checks.kinds import Wire
from xdplb.checks.targets import Target
from xdplb.core.health import CheckResult
from xdplb.model import Address, BackendKey, Check, CheckType

_log = logging.getLogger(__name__)

FIRST_CHECKS_WITHIN_S = 0.3
FIRST_CHECKS_PER_S = 2000
STARTS_PER_LOOP_PASS = 16
"""Bounds how long a burst keeps the event loop from its other work: a start costs about 0.1 ms."""

_OUT_OF_RESOURCES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


def first_checks_within_s(count: int, interval_s: float) -> float:
    """The time over which the first checks of `count` new endpoints spread: soon, but never a storm."""
    return min(interval_s, max(FIRST_CHECKS_WITHIN_S, count / FIRST_CHECKS_PER_S))


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


@dataclass(slots=True, eq=False)
class _Probe:
    """At most one of `timer`, `queued` and `task` is set; none while the prober does not run."""

    endpoint: Endpoint
    phase: float
    keys: dict[BackendKey, None] = field(default_factory=dict)
    timer: asyncio.TimerHandle | None = None
    queued: bool = False
    task: asyncio.Task[None] | None = None
    again_at_once: bool = False
    removed: bool = False


class Prober:
    """Checks all targets, each endpoint once however many targets share it, until `run` is cancelled.

    `next_interval` is asked after `on_result`, in seconds from start to start. At most `max_in_flight` checks are on
    the wire; where even that many do not answer, checks come late but in order. For the event loop's thread only.
    """

    def __init__(
        self,
        on_result: Callable[[BackendKey, CheckResult], None],
        next_interval: Callable[[BackendKey], float],
        *,
        perform: Perform | None = None,
        max_in_flight: int = 512,
    ) -> None:
        self._on_result = on_result
        self._next_interval = next_interval
        self._perform = perform
        self._max_in_flight = max_in_flight
        self._probes: dict[Endpoint, _Probe] = {}
        self._at_address: dict[Address, set[_Probe]] = {}
        self._queue: deque[_Probe] = deque()
        self._in_flight = 0
        self._pump_scheduled = False
        self._logged: set[str] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(self) -> None:
        async with Wire() as wire, asyncio.TaskGroup() as tasks:
            self._on_wire = self._perform or wire
            self._tasks = tasks
            self._loop = asyncio.get_running_loop()
            try:
                self._hasten(self._probes.values())
                await self._loop.create_future()
            finally:
                self._stop()

    def set_targets(self, targets: Iterable[Target]) -> None:
        """From now on check exactly these; their keys are unique. `check: none` is never checked.

        An endpoint that stays keeps its rhythm and its check in flight; one that goes gives no more results; a new one,
        or one with a new target, is checked soon.
        """
        wanted: defaultdict[Endpoint, dict[BackendKey, None]] = defaultdict(dict)
        for target in targets:
            if target.check.type is not CheckType.NONE:
                wanted[target.endpoint][target.key] = None
        for endpoint in self._probes.keys() - wanted.keys():
            self._remove(endpoint)
        hurried = []
        for endpoint, keys in wanted.items():
            probe = self._probes.get(endpoint) or self._add(endpoint)
            if keys.keys() - probe.keys.keys():
                hurried.append(probe)
            probe.keys = keys
        self._hasten(hurried)

    def burst(self, address: Address) -> None:
        """Check everything at this address now. A check in flight is not doubled, but followed by another at once."""
        for probe in self._at_address.get(address, ()):
            if probe.task is not None:
                probe.again_at_once = True
            elif not probe.queued:
                self._enqueue(probe)

    def _add(self, endpoint: Endpoint) -> _Probe:
        probe = self._probes[endpoint] = _Probe(endpoint, endpoint.phase)
        self._at_address.setdefault(endpoint.address, set()).add(probe)
        return probe

    def _remove(self, endpoint: Endpoint) -> None:
        probe = self._probes.pop(endpoint)
        probe.removed = True
        self._disarm(probe)
        if probe.task is not None:
            probe.task.cancel()
        neighbours = self._at_address[endpoint.address]
        neighbours.remove(probe)
        if not neighbours:
            del self._at_address[endpoint.address]

    def _stop(self) -> None:
        """No more starts; the task group ends what is in flight."""
        self._loop = None
        for probe in self._probes.values():
            self._disarm(probe)
            probe.queued = False
        self._queue.clear()

    def _hasten(self, probes: Iterable[_Probe]) -> None:
        """Check these soon, one after the other as their phases say."""
        if self._loop is None:
            return
        hurried, now = tuple(probes), self._loop.time()
        for probe in hurried:
            within_s = first_checks_within_s(len(hurried), probe.endpoint.check.interval_s)
            self._schedule(probe, now + probe.phase * within_s)

    def _schedule(self, probe: _Probe, due: float) -> None:
        """Check no later than `due`. What is queued or in flight is checked sooner than that anyway."""
        if self._loop is None or probe.queued or probe.task is not None:
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
        if self._loop is None or self._pump_scheduled or not self._queue or self._in_flight >= self._max_in_flight:
            return
        self._pump_scheduled = True
        self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        """Start what is queued, as far as there is room and the other work of the loop allows."""
        self._pump_scheduled = False
        if self._loop is None:
            return
        room = min(STARTS_PER_LOOP_PASS, self._max_in_flight - self._in_flight)
        while self._queue and room > 0:
            probe = self._queue.popleft()
            probe.queued = False
            if probe.removed:
                continue
            room -= 1
            self._in_flight += 1
            probe.task = self._tasks.create_task(self._check(probe, self._loop.time()))
            probe.task.add_done_callback(self._landed)
        self._pump_soon()

    def _landed(self, _: asyncio.Task[None]) -> None:
        """Runs for a check that was cancelled before its first step, too."""
        self._in_flight -= 1
        self._pump_soon()

    async def _check(self, probe: _Probe, started: float) -> None:
        try:
            result = await self._result(probe.endpoint, started)
        finally:
            probe.task = None
        check = probe.endpoint.check
        interval_s = check.fast_interval_s if result is None else self._deliver(probe, result)
        again_at_once, probe.again_at_once = probe.again_at_once, False
        if probe.removed:
            return
        if again_at_once:
            self._enqueue(probe)
        else:
            self._schedule(probe, next_start(started, interval_s, check, probe.phase))

    async def _result(self, endpoint: Endpoint, started: float) -> CheckResult | None:
        """None when this host, not the backend, was not able."""
        progress = Progress()
        try:
            async with asyncio.timeout(endpoint.check.timeout_s):
                ok, reason = await self._on_wire(endpoint, progress)
        except TimeoutError:
            ok, reason = False, progress.layer.timeout
        except (OSError, aiohttp.ClientError) as error:
            if getattr(error, "errno", None) in _OUT_OF_RESOURCES:
                self._log_once(f"health checks left out: {error}; allow more open files (ulimit -n) or memory")
                return None
            ok, reason = False, progress.layer.failure
        except Exception as error:
            self._log_once(f"health check of {endpoint.address} port {endpoint.port} failed oddly", error)
            ok, reason = False, progress.layer.failure
        return CheckResult(ok, reason, asyncio.get_running_loop().time() - started)

    def _deliver(self, probe: _Probe, result: CheckResult) -> float:
        """Tell the owner; return when the first of the probe's targets wants to be checked again, in seconds.

        An owner that fails for one backend must not end the checks of it or of the others.
        """
        intervals_s = []
        for key in probe.keys:
            if probe.removed or key not in probe.keys:  # the owner may have changed the targets a moment ago
                continue
            try:
                self._on_result(key, result)
                intervals_s.append(self._next_interval(key))
            except Exception as error:
                self._log_once(f"health of {key} not updated", error)
        return min(intervals_s, default=probe.endpoint.check.interval_s)

    def _log_once(self, message: str, error: BaseException | None = None) -> None:
        """Once for each kind of error, not for each of thousands of checks."""
        kind = type(error).__qualname__ if error else ""
        if kind not in self._logged:
            self._logged.add(kind)
            _log.error(message, exc_info=error)
