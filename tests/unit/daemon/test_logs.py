"""The log of a daemon: each line with its date; that of `up -d` begins anew when it is full."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import logging, pathlib, sys
from xdplb.daemon import logs
logs.LARGEST_LOG = 2000
logs.log_to_stderr(pathlib.Path(sys.argv[1]))
for number in range(200):
    logging.getLogger("xdplb").info("line %d", number)
"""
LINE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2} line ([0-9]+)")


def say(to: Path, kept: Path) -> subprocess.CompletedProcess[bytes]:
    with to.open("ab") as log:
        return subprocess.run([sys.executable, "-c", PROGRAM, kept], stderr=log, stdout=subprocess.PIPE, timeout=30)


def numbers(path: Path) -> list[int]:
    found = [LINE.fullmatch(line) for line in path.read_text().splitlines()]
    return [int(match[1]) for match in found if match]


def test_it_is_hardly_larger_than_it_may_be_and_the_latest_is_there(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert say(log, log).returncode == 0
    earlier = tmp_path / "log.1"
    said = numbers(earlier) + numbers(log)
    assert said == list(range(said[0], 200)) and len(said) > 60
    assert log.stat().st_size < 2100 and earlier.stat().st_size < 2100
    assert sorted(tmp_path.iterdir()) == [log, earlier]


def test_a_file_that_stderr_was_redirected_to_is_left_alone(tmp_path: Path) -> None:
    log = tmp_path / "elsewhere"
    (tmp_path / "log").touch()
    assert say(log, tmp_path / "log").returncode == 0
    assert numbers(log) == list(range(200)) and not (tmp_path / "log.1").exists()


@pytest.mark.parametrize("there", [True, False])
def test_a_full_disk_is_no_bug(tmp_path: Path, there: bool) -> None:
    log = tmp_path / "log"
    if there:
        log.symlink_to("/dev/full")
    said = say(Path("/dev/full"), log)
    assert (said.returncode, said.stdout) == (0, b"")
