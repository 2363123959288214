"""The daemon's side of the process that carries checks out: it is started, given orders, and heard."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Protocol

import xdplb
from xdplb.checks import frames
from xdplb.checks.endpoint import Endpoint
from xdplb.checks.frames import Frames, Orders, Report

DEFINITIONS_PER_FRAME = 256
BEAT_EVERY_S = 3.0
BEATS_UNANSWERED = 4
_PROGRAM = (
    "import sys; sys.path.insert(0, sys.argv[3]); from xdplb.checks.worker import main; main(*map(int, sys.argv[1:3]))"
)


class Checker(Protocol):
    """What carries out checks. A number is one endpoint's for good."""

    def define(self, number: int, endpoint: Endpoint) -> None: ...

    def start(self, number: int) -> None:
        """One check; a report of its result follows, unless the number is forgotten before."""

    def forget(self, number: int) -> None: ...

    async def ended(self) -> None:
        """Returns when no report will come any more."""


OpenChecker = Callable[[Callable[[Report], None]], AbstractAsyncContextManager[Checker]]
"""Starts one that reports to the callable. OSError where that is not possible."""


@asynccontextmanager
async def open_process(on_report: Callable[[Report], None], launcher: Sequence[str] = ()) -> AsyncIterator[Checker]:
    """Entered once the process runs. `launcher` is a command that runs another in its own place, such as prlimit."""
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            process = _spawn(theirs, launcher)
        except BaseException:
            ours.close()
            raise
    loop = asyncio.get_running_loop()
    transport, stream = await loop.create_unix_connection(lambda: Stream(on_report), sock=ours)
    try:
        await stream.greeted()
        yield stream
    finally:
        transport.abort()
        process.kill()
        await asyncio.shield(asyncio.to_thread(process.wait))


def _spawn(stream: socket.socket, launcher: Sequence[str]) -> subprocess.Popen[bytes]:
    """In a session of its own, so that a Ctrl-C is the daemon's alone."""
    here = str(Path(xdplb.__file__).parent.parent)
    arguments = [str(stream.fileno()), str(os.getpid()), here]
    return subprocess.Popen(
        [*launcher, sys.executable, "-I", "-S", "-c", _PROGRAM, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=[stream.fileno()],
        start_new_session=True,
        env={},
    )


class Stream(asyncio.Protocol):
    """A Checker at the other end of a stream."""

    def __init__(self, on_report: Callable[[Report], None]) -> None:
        self._on_report = on_report
        self._frames = Frames()
        self._orders = Orders()
        self._flush_scheduled = False
        self._loop = asyncio.get_running_loop()
        self._greeted = asyncio.Event()
        self._ended = asyncio.Event()
        self._unanswered = 0

    async def greeted(self) -> None:
        """Until the process has reported its room. ConnectionError where it ends before that."""
        await self._greeted.wait()
        if self._ended.is_set():
            raise ConnectionError("it ended at its start")

    async def ended(self) -> None:
        """Or until the process has not answered several times: one that hangs is as good as none."""
        while self._unanswered < BEATS_UNANSWERED:
            try:
                await asyncio.wait_for(self._ended.wait(), BEAT_EVERY_S)
                return
            except TimeoutError:
                self._unanswered += 1
                self._transport.write(frames.pack_orders(Orders()))

    def define(self, number: int, endpoint: Endpoint) -> None:
        self._orders.define.append((number, endpoint))
        self._flush_soon()

    def forget(self, number: int) -> None:
        self._orders.forget.append(number)
        self._flush_soon()

    def start(self, number: int) -> None:
        self._orders.start.append(number)
        self._flush_soon()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        for frame in self._frames.feed(data):
            try:
                report = frames.report(frame)
            except (ValueError, TypeError):
                self._transport.abort()
                return
            self._unanswered = 0
            self._on_report(report)
            self._greeted.set()

    def connection_lost(self, error: Exception | None) -> None:
        self._ended.set()
        self._greeted.set()

    def _flush_soon(self) -> None:
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_scheduled = False
        orders, self._orders = self._orders, Orders()
        if self._ended.is_set():
            return
        for some in _chunks(orders.define, DEFINITIONS_PER_FRAME):
            self._transport.write(frames.pack_orders(Orders(define=some)))
        if orders.forget or orders.start:
            self._transport.write(frames.pack_orders(Orders(forget=orders.forget, start=orders.start)))


def _chunks(items: list[tuple[int, Endpoint]], size: int) -> Iterable[list[tuple[int, Endpoint]]]:
    return (items[at : at + size] for at in range(0, len(items), size))
