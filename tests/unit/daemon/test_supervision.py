"""Errors that nobody waits for: the task begins again, the operator is told, and the daemon lives."""

from __future__ import annotations

import asyncio
import logging
import time

import pytest

from xdplb.daemon.alarms import Alarms
from xdplb.daemon.loop_lag import KEPT_S, LoopLag
from xdplb.daemon.supervision import LONGEST_PAUSE_S, Supervisor, said
from xdplb.errors import XdplbError


class Flaky:
    """Fails with each of `errors` in turn, then runs until cancelled."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.running = asyncio.Event()

    async def __call__(self) -> None:
        if self.errors:
            raise self.errors.pop(0)
        self.running.set()
        await asyncio.get_running_loop().create_future()


def kept(*errors: Exception) -> tuple[Alarms, list[float]]:
    """Alarms and pauses, once a task with these errors runs at last."""
    alarms, pauses = Alarms(), []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)

    async def scenario() -> None:
        work = Flaky(*errors)
        task = asyncio.create_task(Supervisor(alarms, pause).keep("the watch", work))
        await asyncio.wait_for(work.running.wait(), 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())
    return alarms, pauses


@pytest.mark.parametrize(
    "error",
    [
        XdplbError("the neighbour table is full", "raise gc_thresh3"),
        OSError(28, "No space left on device"),
        ZeroDivisionError("a bug"),
        ExceptionGroup("unhandled errors in a TaskGroup", [OSError(28, "No space left on device")]),
    ],
)
def test_a_task_that_fails_begins_again_and_an_alarm_says_so(error: Exception) -> None:
    alarms, _ = kept(error)
    (alarm,) = alarms
    assert (alarm.name, alarm.about) == ("task-failed", "the watch") and said(error) in alarm.text


def test_it_is_tried_again_ever_more_slowly() -> None:
    _, pauses = kept(*(ValueError() for _ in range(10)))
    assert pauses == sorted(pauses) and pauses[0] < 1 and pauses[-1] == LONGEST_PAUSE_S


def test_only_a_bug_gets_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    kept(XdplbError("the disk is full", "df -h"), OSError(28, "No space left on device"))
    assert not any(record.exc_info for record in caplog.records)
    kept(ZeroDivisionError())
    assert [bool(record.exc_info) for record in caplog.records if "bug" in record.message] == [True]


def test_what_is_done_once_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def fails() -> None:
        raise OSError(28, "No space left on device")

    caplog.set_level(logging.ERROR)
    asyncio.run(Supervisor(Alarms()).once("not reloaded", fails()))
    assert caplog.records[0].message == "not reloaded: [Errno 28] No space left on device"


def test_the_same_words_of_a_group_are_said_once() -> None:
    assert (
        said(ExceptionGroup("", [XdplbError("full", ""), XdplbError("full", ""), ValueError()])) == "full; ValueError"
    )


def test_the_longest_stand_still_is_known_for_a_while() -> None:
    lag = LoopLag()
    assert lag.longest_s == 0.0
    for now, late_s in ((0.0, 0.01), (1.0, 0.3), (2.0, 0.02), (3.0, 0.1)):
        lag.note(now, late_s)
    assert lag.longest_s == 0.3
    lag.note(1.0 + KEPT_S + 0.1, 0.0)
    assert lag.longest_s == 0.1


def test_a_loop_that_stands_still_is_noticed() -> None:
    async def scenario() -> float:
        lag = LoopLag()
        task = asyncio.create_task(lag.measure())
        await asyncio.sleep(0.05)
        time.sleep(0.2)  # noqa: ASYNC251
        await asyncio.sleep(0.05)
        task.cancel()
        return lag.longest_s

    assert asyncio.run(scenario()) >= 0.15
