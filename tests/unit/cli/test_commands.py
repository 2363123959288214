"""The command line: what it prints, where, and with which exit code. Daemons answer over a real control socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from controlling import serving
from nobody import AS_NOBODY

import xdplb
from xdplb.api.messages import JSON
from xdplb.api.server import Handler, Request
from xdplb.cli import privileges, terminal
from xdplb.cli.commands import cli
from xdplb.errors import CompileError, ConfigError, UsageError, XdplbError
from xdplb.paths import Instance

VALID = """
services:
  - name: web
    listen: 203.0.113.10:80/tcp
    backends:
      - {name: a, address: 10.0.0.11}
      - {name: b, address: 10.0.0.12}
"""

STATUS: JSON = {
    "services": [
        {
            "name": "web",
            "listen": "203.0.113.10:80/tcp",
            "forward": "nat",
            "scheduler": "maglev",
            "backends": [
                {
                    "name": "a",
                    "address": "10.0.0.11:80",
                    "state": "down",
                    "admin": "active",
                    "reason": "L4CON",
                    "weight": 10,
                    "effective_weight": 0,
                    "active_flows": None,
                    "last_change": "2026-01-01T00:00:00Z",
                }
            ],
        }
    ]
}
CHANGES: JSON = {
    "changes": [{"kind": "change", "what": "backend web/a", "detail": "weight 1 -> 2"}],
    "services": [{"name": "web", "slots_moved_percent": 16.7}],
    "flows_broken": 0,
}
EXPLANATION: JSON = {
    **dict.fromkeys(("service", "forward", "scheduler", "slot", "flow_cache", "remembered", "backend", "address")),
    **dict.fromkeys(("new_connection", "before", "after", "egress", "largest_packet")),
    "source": "198.51.100.7:40000",
    "destination": "203.0.113.10:80/tcp",
    "interface": "eth0",
    "verdict": "pass",
    "reason": "no_service",
    "why": "no service has the address 203.0.113.10: the kernel gets it",
}
NO_CHANGES: JSON = {"changes": [], "services": [], "flows_broken": 0}


class Said(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Said]


@pytest.fixture(autouse=True)
def runtime_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDPLB_RUNTIME_DIRECTORY", str(tmp_path / "run"))
    monkeypatch.setenv("PYTHONPATH", str(Path(xdplb.__file__).parents[1]))
    return tmp_path / "run"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line in this process."""

    def run(*args: str) -> Said:
        code = terminal.run(cli, args)
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "xdplb.yaml"
    path.write_text(VALID)
    return path


def answering(answer: JSON, requests: list[Request] | None = None) -> Handler:
    async def handler(request: Request) -> JSON:
        if requests is not None:
            requests.append(request)
        return answer

    return handler


def failing(error: XdplbError) -> Handler:
    async def handler(request: Request) -> JSON:
        raise error

    return handler


def daemon(handlers: Mapping[str, Handler], interface: str = "eth0") -> contextlib.AbstractContextManager[None]:
    return serving(Instance(interface).control, handlers)


def process(*args: str, before: Sequence[str] = (), **options: object) -> subprocess.CompletedProcess[str]:
    command = [*before, sys.executable, "-m", "xdplb", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, **options)  # type: ignore[call-overload,no-any-return]


def test_the_module_is_the_command() -> None:
    said = process("--version")
    assert (said.returncode, said.stdout, said.stderr) == (0, f"xdplb {xdplb.__version__}\n", "")


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("command", [(), ("up",), ("backend",), ("backend", "drain"), ("top",)])
def test_help_is_help(run: Run, command: tuple[str, ...], flag: str) -> None:
    said = run(*command, flag)
    assert said.code == 0 and said.out.startswith("Usage: xdplb") and said.err == ""


def test_help_offers_what_there_is_and_nothing_else(run: Run) -> None:
    offered = [line.split()[0] for line in run("--help").out.partition("Commands:\n")[2].splitlines()]
    assert offered == [
        *("up", "down", "check", "diff", "reload", "status", "stats", "top", "flows", "explain", "backend"),
        *("demo", "bench", "decap"),
    ]


@pytest.mark.parametrize(
    "line",
    ["", "backend", "explode", "status --explode", "status a b", "status -o xml", "up a b c", "up eth0 eth0",
     "up eth0 --mode fast", "up a/b -c FILE", "down", "down a/b", "up eth0 --listen 192.0.2.1:80",
     "up eth0 --backend 10.0.0.1", "up eth0 -c FILE --listen 192.0.2.1:80 --backend 10.0.0.1", "up -c FILE",
     "backend drain web", "backend drain /a", "backend drain web/", "backend weight web/a", "backend weight web/a -1",
     "backend weight web/a heavy", "backend weight web/a 65536", "top -n 0", "flows --limit -1",
     "flows web", "explain", "explain 198.51.100.7:40000", "decap", "decap eth0 --port 0",
     "status --interface a/b", "backend ready web/a --wait", "backend drain web/a --timeout 9s",
     "backend maint web/a --wait --timeout 9", "doctor eth0"],
)  # fmt: skip
def test_a_command_line_without_sense_exits_with_2(run: Run, file: Path, line: str) -> None:
    said = run(*line.replace("FILE", str(file)).split())
    assert said.code == 2 and said.out == ""
    assert said.err.startswith("Usage: " if line in ("", "backend") else "xdplb: "), said.err


def test_light_commands_import_nothing_heavy(file: Path) -> None:
    program = (
        "import sys; from xdplb.cli import terminal; from xdplb.cli.commands import cli; "
        f"assert terminal.run(cli, ['--help']) == 0 and terminal.run(cli, ['check', {str(file)!r}]) == 0; "
        "print([name for name in ('bcc', 'pyroute2', 'aiohttp', 'numpy', 'rich') if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert said.stdout.splitlines()[-1] == "[]", said.stderr


def test_a_reader_that_has_enough_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    said = subprocess.run(
        [sys.executable, "-m", "xdplb", "check", "--schema"], stdout=writer, stderr=subprocess.PIPE, timeout=30
    )
    os.close(writer)
    assert (said.returncode, said.stderr) == (1, b"")


def test_ctrl_c_ends_quietly_with_130(file: Path) -> None:
    async def interrupt(request: Request) -> JSON:
        client.send_signal(signal.SIGINT)
        await asyncio.to_thread(client.wait)
        return None

    with daemon({"reload": interrupt}):
        client = subprocess.Popen(
            [sys.executable, "-m", "xdplb", "reload"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        out, err = client.communicate(timeout=30)
    assert (client.returncode, out, err.strip()) == (130, b"", b"")


def test_a_bug_shows_its_traceback_and_says_that_it_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    def bug() -> None:
        raise ZeroDivisionError("oops")

    assert terminal.guarded(bug) == 1
    error = capsys.readouterr().err
    assert "ZeroDivisionError: oops" in error and "this is a bug" in error


def test_a_compile_error_comes_with_the_compilers_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert terminal.complain(CompileError("it does not compile", "do this", "xdplb.c:3: error\n")) == 6
    assert capsys.readouterr().err == "xdplb.c:3: error\nxdplb: it does not compile\n  hint: do this\n"


@pytest.mark.parametrize(
    "line", ["status", "reload", "stats", "top", "diff FILE", "backend drain web/a", "backend weight web/a 3"]
)
def test_without_a_daemon_commands_exit_with_4_and_a_hint(run: Run, file: Path, line: str) -> None:
    said = run(*line.replace("FILE", str(file)).split())
    assert said == (4, "", "xdplb: no xdplb runs on this host\n  hint: Start one with: xdplb up IFACE\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")
@pytest.mark.parametrize(
    "line", ["up eth0 -c FILE", "up eth0 -d -c FILE", "down eth0", "demo", "bench packet-path", "decap eth0"]
)
def test_without_privileges_commands_exit_with_5_and_a_hint(public_path: Path, line: str) -> None:
    file = public_path / "x.yaml"
    file.write_text(VALID)
    file.chmod(0o644)
    args = line.replace("FILE", str(file)).split()
    said = process(*args, before=AS_NOBODY, cwd="/")
    assert said.returncode == 5, said.stderr
    assert said.stderr.startswith(f"xdplb: `xdplb {args[0]}` may not do its work here: CAP_NET_ADMIN, CAP_BPF")
    assert "hint: Run it with sudo" in said.stderr


@pytest.mark.parametrize(
    ("effective", "lacking"),
    [
        (0, ["CAP_NET_ADMIN", "CAP_BPF", "CAP_PERFMON"]),
        (1 << 12, ["CAP_BPF", "CAP_PERFMON"]),
        (1 << 12 | 1 << 39, ["CAP_PERFMON"]),
        (1 << 12 | 1 << 21, []),
        (1 << 21, ["CAP_NET_ADMIN"]),
        (1 << 12 | 1 << 38 | 1 << 39, []),
    ],
)
def test_capabilities_are_asked_for_by_name(effective: int, lacking: list[str]) -> None:
    assert privileges.missing(privileges.PACKET_PATH, effective) == lacking


def test_check_counts_what_it_has_read(run: Run, file: Path) -> None:
    assert run("check", str(file)) == (0, f"{file}: ok, 1 service, 2 backends\n", "")


def test_check_reports_every_mistake_on_a_line_of_its_own(run: Run, file: Path) -> None:
    file.write_text(VALID.replace("10.0.0.11", "10.0.0.300").replace("name: web", "nam: web"))
    said = run("check", str(file))
    mistakes = [line for line in said.err.splitlines() if line.startswith(f"{file}:")]
    assert said.code == 3 and said.out == "" and len(mistakes) >= 2
    assert any("services[0].backends[0].address: 10.0.0.300 is not an IP address" in line for line in mistakes)
    assert said.err.splitlines()[-1].startswith("  hint: ")


def test_check_prints_the_schema(run: Run) -> None:
    said = run("check", "--schema")
    assert said.code == 0 and "services" in json.loads(said.out)["properties"]


@pytest.mark.parametrize("command", [("check",), ("diff",), ("up", "eth0", "-c")])
def test_a_file_that_is_not_there_is_an_invalid_configuration(run: Run, command: tuple[str, ...]) -> None:
    said = run(*command, "/nowhere/xdplb.yaml")
    assert said.code == 3 and said.err.startswith("/nowhere/xdplb.yaml: there is no such file\n")


@pytest.mark.skipif(Path("/etc/xdplb/xdplb.yaml").exists(), reason="this host has a configuration")
def test_up_with_no_configuration_at_all_names_the_ways_to_give_one(run: Run) -> None:
    said = run("up", "eth0")
    assert said.code == 3
    assert "there is no configuration yet" in said.err and "--listen 203.0.113.10:80 --backend" in said.err


def test_diff_sends_the_file_and_exits_with_10_for_changes(run: Run, file: Path) -> None:
    requests: list[Request] = []
    with daemon({"diff": answering(CHANGES, requests)}):
        said = run("diff", str(file))
    assert requests == [{"command": "diff", "text": VALID, "name": str(file)}]
    assert (said.code, said.err) == (10, "")
    assert said.out.split("\n") == [
        *("~  backend web/a  weight 1 -> 2", "", "web: 16.7 % of the slots move", "no flow breaks", "")
    ]


def test_diff_without_changes_exits_with_0(run: Run, file: Path) -> None:
    with daemon({"diff": answering(NO_CHANGES)}):
        assert run("diff", str(file)) == (0, "no changes\n", "")


def test_diff_as_json_is_the_answer_itself(run: Run, file: Path) -> None:
    with daemon({"diff": answering(CHANGES)}):
        said = run("diff", str(file), "-o", "json")
    assert said.code == 10 and json.loads(said.out) == CHANGES


def test_diff_of_an_invalid_file_needs_no_daemon(run: Run, file: Path) -> None:
    file.write_text("services: 3\n")
    said = run("diff", str(file))
    assert said.code == 3 and said.err.startswith(f"{file}:1: services: ")


def test_reload_says_what_has_changed(run: Run) -> None:
    with daemon({"reload": answering(CHANGES)}):
        said = run("reload")
    assert said.code == 0 and "web: 16.7 % of the slots moved\nno flow broke\n" in said.out


def test_a_reload_with_mistakes_reports_them_all(run: Run) -> None:
    error = ConfigError(["f:1: services[0]: one", "f:2: services[1]: two"], "The old configuration stays in force.")
    with daemon({"reload": failing(error)}):
        assert run("reload") == (
            3,
            "",
            "f:1: services[0]: one\nf:2: services[1]: two\n  hint: The old configuration stays in force.\n",
        )


def test_status_shows_a_table_or_the_json(run: Run) -> None:
    requests: list[Request] = []
    with daemon({"status": answering(STATUS, requests)}):
        table, as_json = run("status"), run("status", "web", "-o", "json")
    assert table.code == 0 and "DOWN" in table.out and "L4CON: refused or unreachable" in table.out
    assert "\x1b" not in table.out
    assert json.loads(as_json.out) == STATUS
    assert [request["service"] for request in requests] == [None, "web"]


def test_explain_asks_the_daemon_and_shows_what_it_says(run: Run) -> None:
    requests: list[Request] = []
    command = ("explain", "198.51.100.7:40000", "203.0.113.10:80")
    with daemon({"explain": answering(EXPLANATION, requests)}):
        shown, as_json = run(*command), run(*command, "-o", "json")
    assert shown.code == 0 and "why  no service has the address 203.0.113.10: the kernel gets it" in shown.out
    assert json.loads(as_json.out) == EXPLANATION
    assert {(request["source"], request["destination"]) for request in requests} == {command[1:]}


def test_flows_are_of_a_packet_path_that_there_is(run: Run) -> None:
    said = run("flows", "--service", "web")
    assert said == (4, "", "xdplb: no xdplb runs on this host\n  hint: Start one with: xdplb up IFACE\n")


def test_what_the_daemon_refuses_is_told_as_it_said_it(run: Run) -> None:
    with daemon({"status": failing(UsageError("there is no service 'wep'", "did you mean 'web'?"))}):
        assert run("status", "wep") == (2, "", "xdplb: there is no service 'wep'\n  hint: did you mean 'web'?\n")


def test_among_several_daemons_the_interface_chooses(run: Run) -> None:
    with daemon({"status": answering(STATUS)}), daemon({"status": answering({"services": []})}, "eth1"):
        assert run("status").code == 2
        assert run("status", "--interface", "eth1") == (0, "no services\n", "")


@pytest.mark.parametrize(
    ("line", "sent", "says"),
    [
        ("drain web/a", {"action": "drain", "weight": None}, "web/a drains: no new flows, those it has stay"),
        ("maint web/a", {"action": "maint", "weight": None}, "web/a is in maintenance: no flows"),
        ("ready web/a", {"action": "ready", "weight": None}, "web/a is active: takes flows while it is up"),
        ("weight web/a 7", {"action": "weight", "weight": 7}, "web/a has weight 7"),
    ],
)
def test_a_backend_is_steered_by_its_name(run: Run, line: str, sent: dict[str, object], says: str) -> None:
    requests: list[Request] = []
    with daemon({"backend": answering(None, requests)}):
        assert run("backend", *line.split()) == (0, says + "\n", "")
    assert requests == [{"command": "backend", "service": "web", "backend": "a"} | sent]
