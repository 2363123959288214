"""The process of the checks as it really is: what it may do, how it ends, and what its own trouble is not."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from probing import Watch, in_loop, open_thread, probing, serving, silent, target

from xdplb.checks import frames, process
from xdplb.checks.frames import Orders, Report, Result
from xdplb.checks.process import Checker, OpenChecker, open_process
from xdplb.checks.worker import SPARE_DESCRIPTORS
from xdplb.model import Check, CheckType

QUICK = Check(type=CheckType.HTTP, interval_s=0.01, fast_interval_s=0.01, timeout_s=1.0)


def children() -> list[int]:
    """The processes of checks that this one has started."""
    found = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii").split()
    return [int(pid) for pid in found if b"xdplb.checks.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


async def ok_after(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float = 0.0) -> None:
    await reader.readuntil(b"\r\n\r\n")
    await asyncio.sleep(delay_s)
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    await silent(reader, writer)


@contextlib.asynccontextmanager
async def running(watch: Watch, delay_s: float = 0.0, open_checker: OpenChecker = open_process) -> AsyncIterator[int]:
    """Checks by a process of a server that answers after so long; yields the process."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await ok_after(reader, writer, delay_s)

    async with (
        serving(handle) as port,
        probing(watch, [target("a", "127.0.0.1", port, QUICK)], open_checker=open_checker),
    ):
        assert (await watch.result()).reason == "L7OK/200"
        (found,) = children()
        yield found


@contextlib.contextmanager
def serving_elsewhere() -> Iterator[int]:
    """A server in a process of its own, which goes on while this one stands still."""
    program = """
from http.server import *
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
server = HTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout
        try:
            yield int(server.stdout.readline())
        finally:
            server.kill()


@in_loop
async def test_it_has_no_privileges_and_does_not_get_any() -> None:
    async with running(Watch()) as pid:
        fields = status_of(pid)
    if os.geteuid() == 0:
        assert len(set(fields["Uid"] + fields["Gid"])) == 1 and fields["Uid"][0] != "0" and fields["Groups"] == []
    assert {int(fields[name][0], 16) for name in ("CapPrm", "CapEff", "CapAmb")} == {0}
    assert fields["NoNewPrivs"] == ["1"]


@pytest.mark.skipif(os.geteuid() != 0, reason="not root: there is nothing to keep")
@in_loop
async def test_of_a_daemon_that_may_not_change_its_user_it_keeps_nothing_but_that() -> None:
    """As of a hardened service with few capabilities."""
    launcher = ["setpriv", "--bounding-set", "-setuid,-setgid", "--inh-caps", "-setuid,-setgid"]
    async with running(Watch(), open_checker=partial(open_process, launcher=launcher)) as pid:
        fields = status_of(pid)
    assert fields["Uid"][0] == "0"
    assert {int(fields[name][0], 16) for name in ("CapPrm", "CapEff", "CapAmb")} == {0}


def status_of(pid: int) -> dict[str, list[str]]:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return {line.partition(":")[0]: line.partition(":")[2].split() for line in lines}


@in_loop
async def test_it_ends_with_the_checks() -> None:
    async with running(Watch()):
        pass
    assert children() == []


@in_loop
async def test_another_takes_its_place_when_it_is_killed(caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch(interval_s=QUICK.interval_s)
    async with running(watch) as pid:
        os.kill(pid, signal.SIGKILL)
        while children() in ([pid], []):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        while not watch.heard.empty():
            watch.heard.get_nowait()
        assert [(await watch.result()).reason for _ in range(3)] == ["L7OK/200"] * 3
    assert [record.message for record in caplog.records] == [
        "the process of the health checks has ended (it was killed, crashed or hung); it is started anew"
    ]


@in_loop
async def test_another_takes_its_place_when_it_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was stopped for good checks nobody, so nobody would be seen to fail."""
    monkeypatch.setattr(process, "BEAT_EVERY_S", 0.2)
    watch = Watch(interval_s=QUICK.interval_s)
    async with running(watch) as stopped:
        os.kill(stopped, signal.SIGSTOP)
        while stopped in children():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        while not watch.heard.empty():
            watch.heard.get_nowait()
        assert [(await watch.result()).reason for _ in range(3)] == ["L7OK/200"] * 3


@in_loop
async def test_a_process_that_only_answers_beats_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "BEAT_EVERY_S", 0.05)
    async with running(Watch()) as first:
        await asyncio.sleep(0.5)
        assert children() == [first]


@in_loop
async def test_a_process_that_cannot_start_is_trouble_until_it_can() -> None:
    """Nobody is judged meanwhile."""
    told: list[str | None] = []
    attempts = 0

    @contextlib.asynccontextmanager
    async def open_sometimes(on_report: Callable[[Report], None]) -> AsyncIterator[Checker]:
        nonlocal attempts
        attempts += 1
        if attempts < 3:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        async with open_thread(on_report) as checker:
            yield checker

    watch = Watch()
    async with serving(ok_after) as port:
        targets = [target("a", "127.0.0.1", port, QUICK)]
        async with probing(watch, targets, open_checker=open_sometimes, on_trouble=told.append):
            assert (await watch.result()).reason == "L7OK/200"
    assert told == ["no process carries them out", None]


@in_loop
async def test_a_check_under_way_when_it_is_killed_is_no_verdict() -> None:
    watch = Watch(interval_s=QUICK.interval_s)
    async with running(watch, delay_s=0.1) as pid:
        await asyncio.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
        assert {(await watch.result()).reason for _ in range(4)} == {"L7OK/200"}


def test_it_ends_with_its_daemon(tmp_path: Path) -> None:
    """Stopped, too: it does not need to run for that."""
    program = """
import asyncio, sys
from xdplb.checks.process import Checker, OpenChecker, open_process
async def main():
    async with open_process(lambda report: None):
        print(open(f"/proc/self/task/{__import__('os').getpid()}/children").read().split()[0], flush=True)
        await asyncio.sleep(60)
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as daemon:
        assert daemon.stdout
        pid = int(daemon.stdout.readline())
        os.kill(pid, signal.SIGSTOP)
        daemon.kill()
    end = time.monotonic() + 5
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < end
        time.sleep(0.01)


@in_loop
async def test_a_process_that_stood_still_for_two_seconds_holds_it_against_nobody() -> None:
    watch = Watch(interval_s=QUICK.interval_s)
    async with running(watch, delay_s=0.2) as pid:
        for _ in range(2):
            await asyncio.sleep(0.1)
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(2.0)
            os.kill(pid, signal.SIGCONT)
            assert {(await watch.result()).reason for _ in range(3)} == {"L7OK/200"}


@in_loop
async def test_a_daemon_that_stood_still_for_two_seconds_holds_it_against_nobody() -> None:
    watch = Watch(interval_s=QUICK.interval_s)
    with serving_elsewhere() as port:
        async with probing(watch, [target("a", "127.0.0.1", port, QUICK)], open_checker=open_process):
            await watch.result()
            time.sleep(2.0)  # noqa: ASYNC251  # the point
            assert {(await watch.result()).reason for _ in range(5)} == {"L7OK/200"}


@in_loop
async def test_no_more_checks_than_descriptors(caplog: pytest.LogCaptureFixture) -> None:
    inside = most = 0

    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        try:
            await ok_after(reader, writer, 0.01)
        finally:
            inside -= 1

    watch = Watch()
    async with serving(count) as port:
        targets = [target(f"b{i}", "127.0.0.1", port, replace(QUICK, host=f"h{i}")) for i in range(30)]
        async with probing(watch, targets, open_checker=lambda on_report: open_thread(on_report, room=3)):
            assert len(await watch.names(30)) == 30
    assert most <= 3 + 1  # the end of one and the start of the next are not seen in order
    assert [record.message for record in caplog.records] == [
        "30 health checks, but only 3 at a time: more take more open files (ulimit -Hn, LimitNOFILE=)"
    ]


@in_loop
async def test_its_room_is_what_the_hard_limit_of_descriptors_leaves() -> None:
    program = "from xdplb.checks.worker import room; print(room())"
    command = ["prlimit", "--nofile=100:200", sys.executable, "-c", program]
    started = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    output, _ = await started.communicate()
    assert int(output) == 200 - SPARE_DESCRIPTORS


def test_frames_are_the_same_at_the_other_end_however_the_stream_is_cut() -> None:
    first = Report(results=[Result(7, True, "L4OK", "", 0.5), Result(8, None, "SOCKERR", "x", 0.1)])
    stream = frames.pack_report(first) + frames.pack_report(Report(room=5, results=[]))
    for size in (1, 3, len(stream)):
        cutter = frames.Frames()
        pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
        found = [frames.report(frame) for piece in pieces for frame in cutter.feed(piece)]
        assert found == [first, {"room": 5, "results": []}]
    (packed,) = frames.Frames().feed(frames.pack_orders(Orders(forget=[1], start=[2, 3])))
    assert frames.orders(packed) == Orders([], [1], [2, 3])
