"""`xdplb demo` shows what it promises, fails where it must, and leaves nothing behind whatever ends it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

import xdplb

pytestmark = pytest.mark.usefixtures("able", "nginx", "bpf_able")

SHORT = """
from xdplb.cli import terminal, views
from xdplb.demo.app import Schedule, run
raise SystemExit(terminal.guarded(lambda: run(views.stats, Schedule(1.2, 1.2, 1.2, new_per_s=200, kept_per_s=50))))
"""
INTERRUPTED = 130


@pytest.fixture(scope="module")
def nginx() -> None:
    if shutil.which("nginx") is None:
        pytest.skip("nginx is not installed (apt-get install nginx-light)")


class Demo:
    """A short demo in a process of its own, with pipes for its outputs, or with a terminal."""

    def __init__(self, stdout: int = subprocess.PIPE, **environment: str) -> None:
        package = str(Path(xdplb.__file__).parent.parent)
        self.process = subprocess.Popen(
            [sys.executable, "-c", SHORT],
            stdin=subprocess.DEVNULL if stdout == subprocess.PIPE else stdout,
            stdout=stdout,
            stderr=subprocess.PIPE if stdout == subprocess.PIPE else stdout,
            bufsize=0,  # or `communicate` would miss what was read ahead
            preexec_fn=os.setsid if stdout == subprocess.PIPE else lambda: take(stdout),
            env={**os.environ, "PYTHONPATH": package, "PYTHONUNBUFFERED": "1", "TERM": "xterm-256color", **environment},
        )
        self.output = ""

    def read_until(self, text: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line.decode()
            if text in line.decode():
                return
        pytest.fail(f"{text!r} never came: {self.output}{self.end()[1]}")

    def end(self) -> tuple[int, str]:
        """The exit code and stderr; what was left of stdout is added to `output`."""
        rest, errors = self.process.communicate(timeout=60)
        self.output += (rest or b"").decode()
        return self.process.returncode, (errors or b"").decode()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        """Where the test did not see its end: by SIGTERM, so that its laboratory goes too."""
        self.process.terminate()
        try:
            self.process.communicate(timeout=30)
        finally:
            self.process.kill()
            self.process.communicate()

    def left(self) -> list[str]:
        """Namespaces, directories, pins, and processes that still work in one of those."""
        prefix = f"xdplb-lab-{self.process.pid}-"
        places = (Path("/run/netns"), Path("/run"), Path("/sys/fs/bpf"))
        paths = [str(path) for place in places for path in place.glob(f"{prefix}*")]
        return paths + [words for words in command_lines() if prefix in words]

    @property
    def daemon(self) -> int:
        """The process id of the xdplb in its gateway."""
        return int(Path(f"/run/xdplb-lab-{self.process.pid}-0/gateway/run/eth0/lock").read_text())


def take(terminal: int) -> None:
    """Makes the terminal that of this process, whom its keys then reach."""
    os.setsid()
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)


def command_lines() -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue


@pytest.fixture
def demo() -> Iterator[Demo]:
    with Demo() as running:
        yield running


@pytest.fixture(scope="class")
def whole_run() -> Demo:
    with Demo() as demo:
        code, errors = demo.end()
        assert (code, errors) == (0, ""), demo.output
        return demo


class TestWholeRun:
    def test_it_tells_its_story_in_plain_lines(self, whole_run: Demo) -> None:
        chapters = [
            r"gateway .*\n.*203\.0\.113\.10:80.*\n.*XDP, nat",
            r"laboratory: 6 network namespaces, 3 nginx",
            r"xdplb up eth0 eth1: native XDP, compiled and ready in \d+\.\d s",
            r"all up: nginx1 \d+\.\d%, nginx2 \d+\.\d%, nginx3 \d+\.\d% of new connections; 0 requests failed",
            r"nginx2 killed \(SIGKILL\)",
            r"nginx2 is DOWN \(L4CON\), \d\.\d s after the kill",
            r"nginx2 dead: nginx1 \d+\.\d%, nginx2 0\.0%",
            r"nginx2 started again",
            r"nginx2 is UP \(L7OK/200\)",
            r"What the client saw\n  [\d,]+ requests, \d+ failed",
            r"SERVICE/BACKEND +PACKETS +BYTES +NEW FLOWS",
            r"xdplb down eth0: stopped balancing on eth0",
            r"laboratory removed: no namespace, process, map or file of it is left",
        ]
        rest = whole_run.output
        for chapter in chapters:
            found = re.search(chapter, rest)
            assert found, f"no {chapter!r} in {rest}"
            rest = rest[found.end() :]
        assert "\x1b" not in whole_run.output

    def test_the_client_and_the_kernel_count_the_same(self, whole_run: Demo) -> None:
        """Four of five requests bring a new connection, the others use ten that stay open."""
        requests = int(re.search(r"([\d,]+) requests, ", whole_run.output)[1].replace(",", ""))  # type: ignore[index]
        flows = int(re.search(r"\nweb +\S+ +\S+ +(\d+)", whole_run.output)[1])  # type: ignore[index]
        assert 0.75 * requests < flows < 0.85 * requests + 50

    def test_nothing_is_left(self, whole_run: Demo) -> None:
        assert whole_run.left() == []


class TestFailure:
    def test_a_daemon_that_dies_is_not_glossed_over(self, demo: Demo) -> None:
        demo.read_until("requests:")
        os.kill(demo.daemon, signal.SIGKILL)
        code, errors = demo.end()
        assert code in (1, 4) and "xdplb" in errors
        assert "What the client saw" not in demo.output
        assert demo.left() == []

    def test_it_asks_for_nginx(self, tmp_path: Path) -> None:
        for tool in ("ip", "nsenter", "setpriv", "ethtool", "unshare", "true"):
            (tmp_path / tool).symlink_to(str(shutil.which(tool)))
        with Demo(PATH=str(tmp_path)) as demo:
            code, errors = demo.end()
        assert code == 6
        assert "nginx is not installed" in errors and "apt-get install nginx-light" in errors
        assert demo.left() == []


class TestInterruption:
    @pytest.mark.parametrize(
        ("moment", "delay_s"),
        [
            ("XDP, nat", 0.0),
            ("XDP, nat", 0.1),
            ("laboratory:", 0.0),
            ("laboratory:", 0.7),
            ("xdplb up", 0.0),
            ("requests:", 0.5),
            ("killed", 0.0),
            ("started again", 0.0),
            ("SERVICE/BACKEND", 0.0),
            ("xdplb down", 0.0),
        ],
    )
    def test_ctrl_c_leaves_nothing(self, demo: Demo, moment: str, delay_s: float) -> None:
        """While namespaces are made, nginx starts, the program compiles, requests flow, and at the end."""
        demo.read_until(moment)
        timer = threading.Timer(delay_s, demo.process.send_signal, [signal.SIGINT])
        timer.start()
        code, errors = demo.end()
        timer.join()
        assert code == INTERRUPTED, errors
        assert "Traceback" not in errors
        assert demo.output.endswith("interrupted; the laboratory is gone, nothing of it is left\n")
        assert demo.left() == []


class TestTerminal:
    def test_the_live_table_comes_and_ctrl_c_gives_the_terminal_back(self) -> None:
        """The key itself, typed into a terminal of 80 columns and 24 rows."""
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        seen = ""
        with Demo(theirs) as demo:
            os.close(theirs)
            try:
                while "request failed" not in seen:
                    seen += os.read(ours, 65536).decode(errors="replace")
                os.write(ours, b"\x03")
                seen += read_to_end(ours)
                demo.process.wait(30)
            finally:
                os.close(ours)
        assert demo.process.returncode == INTERRUPTED
        for column in ("SERVER", "STATE", "WEIGHT", "REQUEST/S", "SHARE", "ANSWERED", "█"):
            assert column in seen
        assert seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l")
        assert seen.rstrip().endswith("nothing of it is left")
        assert demo.left() == []


def read_to_end(terminal: int) -> str:
    """Until every process has closed it; Linux says so by EIO."""
    pieces = []
    while True:
        try:
            pieces.append(os.read(terminal, 65536))
        except OSError:
            return b"".join(pieces).decode(errors="replace")
