"""Waiting until a backend has no flow left: what is shown, when it ends, and how."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

import pytest
from controlling import serving

import xdplb
from xdplb.api.messages import JSON, Status
from xdplb.api.server import Handler, Request
from xdplb.cli.drain_wait import Left, await_none
from xdplb.errors import XdplbError
from xdplb.model import BackendKey
from xdplb.paths import Instance

KEY = BackendKey("web", "a")
COMMAND = [sys.executable, "-m", "xdplb", "backend", "drain", "web/a", "--wait"]


def status(flows: int, all_known: bool = False, admin: str = "drain") -> JSON:
    backend: dict[str, JSON] = {"name": "a", "admin": admin, "active_flows": flows if all_known else None}
    return {"services": [{"name": "web", "backends": [{**backend, "open_flows": flows}]}]}


def left(*counts: int, all_known: bool = False, admin: str = "drain") -> Iterator[Left]:
    """One after the other; the last one for ever."""
    for count in counts:
        yield Left(count, all_known, admin)
    while True:
        yield Left(counts[-1], all_known, admin)


def await_in_haste(readings: Iterator[Left], timeout_s: float = 5.0, quiet_s: float = 0.0) -> Left:
    return await_none(KEY, lambda: next(readings), timeout_s, poll_s=0.01, quiet_s=quiet_s)


def test_each_change_is_a_line_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    await_in_haste(left(12, 12, 1, 1, 2, 0, all_known=True))
    assert capsys.readouterr().out.splitlines() == [
        *("web/a: 12 flows left", "web/a: 1 flow left", "web/a: 2 flows left", "web/a: no flow left")
    ]


def test_none_is_none_at_once_where_all_are_known() -> None:
    readings = left(0, 1, all_known=True)
    assert await_in_haste(readings, quiet_s=60).flows == 0
    assert next(readings).flows == 1, "nobody asked again"


def test_where_silent_ones_are_not_known_it_has_to_last() -> None:
    began = time.monotonic()
    assert await_in_haste(left(*[0] * 20, 3, 0), quiet_s=0.3) == Left(0, False, "drain")
    assert time.monotonic() - began > 20 * 0.01 + 0.3


@pytest.mark.parametrize(("admin", "advice"), [("drain", "xdplb backend maint web/a"), ("maint", "their next packet")])
def test_when_time_is_up_it_says_how_many_are_left_and_what_to_do(admin: str, advice: str) -> None:
    with pytest.raises(XdplbError, match=r"web/a still has 3 flows after 0\.1 s") as caught:
        await_in_haste(left(4, 3, admin=admin), timeout_s=0.1)
    assert caught.value.exit_code == 1 and advice in caught.value.hint


def test_a_backend_that_is_made_ready_is_waited_for_no_longer() -> None:
    with pytest.raises(XdplbError, match="made it ready"):
        await_in_haste(left(4, admin="active"))


def test_where_the_number_comes_from() -> None:
    assert Left.of(cast(Status, status(7)), KEY) == Left(7, False, "drain")
    assert Left.of(cast(Status, status(7, all_known=True)), KEY) == Left(7, True, "drain")
    with pytest.raises(XdplbError, match="web/b is no longer in the configuration"):
        Left.of(cast(Status, status(7)), BackendKey("web", "b"))


@pytest.fixture
def instance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Instance:
    monkeypatch.setenv("XDPLB_RUNTIME_DIRECTORY", str(tmp_path / "run"))
    monkeypatch.setenv("PYTHONPATH", str(Path(xdplb.__file__).parents[1]))
    return Instance("eth0")


def handlers(statuses: Iterable[JSON]) -> dict[str, Handler]:
    answers = iter(statuses)

    async def steer(request: Request) -> JSON:
        return {"admin": "drain", "window_s": 900.0}

    async def tell(request: Request) -> JSON:
        return next(answers)

    return {"backend": steer, "status": tell}


def endless(flows: int) -> Iterator[JSON]:
    while True:
        yield status(flows)


def test_the_command_ends_with_0_and_says_what_it_cannot_know(instance: Instance) -> None:
    with serving(instance.control, handlers([status(2), *[status(0)] * 9])):
        said = subprocess.run(COMMAND, capture_output=True, text=True, timeout=30, check=False)
    assert (said.returncode, said.stderr) == (0, "")
    assert said.stdout.splitlines() == [
        "web/a drains: no new flows, those it has stay",
        "web/a: 2 flows left",
        "web/a: no flow left",
        "flows that are silent are not known; they keep web/a, if they wake up within 15 min (window)",
    ]


def test_the_command_ends_with_1_when_time_is_up(instance: Instance) -> None:
    with serving(instance.control, handlers(endless(2))):
        said = subprocess.run([*COMMAND, "--timeout", "500ms"], capture_output=True, text=True, timeout=30, check=False)
    assert said.returncode == 1
    assert said.stderr.startswith("xdplb: web/a still has 2 flows after 0.5 s\n  hint: ")


def test_on_a_terminal_it_is_one_line(instance: Instance) -> None:
    counts = [status(n, all_known=True) for n in (100, 2, 0)]
    terminal, other_end = os.openpty()
    with serving(instance.control, handlers(counts)), os.fdopen(terminal, "rb", buffering=0) as screen:
        subprocess.run(COMMAND, stdout=other_end, timeout=30, check=True)
        os.close(other_end)
        shown = screen.read(4096).decode()
    first, *steps = shown.replace("\r\n", "\n").rstrip("\n").split("\n")[-1].split("\r")
    assert first == "" and [step.rstrip() for step in steps] == [
        *("web/a: 100 flows left", "web/a: 2 flows left", "web/a: no flow left")
    ]
    line = ""
    for step in steps:
        line = step + line[len(step) :]
        assert line.rstrip() == step.rstrip(), "nothing of a longer text stays"


def test_an_interrupt_ends_the_waiting_and_says_what_stays(instance: Instance) -> None:
    with (
        serving(instance.control, handlers(endless(2))),
        subprocess.Popen(COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process,
    ):
        assert process.stdout and process.stderr
        process.stdout.readline()
        assert process.stdout.readline() == "web/a: 2 flows left\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert process.stderr.read().strip() == "not waiting any more; drain of web/a stays in force"
