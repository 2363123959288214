"""One process at a time: who has the lock is known to the kernel, and only to its owner is it open."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import xdplb
from xdplb.daemon.lock import Held, holder, locked

HOLD = """
import sys
from pathlib import Path
from xdplb.daemon.lock import locked
with locked(Path(sys.argv[1]), "another one", "wait"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "eth0" / "lock"


def test_the_second_one_is_told_who_has_it(path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(xdplb.__file__).parents[1])}
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdin is not None
        assert other.stdout.readline() == "held\n"
        assert holder(path) == other.pid
        with pytest.raises(Held) as caught, locked(path, "another one", "wait"):
            pass
        assert (caught.value.message, caught.value.hint) == (f"another one (process {other.pid})", "wait")
        other.stdin.close()
    with locked(path, "", ""):
        assert path.read_text() == f"{os.getpid()}\n"


def test_nobody_holds_what_is_free_or_not_there(path: Path) -> None:
    assert holder(path) is None
    with locked(path, "", ""):
        assert holder(path) == os.getpid()
    assert holder(path) is None


def test_others_can_neither_read_nor_hold_it_even_where_an_earlier_version_let_them(path: Path) -> None:
    path.parent.mkdir()
    path.touch(0o644)
    with locked(path, "", ""):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
