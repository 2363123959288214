"""The live view, on a real (pseudo) terminal."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
from pathlib import Path

import pytest

import xdplb

PROGRAM = """
import itertools
from rich.console import Console
from xdplb.cli import terminal, top

count = itertools.count(0, 5000)
def read_stats():
    packets = next(count)
    service = {"name": "web", "packets": packets, "bytes": 0, "new_flows": 0, "drops": {}, "backends": []}
    return {"services": [service], "verdicts": {}}

raise SystemExit(terminal.guarded(lambda: top.follow(top.Sampler(read_stats, lambda: None), Console())))
"""


def read_until(descriptor: int, wanted: bytes) -> bytes:
    seen = b""
    while wanted not in seen:
        readable, _, _ = select.select([descriptor], [], [], 20)
        assert readable, f"{wanted!r} did not appear, only {seen!r}"
        seen += os.read(descriptor, 65536)
    return seen


@pytest.mark.parametrize(("key", "code"), [(b"q", 0), (b"xQ", 0), (b"\x03", 130)])
def test_top_is_live_until_q_or_ctrl_c(key: bytes, code: int) -> None:
    controller, terminal = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(Path(xdplb.__file__).parents[1]), "TERM": "xterm"}
    command = ["setsid", "--ctty", sys.executable, "-c", PROGRAM]
    with (
        subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=subprocess.PIPE, env=environment) as live,
        os.fdopen(controller, "rb", buffering=0),
    ):
        try:
            os.close(terminal)
            assert b"web" in read_until(controller, b"no daemon answers")
            os.write(controller, key)
            _, errors = live.communicate(timeout=20)
            assert (live.returncode, errors.strip()) == (code, b"")
        finally:
            live.kill()
