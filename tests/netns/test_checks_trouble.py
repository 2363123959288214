"""What the gateway lacks is held against no backend: real shortages, in a network namespace of the test's own."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import shutil
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from ipaddress import ip_address
from typing import Any

import pytest
from cable import libc

from xdplb.checks.process import OpenChecker, open_process
from xdplb.checks.scheduler import Prober
from xdplb.checks.targets import Target
from xdplb.core.health import CheckResult
from xdplb.model import BackendKey, Check, CheckType

pytestmark = pytest.mark.usefixtures("able")

CLONE_NEWNET = 0x40000000
HANG_GUARD_S = 30
HTTP = Check(type=CheckType.HTTP, interval_s=0.05, fast_interval_s=0.05, timeout_s=1.0, fall=1)


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def in_own_network(scenario: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """A network namespace is a thread's: it goes with the thread, and with the process that the thread starts."""

    @functools.wraps(scenario)
    def test() -> None:
        failures: list[BaseException] = []

        async def guarded() -> None:
            async with asyncio.timeout(HANG_GUARD_S):
                await scenario()

        def in_thread() -> None:
            try:
                if libc.unshare(CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "unshare")
                run("ip", "link", "set", "lo", "up")
                asyncio.run(guarded())
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=in_thread)
        thread.start()
        thread.join()
        if failures:
            raise failures[0]

    return test


class Hearing:
    """Reasons of the results so far, and what was told of trouble."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.troubles: list[str | None] = []

    def on_result(self, key: BackendKey, result: CheckResult) -> None:
        self.reasons.append(result.reason)


@contextlib.asynccontextmanager
async def checking(targets: list[Target], open_checker: OpenChecker = open_process) -> AsyncIterator[Hearing]:
    hearing = Hearing()
    prober = Prober(
        hearing.on_result, lambda _: HTTP.interval_s, on_trouble=hearing.troubles.append, open_checker=open_checker
    )
    prober.set_targets(targets)
    running = asyncio.create_task(prober.run())
    try:
        yield hearing
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


@contextlib.asynccontextmanager
async def server(delay_s: float = 0.0) -> AsyncIterator[int]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            await asyncio.sleep(delay_s)
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            await reader.read()
        writer.transport.abort()

    listening = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=1024)
    try:
        yield listening.sockets[0].getsockname()[1]
    finally:
        listening.close()


def targets(count: int, port: int) -> list[Target]:
    """Of one address and port, each with a check of its own."""
    address = ip_address("127.0.0.1")
    return [Target(BackendKey("web", f"b{n}"), address, port, HTTP, f"host{n}") for n in range(count)]


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110
        await asyncio.sleep(0.01)


@in_own_network
async def test_no_local_port_is_left() -> None:
    """Four ports for thirty checks that take their time: most find none, and nobody goes down for it."""
    run("sysctl", "-qw", "net.ipv4.ip_local_port_range=40000 40003")
    async with server(delay_s=0.2) as port, checking(targets(30, port)) as hearing:
        await until(lambda: len(hearing.reasons) > 20 and bool(hearing.troubles))
        assert set(hearing.reasons) == {"L7OK/200"}
        assert hearing.troubles[0] == "no local port or address is left to connect from"
        run("sysctl", "-qw", "net.ipv4.ip_local_port_range=40000 49999")
        await until(lambda: hearing.troubles[-1] is None)
        assert set(hearing.reasons) == {"L7OK/200"}


@pytest.mark.skipif(shutil.which("nft") is None, reason="nft is not installed")
@in_own_network
async def test_a_local_firewall_is_in_the_way() -> None:
    """Of datagrams the kernel tells it at once; of a TCP connection it does not, so that is a time-out like any."""
    check = Check(type=CheckType.DNS, name="a.example", interval_s=0.05, fast_interval_s=0.05, fall=1)
    nft = "add table ip t; add chain ip t o { type filter hook output priority 0; }; add rule ip t o udp dport 53 drop"
    run("nft", nft)
    where = Target(BackendKey("dns", "a"), ip_address("127.0.0.1"), 53, check)
    async with checking([where]) as hearing:
        await until(lambda: bool(hearing.troubles))
        assert hearing.troubles == ["this host's firewall or policy forbids it"] and hearing.reasons == []
        run("nft", "delete table ip t")
        await until(lambda: bool(hearing.reasons))
        assert hearing.reasons[0] == "L4CON" and hearing.troubles[-1] is None


@in_own_network
async def test_more_backends_that_do_not_answer_than_descriptors() -> None:
    """One that answers among 1100 that do not: it stays up, however few descriptors there are."""
    async with server(delay_s=3600) as silent, server() as answering:
        everybody = [*targets(1100, silent), *targets(1, answering)]
        async with checking(everybody, partial(open_process, launcher=["prlimit", "--nofile=400"])) as hearing:
            await until(lambda: hearing.reasons.count("L7OK/200") >= 2 and hearing.reasons.count("L7TOUT") > 600)
            assert set(hearing.reasons) == {"L7OK/200", "L7TOUT"}
            assert hearing.troubles == []
