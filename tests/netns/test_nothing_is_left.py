"""A run of tests that fails, or is killed in the middle, leaves nothing on the machine."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from xdplb.lab.laboratory import await_until

ROOT = Path(__file__).parents[2]
PLACES = (Path("/run/netns"), Path("/run"), Path("/sys/fs/bpf"))
PATIENCE_S = 30.0

pytestmark = pytest.mark.usefixtures("able", "bpf_able")


class Run:
    """Of leaking.py. Its processes are known by a file named in their environment, or by their laboratory's prefix."""

    def __init__(self, directory: Path, then: str, *options: str) -> None:
        self.told = directory / "told"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, "tests/netns/leaking.py"],
            cwd=ROOT,
            env={**environment, "TELL": str(self.told), "THEN": then},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def await_the_middle(self) -> None:
        """Returns once everything is there that can be left."""
        await_until(lambda: self._is_there() or self.process.poll() is not None, "its test is under way", PATIENCE_S)
        assert self._is_there()
        running = "\n".join(self.processes())
        for program in ("-m pytest", "-m xdplb up", "nginx: master", "sleep 1000", "views.stats"):
            assert program in running

    def _is_there(self) -> bool:
        return len({Path(path).parent for path in self.left()}) == len(PLACES)

    def left(self) -> list[str]:
        """Of laboratories, cables and pins, of the tests themselves and of the demo that they started."""
        return [str(path) for place in PLACES for prefix in self._prefixes() for path in place.glob(f"{prefix}*")]

    def _prefixes(self) -> list[str]:
        owners = self.told.read_text().split() if self.told.exists() else []
        return [f"xdplb-lab-{pid}-" for pid in owners]

    def processes(self) -> Iterator[str]:
        """Their command lines. Those of nginx have no environment any more, but tell by that where they work."""
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                marked = f"TELL={self.told}".encode() in (process / "environ").read_bytes().split(b"\0")
                if marked or any(prefix in words for prefix in self._prefixes()):
                    yield words

    def nothing_is_left(self) -> bool:
        return not self.left() and not list(self.processes())

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.process.kill()
        self.process.communicate()


def test_of_one_that_fails(tmp_path: Path) -> None:
    with Run(tmp_path, "fail") as run:
        output, _ = run.process.communicate(timeout=4 * PATIENCE_S)
        assert (run.process.returncode, "failed as planned" in output, run.told.exists()) == (1, True, True), output
        await_until(run.nothing_is_left, "nothing is left of it", PATIENCE_S)


@pytest.mark.parametrize(
    ("number", "options"),
    [(signal.SIGKILL, ()), (signal.SIGKILL, ("-n", "1")), (signal.SIGTERM, ())],
    ids=["kill -9", "kill -9 of the one that distributes tests", "kill"],
)
def test_of_one_that_is_killed(tmp_path: Path, number: signal.Signals, options: tuple[str, ...]) -> None:
    with Run(tmp_path, "wait", *options) as run:
        run.await_the_middle()
        run.process.send_signal(number)
        await_until(run.nothing_is_left, "nothing is left of it", PATIENCE_S)
