"""Checks as coroutines on the caller's own event loop, in place of the process: for whoever wants no real sockets."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

from xdplb.checks.attempt import Verdict, failed, too_late
from xdplb.checks.endpoint import Endpoint, Layer
from xdplb.checks.frames import Report, Result
from xdplb.checks.process import Checker, OpenChecker


class Perform(Protocol):
    """One check, without time limit. An OSError is a failure, or this host's own trouble."""

    async def __call__(self, endpoint: Endpoint) -> Verdict: ...


def open_coroutines(perform: Perform, room: int = 1 << 20) -> OpenChecker:
    @asynccontextmanager
    async def opened(on_report: Callable[[Report], None]) -> AsyncIterator[Checker]:
        async with asyncio.TaskGroup() as tasks:
            on_report({"room": room})
            checker = _Coroutines(perform, tasks, on_report)
            try:
                yield checker
            finally:
                checker.close()

    def open_(on_report: Callable[[Report], None]) -> AbstractAsyncContextManager[Checker]:
        return opened(on_report)

    return open_


class _Coroutines:
    def __init__(self, perform: Perform, tasks: asyncio.TaskGroup, on_report: Callable[[Report], None]) -> None:
        self._perform = perform
        self._tasks = tasks
        self._on_report = on_report
        self._endpoints: dict[int, Endpoint] = {}
        self._running: dict[int, asyncio.Task[None]] = {}

    def define(self, number: int, endpoint: Endpoint) -> None:
        self._endpoints[number] = endpoint

    def start(self, number: int) -> None:
        self._running[number] = self._tasks.create_task(self._check(number))

    def forget(self, number: int) -> None:
        del self._endpoints[number]
        if (task := self._running.pop(number, None)) is not None:
            task.cancel()

    async def ended(self) -> None:
        await asyncio.get_running_loop().create_future()

    def close(self) -> None:
        for number in list(self._endpoints):
            self.forget(number)

    async def _check(self, number: int) -> None:
        endpoint, loop = self._endpoints[number], asyncio.get_running_loop()
        started = loop.time()
        try:
            async with asyncio.timeout(endpoint.check.timeout_s):
                verdict = await self._perform(endpoint)
        except TimeoutError:
            verdict = too_late(endpoint, Layer.L4)
        except OSError as error:
            verdict = failed(error, Layer.L4)
        except Exception as error:
            self._on_report({"bug": traceback.format_exc()})
            verdict = Verdict(False, Layer.L4.failure, f"the check failed oddly: {error!r}")
        self._running.pop(number, None)
        result = Result(number, verdict.ok, verdict.reason, verdict.cause, loop.time() - started, verdict.word)
        self._on_report({"results": [result]})
