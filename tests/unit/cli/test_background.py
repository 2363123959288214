"""`up -d`, with real processes: the terminal's process ends when the daemon is ready, or fails as the daemon failed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import xdplb
from xdplb.daemon import notify
from xdplb.paths import Instance

PROGRAM = """
import os, signal, sys
from xdplb.cli import background, terminal
from xdplb.daemon import notify
from xdplb.errors import NotCapable
from xdplb.paths import Instance

def serve():
    print("attached to eth0")
    {body}

raise SystemExit(terminal.guarded(lambda: background.start(Instance("eth0"), lambda: terminal.guarded(serve))))
"""


@pytest.fixture
def instance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Instance:
    monkeypatch.setenv("XDPLB_RUNTIME_DIRECTORY", str(tmp_path / "run"))
    monkeypatch.setenv("PYTHONPATH", str(Path(xdplb.__file__).parents[1]))
    return Instance("eth0")


def command(body: str) -> list[str]:
    return [sys.executable, "-c", PROGRAM.format(body=body)]


def started(body: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(body), capture_output=True, text=True, timeout=30)


@contextlib.contextmanager
def ending(pid: int) -> Iterator[None]:
    """Ends the daemon, which is nobody's child here. The descriptor makes sure that it is this one."""
    descriptor = os.pidfd_open(pid)
    try:
        yield
    finally:
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        os.close(descriptor)


def test_the_terminal_is_free_once_the_daemon_is_ready(instance: Instance) -> None:
    said = started("print('pid', os.getpid()); notify.ready(); signal.pause()")
    pid = int(said.stderr.split()[-1])
    with ending(pid):
        assert said.returncode == 0
        assert said.stderr.startswith("attached to eth0\n") and said.stdout == ""
        assert os.getsid(pid) not in (pid, os.getsid(0)), "in a session of its own, which it does not lead"
        assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")
        assert Path(f"/proc/{pid}/fd/0").readlink() == Path("/dev/null")
        assert all(Path(f"/proc/{pid}/fd/{number}").readlink() == instance.log for number in (1, 2))
        assert instance.log.read_text().startswith("attached to eth0\n")
        assert not list(instance.runtime.glob("notify*"))


def test_the_daemons_error_is_the_commands_error(instance: Instance) -> None:
    said = started("raise NotCapable('eth0 cannot do it', 'take another')")
    assert (said.returncode, said.stdout) == (6, "")
    assert said.stderr == "attached to eth0\nxdplb: eth0 cannot do it\n  hint: take another\n"


def test_only_the_latest_words_of_the_log_are_shown(instance: Instance) -> None:
    instance.runtime.mkdir(parents=True)
    instance.log.write_text("what an earlier one said\n")
    assert started("return 0").stderr == "attached to eth0\n"
    assert instance.log.read_text() == "what an earlier one said\nattached to eth0\n"


def test_a_daemon_that_dies_without_a_word_is_missed(instance: Instance) -> None:
    said = started("os.kill(os.getpid(), signal.SIGKILL)")
    assert said.returncode == 1
    assert "xdplb: the daemon on eth0 died while it started\n  hint: " in said.stderr
    assert str(instance.log) in said.stderr


def test_ctrl_c_while_it_starts_interrupts_the_daemon_too(instance: Instance) -> None:
    body = "\n    ".join(("try:", "    signal.pause()", "finally:", "    print('cleaned up')"))
    terminal = subprocess.Popen(command(body), stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert terminal.stderr is not None
    assert terminal.stderr.readline() == "attached to eth0\n"
    terminal.send_signal(signal.SIGINT)
    _, rest = terminal.communicate(timeout=30)
    assert (terminal.returncode, rest) == (130, "cleaned up\n")


def test_readiness_is_told_in_the_words_of_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.settimeout(10)
        listener.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        notify.ready()
        assert listener.recv(100) == b"READY=1"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.settimeout(10)
        listener.bind(f"\0xdplb-test-{os.getpid()}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@xdplb-test-{os.getpid()}")
        notify.notify("STATUS=well")
        assert listener.recv(100) == b"STATUS=well"


def test_without_a_listener_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify.ready()
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    notify.ready()
