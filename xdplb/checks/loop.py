"""The event loop of checks: one epoll over all their sockets, deadlines, and a clock that stands still in a stall.

A stall is time in which the loop did not run: a VM's pause, SIGSTOP, a machine under load. What became due meanwhile is
held against no backend. `now` leaves stalls out, so deadlines move with them; and no check is out of time before its
socket was looked at.
"""

from __future__ import annotations

import heapq
import os
import select
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from time import monotonic

from xdplb.checks.attempt import Attempt, CheckFailed, Kind, NotAble, OutOfTime, Verdict, failed, too_late
from xdplb.checks.endpoint import Endpoint

TICK_S = 0.1
"""How long the loop sleeps at most while checks are under way: only so can it see that it was stopped."""
STALL_S = 0.05
"""What a turn may last beyond the wait it asked for. A longer one is a stall."""
EVENTS_PER_TURN = 512

_EVENTS = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET


class Loop:
    """`on_end(number, verdict, duration_s)` for every check that is not cancelled. Not for several threads."""

    def __init__(self, on_end: Callable[[int, Verdict, float], None], on_bug: Callable[[str], None]) -> None:
        self._on_end = on_end
        self._on_bug = on_bug
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._attempts: dict[int, Attempt] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._waiting: deque[tuple[int, Endpoint, Kind]] = deque()
        self._few: set[int] = set()
        self._children: set[int] = set()
        self._returned = monotonic()
        self._asked_s = 0.0
        self._stalled_s = 0.0

    def close(self) -> None:
        for number in list(self._attempts):
            self.cancel(number)
        self._epoll.close()

    def now(self) -> float:
        """Seconds, without those of stalls."""
        return monotonic() - self._stalled_s

    def start(self, number: int, endpoint: Endpoint, kind: Kind) -> None:
        """A kind with `most_at_once` waits for its turn; its time begins with that."""
        most: int | None = getattr(kind, "most_at_once", None)
        if most is None:
            self._start(number, endpoint, kind)
        elif len(self._few) < most:
            self._few.add(number)
            self._start(number, endpoint, kind)
        else:
            self._waiting.append((number, endpoint, kind))

    def cancel(self, number: int) -> None:
        """No verdict comes any more; what the check holds is closed."""
        attempt = self._attempts.pop(number, None)
        if attempt is None:
            self._waiting = deque(waiting for waiting in self._waiting if waiting[0] != number)
            return
        self._handlers.pop(attempt.fd, None)
        self._few.discard(number)
        attempt.steps.close()

    def listen(self, fd: int, handler: Callable[[int], None], events: int = select.EPOLLIN) -> None:
        """For descriptors that belong to no single check. Level-triggered."""
        if fd in self._handlers:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
        self._handlers[fd] = handler

    def resume(self, attempt: Attempt, events: int) -> None:
        """One step further, for checks that share a descriptor."""
        if self._attempts.get(attempt.number) is attempt:
            self._step(attempt, events)

    def reap(self, child: int) -> None:
        """Takes the exit status of a process that was killed, when there is one."""
        self._children.add(child)

    def turn(self, longest_s: float) -> None:
        """Waits for what comes next, `longest_s` at most, and does it."""
        events = self._epoll.poll(self._patience(longest_s), EVENTS_PER_TURN)
        self._note_stall()
        for fd, mask in events:
            handler = self._handlers.get(fd)
            if handler is not None:
                handler(mask)
        if len(events) < EVENTS_PER_TURN:
            self._expire(self._returned - self._stalled_s)
        while self._waiting and len(self._few) < getattr(self._waiting[0][2], "most_at_once", 1):
            number, endpoint, kind = self._waiting.popleft()
            self.start(number, endpoint, kind)
        for child in list(self._children):
            with suppress(ChildProcessError):
                if os.waitpid(child, os.WNOHANG)[0] == 0:
                    continue
            self._children.discard(child)

    def _patience(self, longest_s: float) -> float:
        if self._attempts or self._children:
            longest_s = min(longest_s, TICK_S)
        if self._deadlines:
            longest_s = min(longest_s, max(0.0, self._deadlines[0][0] - self.now()) + 0.0005)
        self._asked_s = longest_s
        return longest_s

    def _note_stall(self) -> None:
        returned = monotonic()
        beyond_s = returned - self._returned - self._asked_s
        if beyond_s > STALL_S:
            self._stalled_s += beyond_s
        self._returned = returned

    def _expire(self, now: float) -> None:
        deadlines = self._deadlines
        while deadlines and deadlines[0][0] <= now:
            attempt = self._attempts.get(heapq.heappop(deadlines)[1])
            if attempt is not None and attempt.deadline <= now:
                self._step(attempt, OutOfTime)

    def _start(self, number: int, endpoint: Endpoint, kind: Kind) -> None:
        attempt = Attempt(number, endpoint, self)
        attempt.started = self.now()
        attempt.deadline = attempt.started + endpoint.check.timeout_s
        attempt.steps = kind(attempt)
        self._attempts[number] = attempt
        self._step(attempt, None)
        if number in self._attempts:
            heapq.heappush(self._deadlines, (attempt.deadline, number))
            if len(self._deadlines) > 2 * len(self._attempts) + 4096:
                self._deadlines = [(a.deadline, a.number) for a in self._attempts.values()]
                heapq.heapify(self._deadlines)

    def watch(self, attempt: Attempt, fd: int) -> None:
        """The events of this descriptor are the attempt's."""
        attempt.fd = fd
        self._handlers[fd] = lambda events: self._step(attempt, events)
        self._epoll.register(fd, _EVENTS)

    def _step(self, attempt: Attempt, events: int | type[OutOfTime] | None) -> None:
        """`events` is None for the first step."""
        try:
            if events is OutOfTime:
                attempt.steps.throw(OutOfTime)
                attempt.steps.close()
                verdict = too_late(attempt.endpoint, attempt.layer)
            else:
                attempt.steps.send(events)  # type: ignore[arg-type]
                return
        except StopIteration as end:
            verdict = end.value
        except OutOfTime:
            verdict = too_late(attempt.endpoint, attempt.layer)
        except OSError as error:
            verdict = failed(error, attempt.layer)
        except CheckFailed as failure:
            verdict = Verdict(False, failure.reason or attempt.layer.failure, failure.cause)
        except NotAble as trouble:
            verdict = Verdict(None, "SOCKERR", str(trouble))
        except Exception as error:
            self._on_bug(traceback.format_exc())
            verdict = Verdict(False, attempt.layer.failure, f"the check failed oddly: {error!r}")
        self._attempts.pop(attempt.number, None)
        self._handlers.pop(attempt.fd, None)
        self._few.discard(attempt.number)
        self._on_end(attempt.number, verdict, self.now() - attempt.started)
