"""What the tests of health checks share: servers on loopback that behave as told, and someone to hear the results."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

from xdplb.checks.frames import Report
from xdplb.checks.ping import Pinger
from xdplb.checks.process import Checker, Stream
from xdplb.checks.scheduler import Prober
from xdplb.checks.targets import Target
from xdplb.checks.worker import Worker
from xdplb.core.health import CheckResult
from xdplb.model import BackendKey, Check

HANG_GUARD_S = 30
NEVER_S = 3600.0

Handle = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def in_loop(scenario: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A coroutine as a test. What the event loop would only log (lost exceptions, say) fails it."""

    @functools.wraps(scenario)
    def test(*args: Any, **kwargs: Any) -> None:
        complaints: list[dict[str, Any]] = []

        async def guarded() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
            async with asyncio.timeout(HANG_GUARD_S):
                await scenario(*args, **kwargs)

        asyncio.run(guarded())
        gc.collect()
        assert complaints == [], complaints

    return test


class Watch:
    """Hears every result; wants the next check after `interval_s`, by default never."""

    def __init__(self, interval_s: float = NEVER_S) -> None:
        self.interval_s = interval_s
        self.heard: asyncio.Queue[tuple[BackendKey, CheckResult]] = asyncio.Queue()

    def on_result(self, key: BackendKey, result: CheckResult) -> None:
        self.heard.put_nowait((key, result))

    def next_interval(self, key: BackendKey) -> float:
        return self.interval_s

    async def names(self, count: int) -> list[str]:
        """The backends of the next `count` results, sorted."""
        return sorted([(await self.heard.get())[0].backend for _ in range(count)])

    async def result(self) -> CheckResult:
        return (await self.heard.get())[1]


@contextlib.asynccontextmanager
async def open_thread(on_report: Callable[[Report], None], room: int = 4096) -> AsyncIterator[Checker]:
    """What the process of the checks does, in a thread: it is there at once, and its failures are the test's."""
    ours, theirs = socket.socketpair()
    worker = threading.Thread(target=_serve, args=(theirs, room))
    worker.start()
    transport, stream = await asyncio.get_running_loop().create_unix_connection(lambda: Stream(on_report), sock=ours)
    try:
        await stream.greeted()
        yield stream
    finally:
        transport.abort()
        await asyncio.shield(asyncio.to_thread(worker.join))


def _serve(stream: socket.socket, room: int) -> None:
    with stream, contextlib.closing(Pinger()) as pinger:
        Worker(stream, room, pinger).serve()


@contextlib.asynccontextmanager
async def probing(watch: Watch, targets: Iterable[Target], **options: Any) -> AsyncIterator[Prober]:
    """On real sockets, unless the options say otherwise."""
    prober = Prober(watch.on_result, watch.next_interval, **{"open_checker": open_thread} | options)
    prober.set_targets(targets)
    running = asyncio.create_task(prober.run())
    try:
        yield prober
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


def target(name: str, host: str, port: int, check: Check, server_host: str | None = None) -> Target:
    return Target(BackendKey("web", name), ip_address(host), port, check, server_host)


async def verdict(host: str, port: int, check: Check, server_host: str | None = None) -> CheckResult:
    """One check, as the prober does it, and without the wait that spreads first checks."""
    watch, at_once = Watch(), replace(check, interval_s=0.001)
    async with probing(watch, [target("a", host, port, at_once, server_host)]):
        return await watch.result()


@contextlib.asynccontextmanager
async def serving(handle: Handle, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """A server; yields its port. `handle` runs once a connection, may lose it, and ends when the client goes."""
    handlers: set[asyncio.Task[None]] = set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await handle(reader, writer)
        writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(answer(reader, writer))
        handlers.add(task)
        task.add_done_callback(handlers.discard)

    server = await asyncio.start_server(connected, host, 0, backlog=4096, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await asyncio.sleep(0)  # connections just accepted get their handlers
        while handlers:
            await handlers.pop()


class HttpServer:
    """Answers every request with the same bytes and closes; keeps the requests."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.requests: list[bytes] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.requests.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(self.answer)
        await writer.drain()
        writer.close()
        await writer.wait_closed()


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Takes everything, says nothing, until the client goes."""
    await reader.read()


def _socket(host: str) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.bind((host, 0))
    return listener


@contextlib.contextmanager
def refusing(host: str) -> Iterator[int]:
    """A port that is taken, so that nobody else listens there, but does not listen."""
    with _socket(host) as bound:
        yield bound.getsockname()[1]


@contextlib.contextmanager
def dropping(host: str) -> Iterator[int]:
    """A port whose queue of connections is full: Linux drops every further SYN, as a firewall would."""
    with _socket(host) as listener:
        listener.listen(0)
        port = listener.getsockname()[1]
        with socket.create_connection((host, port)):
            yield port
