"""Ends what a run of tests started and did not end itself, be it that the tests were killed.

Processes are known by a mark in the environment with which they, or their parents, were started. As a program
(`python -IS aftermath.py PID MARK`) this waits until the process that started it has ended, so it imports the standard
library only. Namespaces, directories and pins are the affair of xdplb/lab/remains.py.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

NAME = "XDPLB_TESTS"
_KILL_S = 5.0


def begin() -> None:
    """Marks everything that this process will start, and has it ended when this process has ended."""
    os.environ[NAME] = str(os.getpid())
    subprocess.Popen(
        [sys.executable, "-IS", str(Path(__file__).resolve()), str(os.getpid()), _mark()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={},
        cwd="/",
    ).returncode = 0  # it outlives this process: there is no end to wait for, and none to warn of


def _mark() -> str:
    return f"{NAME}={os.environ[NAME]}"


def kill_all(mark: str) -> None:
    """Until none is left: one may have started another meanwhile."""
    while pids := [int(pid.name) for pid in Path("/proc").glob("[0-9]*") if _has(pid, mark)]:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                _kill(pid, mark)


def _has(process: Path, mark: str) -> bool:
    """Zombies have no environment any more."""
    if process.name == str(os.getpid()):
        return False
    try:
        return mark.encode() in (process / "environ").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False


def _kill(pid: int, mark: str) -> None:
    handle = os.pidfd_open(pid)
    try:
        if _has(Path(f"/proc/{pid}"), mark):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            select.select([handle], [], [], _KILL_S)
    finally:
        os.close(handle)


def _wait_for(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        handle = os.pidfd_open(pid)
        if os.getppid() == pid:
            select.select([handle], [], [])


if __name__ == "__main__":
    _wait_for(int(sys.argv[1]))
    kill_all(sys.argv[2])
