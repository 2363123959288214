"""Pings of loopback, and programs that check."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from probing import Watch, in_loop, open_thread, probing, target, verdict

from xdplb.checks.exec import PROGRAMS_AT_ONCE
from xdplb.checks.ping import Pinger
from xdplb.checks.process import open_process
from xdplb.model import BackendKey, Check, CheckType

PING, EXEC = CheckType.PING, CheckType.EXEC


@pytest.fixture
def raw_sockets() -> None:
    with contextlib.closing(Pinger()) as pinger:
        if pinger.refusals:
            pytest.skip(f"no raw sockets here: {pinger.refusals}")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@in_loop
async def test_a_ping_of_loopback(host: str, raw_sockets: None) -> None:
    result = await verdict(host, 0, Check(PING, timeout_s=10))
    assert (result.ok, result.reason, result.cause) == (True, "L3OK", "")


@in_loop
async def test_many_pings_share_their_sockets(raw_sockets: None) -> None:
    watch = Watch()
    targets = [target(f"b{i}", f"127.0.1.{i}", 0, Check(PING, timeout_s=10)) for i in range(200)]
    before = len(list(Path("/proc/self/fd").iterdir()))
    async with probing(watch, targets):
        results = [await watch.heard.get() for _ in targets]
        assert len(list(Path("/proc/self/fd").iterdir())) < before + 20
    assert {key for key, _ in results} == {t.key for t in targets}
    assert {result.reason for _, result in results} == {"L3OK"}


@in_loop
async def test_pings_of_the_process_without_privileges(raw_sockets: None) -> None:
    watch = Watch()
    async with probing(watch, [target("a", "127.0.0.1", 0, Check(PING, timeout_s=10))], open_checker=open_process):
        assert (await watch.result()).reason == "L3OK"


@in_loop
async def test_no_way_for_a_ping(raw_sockets: None) -> None:
    """A prefix for documentation, to which loopback's own routes lead nowhere."""
    result = await verdict("240.0.0.1", 0, Check(PING, timeout_s=0.1))
    assert not result.ok and result.reason in ("L3CON", "L3TOUT")
    assert result.cause.startswith(("network unreachable", "host unreachable", "no answer within 0.1s"))


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Path]:
    """A program of the test, which anybody may run: `/` to it is open."""
    for directory in (tmp_path, *tmp_path.parents):
        if directory.stat().st_uid == os.getuid() and directory != Path("/tmp"):
            directory.chmod(directory.stat().st_mode | 0o055)
    yield tmp_path / "check"


def write(script: Path, body: str) -> Check:
    script.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    script.chmod(0o755)
    return Check(EXEC, command=(str(script), "one", "two words"), timeout_s=10)


@pytest.mark.parametrize(
    ("body", "reason", "cause"),
    [
        ("exit 0", "PROCOK", ""),
        ("echo fine; sleep 0 & exit 0", "PROCOK", ""),
        ("exit 3", "PROCERR/3", "exit status 3"),
        ("echo; printf 'no disk\\033\\nmore' >&2; exit 2", "PROCERR/2", "no disk."),
        ("kill -9 $$", "PROCERR", "ended by signal 9 (Killed)"),
        ("head -c 300000 /dev/zero; exit 4", "PROCERR/4", "." * 117 + "..."),
        ('[ "$1|$2" = "one|two words" ] || exit 1', "PROCOK", ""),
        ('[ "$XDPLB_ADDRESS:$XDPLB_PORT" = "127.0.0.9:53" ] || exit 1', "PROCOK", ""),
        ('[ -z "$HOME$USER$SECRET" ] && [ "$(pwd)" = / ] || exit 1', "PROCOK", ""),
        ("kill -0 0; trap 'exit 7' TERM; kill -TERM $$; sleep 5", "PROCERR/7", "exit status 7"),
    ],
)
@in_loop
async def test_how_a_program_ends(body: str, reason: str, cause: str, script: Path) -> None:
    result = await verdict("127.0.0.9", 53, write(script, body))
    assert (result.ok, result.reason, result.cause) == (reason == "PROCOK", reason, cause)


@in_loop
async def test_nothing_of_a_program_outlives_its_time(script: Path, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    pids.touch()
    pids.chmod(0o666)
    check = write(script, f"sleep 1000 & echo $! >> {pids}; echo $$ >> {pids}; wait")
    result = await verdict("127.0.0.1", 1, Check(EXEC, command=check.command, timeout_s=0.5))
    assert (result.ok, result.reason, result.cause) == (False, "PROCTOUT", "no end of the program within 0.5s")
    gone([int(pid) for pid in pids.read_text(encoding="ascii").split()])


@in_loop
async def test_what_a_program_leaves_behind_is_ended(script: Path, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    pids.touch()
    pids.chmod(0o666)
    result = await verdict("127.0.0.1", 1, write(script, f"sleep 1000 & echo $! > {pids}"))
    assert result.reason == "PROCOK"
    gone([int(pids.read_text(encoding="ascii"))])


def gone(pids: list[int]) -> None:
    assert pids
    end = time.monotonic() + 5
    for pid in pids:
        while Path(f"/proc/{pid}/stat").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text("ascii"):
            assert time.monotonic() < end
            time.sleep(0.01)


@in_loop
async def test_few_programs_run_at_once(script: Path, tmp_path: Path) -> None:
    """And the time of one that waits has not begun."""
    running = tmp_path / "running"
    running.mkdir()
    running.chmod(0o777)
    check = write(script, f"touch {running}/$$; ls {running} | wc -l; sleep 0.2; rm {running}/$$; exit 1")
    check = Check(EXEC, command=check.command, timeout_s=1.5, interval_s=0.001)
    watch, count = Watch(), 5 * PROGRAMS_AT_ONCE
    async with probing(watch, [target(f"b{i}", f"127.0.2.{i}", 1, check) for i in range(count)]):
        causes = [int((await watch.result()).cause) for _ in range(count)]
    assert 1 < max(causes) <= PROGRAMS_AT_ONCE


@pytest.mark.parametrize("command", [("/nowhere/check",), ("/etc/passwd",)])
@in_loop
async def test_a_program_that_cannot_be_run_is_no_verdict(
    command: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    watch = Watch()
    check = Check(EXEC, command=command, interval_s=0.001, fast_interval_s=0.001)
    async with probing(watch, [target("a", "127.0.0.1", 1, check)]) as prober:
        while prober.trouble is None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert prober.trouble.startswith(f"1 left out: {command[0]} cannot be run: ")
        prober.set_targets([])
        assert prober.trouble is None
    assert watch.heard.empty()
    assert sum("cannot be run" in record.message for record in caplog.records) == 1


@in_loop
async def test_a_program_runs_without_privileges(script: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("not root: there are none to lose")
    watch = Watch()
    check = write(script, "id -u; id -G; grep -c 0000000000000000 /proc/self/status; exit 1")
    targets = [target("a", "127.0.0.1", 1, check)]
    async with probing(watch, targets, open_checker=open_process):
        result = await watch.result()
    assert result.reason == "PROCERR/1" and int(result.cause) > 0


@in_loop
async def test_a_target_that_goes_takes_its_program_along(script: Path, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    pids.touch()
    pids.chmod(0o666)
    check = write(script, f"echo $$ > {pids}; exec sleep 1000")
    async with probing(Watch(), [target("a", "127.0.0.1", 1, check)], open_checker=open_thread) as prober:
        while not pids.read_text(encoding="ascii").endswith("\n"):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        prober.set_targets([])
        await asyncio.to_thread(gone, [int(pids.read_text(encoding="ascii"))])


def test_a_target_of_pings_is_one_whatever_the_port() -> None:
    first, second = (target(f"b{port}", "127.0.0.1", port, Check(PING)) for port in (80, 443))
    assert first.endpoint == second.endpoint
    assert first.key == BackendKey("web", "b80") and first.address == ip_address("127.0.0.1")
