"""An exec check: a program of the operator's; its exit status decides.

    PROCOK       it ended with 0
    PROCERR/3    it ended with 3; the cause is the first line that it wrote
    PROCERR      a signal ended it          PROCTOUT    it did not end in time: its process group is killed

There is no shell. The program runs as the process of the checks does, without privileges, in a session of its own. It
knows the backend by XDPLB_ADDRESS and XDPLB_PORT; of the daemon's environment it sees nothing.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
from collections.abc import Generator
from contextlib import suppress

from xdplb.checks.attempt import Attempt, NotAble, Steps, Verdict, excerpt
from xdplb.checks.endpoint import Endpoint, Layer

PROGRAMS_AT_ONCE = 8
"""A program costs far more than a socket; those of many backends wait for each other."""

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_KEPT_OUTPUT = 512
_PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None).prctl


class ExecCheck:
    most_at_once = PROGRAMS_AT_ONCE

    def __init__(self, endpoint: Endpoint) -> None:
        self._command = endpoint.check.command
        self._environment = {
            "PATH": _PATH,
            "LANG": "C.UTF-8",
            "XDPLB_ADDRESS": str(endpoint.address),
            "XDPLB_PORT": str(endpoint.port),
        }

    def __call__(self, attempt: Attempt) -> Steps:
        attempt.layer = Layer.PROC
        program = self._spawn()
        try:
            status, output = yield from _end_of(program, attempt)
        finally:
            _kill(program, attempt)
        if status == 0:
            return Verdict(True, "PROCOK")
        if status < 0:
            return Verdict(False, "PROCERR", f"ended by signal {-status} ({signal.strsignal(-status)})")
        line = next(filter(None, map(bytes.strip, output.splitlines())), b"")
        return Verdict(False, f"PROCERR/{status}", excerpt(line, 120) or f"exit status {status}")

    def _spawn(self) -> subprocess.Popen[bytes]:
        """A program that cannot be run says nothing about a backend."""
        try:
            return subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=self._environment,
                cwd="/",
                start_new_session=True,
                preexec_fn=_become_a_program,
            )
        except (OSError, subprocess.SubprocessError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise NotAble(f"{self._command[0]} cannot be run: {reason.lower()}") from None


def _become_a_program() -> None:
    """In the child: it ends with its parent, and signals mean to it what they mean to others."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end_of(program: subprocess.Popen[bytes], attempt: Attempt) -> Generator[None, int, tuple[int, bytes]]:
    """The exit status and the beginning of the output. Both descriptors are watched as one."""
    assert program.stdout
    pipe = program.stdout.fileno()
    os.set_blocking(pipe, False)
    output = b""
    ended = os.pidfd_open(program.pid)
    both = select.epoll()
    try:
        both.register(ended, select.EPOLLIN)
        both.register(pipe, select.EPOLLIN)
        attempt.watch(both.fileno())
        while True:
            for fd, _ in both.poll(0):
                if fd == pipe:
                    more = _read(pipe)
                    if more == b"":
                        both.unregister(pipe)
                    output = (output + (more or b""))[:_KEPT_OUTPUT]
                else:
                    output = (output + (_read(pipe) or b""))[:_KEPT_OUTPUT]
                    with suppress(ProcessLookupError, PermissionError):
                        os.killpg(program.pid, signal.SIGKILL)  # what it left behind; its number is still its own
                    return program.wait(), output
            yield
    finally:
        both.close()
        os.close(ended)


def _read(pipe: int) -> bytes | None:
    """Nothing at its end, None where there is nothing to be had now."""
    try:
        return os.read(pipe, 65_536)
    except BlockingIOError:
        return None


def _kill(program: subprocess.Popen[bytes], attempt: Attempt) -> None:
    assert program.stdout
    program.stdout.close()
    if program.returncode is None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(program.pid, signal.SIGKILL)
        if program.poll() is None:
            attempt.reap(program.pid)
            program.returncode = -signal.SIGKILL
