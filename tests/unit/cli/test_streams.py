"""Standard streams that are closed, full or pipes: no traceback, and the exit code says what happened."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from controlling import serving

import xdplb
from xdplb.api.messages import JSON
from xdplb.api.server import Request
from xdplb.cli import terminal
from xdplb.cli.commands import cli
from xdplb.cli.startup import settle
from xdplb.paths import Instance

VALID = "services: [{name: web, listen: 203.0.113.10:80/tcp, backends: [{name: a, address: 10.0.0.11}]}]\n"
LARGE = VALID + 200_000 * "#\n"
UNWRITTEN = "xdplb: the output cannot be written: No space left on device\n"


@pytest.fixture(autouse=True)
def directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDPLB_RUNTIME_DIRECTORY", str(tmp_path / "run"))
    monkeypatch.setenv("PYTHONPATH", str(Path(xdplb.__file__).parents[1]))
    (tmp_path / "valid.yaml").write_text(VALID)
    (tmp_path / "large.yaml").write_text(LARGE)


def shell(line: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """In bash; `xdplb` is the command."""
    script = f'xdplb() {{ {shlex.quote(sys.executable)} -m xdplb "$@"; }}; {line}'
    return subprocess.run(["bash", "-c", script], cwd=directory, capture_output=True, text=True, timeout=30)


async def no_services(request: Request) -> JSON:
    return {"services": []}


@pytest.mark.parametrize("line", ["status", "status -o json", "status --check"])
def test_an_answer_that_cannot_be_written_is_said(tmp_path: Path, line: str) -> None:
    with serving(Instance("eth0").control, {"status": no_services}):
        said = shell(f"xdplb {line} >/dev/full", tmp_path)
    assert (said.returncode, said.stderr) == (1, UNWRITTEN)


@pytest.mark.parametrize("line", ["check valid.yaml", "check --schema", "--help", "--version"])
def test_so_is_the_answer_of_commands_without_a_daemon(tmp_path: Path, line: str) -> None:
    said = shell(f"xdplb {line} >/dev/full", tmp_path)
    assert (said.returncode, said.stderr) == (1, UNWRITTEN)


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_no_error(tmp_path: Path, closed: str) -> None:
    with serving(Instance("eth0").control, {"status": no_services}):
        said = shell(f"xdplb status {closed}", tmp_path)
    assert (said.returncode, said.stderr) == (0, "")
    assert said.stdout == ("" if ">&-" in closed.split("2>&-")[0] else "no services\n")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "2>/dev/full", ">/dev/full 2>/dev/full", ">&- 2>&-"])
def test_an_error_that_cannot_be_printed_has_its_exit_code(tmp_path: Path, closed: str) -> None:
    said = shell(f"xdplb check nowhere.yaml {closed}", tmp_path)
    assert said.returncode == 3 and "Traceback" not in said.stderr


@pytest.mark.parametrize(
    "line",
    ["xdplb check /dev/stdin <valid.yaml", "cat large.yaml | xdplb check /dev/stdin", "xdplb check <(cat valid.yaml)"],
)
def test_a_configuration_may_come_through_a_pipe(tmp_path: Path, line: str) -> None:
    said = shell(line, tmp_path)
    assert (said.returncode, said.stderr) == (0, "") and "ok, 1 service, 1 backend" in said.stdout


@pytest.mark.parametrize(
    "line",
    ["xdplb diff /dev/stdin <valid.yaml", "cat valid.yaml | xdplb diff /dev/stdin", "xdplb diff <(cat valid.yaml)"],
)
def test_a_difference_reads_its_file_once(tmp_path: Path, line: str) -> None:
    asked: list[Request] = []

    async def difference(request: Request) -> JSON:
        asked.append(request)
        return {"changes": [], "services": [], "flows_broken": 0}

    with serving(Instance("eth0").control, {"diff": difference}):
        assert shell(line, tmp_path).returncode == 0
    assert [request["text"] for request in asked] == [VALID]


def test_what_came_through_a_pipe_cannot_be_read_again(tmp_path: Path) -> None:
    """So a reload says that there is no file, and does not take an empty one."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as pipe:
        pipe.write(VALID)
    settled = settle(["eth0"], Path(f"/dev/fd/{reader}"), None, [])
    os.close(reader)
    assert len(settled.config.services) == 1 and settled.config_path is None
    with (tmp_path / "valid.yaml").open() as file:
        assert settle(["eth0"], Path(f"/dev/fd/{file.fileno()}"), None, []).config_path == tmp_path / "valid.yaml"


def test_a_hangup_while_it_starts_does_not_end_it(tmp_path: Path) -> None:
    """Until the daemon hears it. It is sent again and again, from the first module of xdplb on."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    command = [sys.executable, "-X", "importtime", "-m", "xdplb", "up", "lo", "-c", str(fifo)]
    starting = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert starting.stderr is not None
    for line in starting.stderr:
        if "click" in line or "xdplb." in line:
            starting.send_signal(signal.SIGHUP)
        if "xdplb.config.read" in line:
            break
    fifo.write_text("nonsense: [")
    rest = starting.communicate(timeout=30)[1]
    assert starting.returncode == 3 and "not valid YAML" in rest


@pytest.mark.parametrize("number", ["٣", "３", "1_0", "+3", " 3", "3.0", "0x3", "", 30 * "9"])
@pytest.mark.parametrize("line", ["backend weight web/a", "top -n", "flows --limit", "decap eth0 --port"])
def test_a_number_is_digits_of_ascii(line: str, number: str) -> None:
    assert terminal.run(cli, [*line.split(), number]) == 2
