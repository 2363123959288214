"""The control socket: a real server, real clients, and what goes wrong between them."""

from __future__ import annotations

import asyncio
import grp
import json
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from controlling import serving
from nobody import AS_NOBODY

import xdplb
from xdplb.api import server
from xdplb.api.client import call
from xdplb.api.messages import GROUP, JSON
from xdplb.api.server import MAX_REQUEST_BYTES, ControlServer, Request
from xdplb.errors import (
    CompileError,
    ConfigError,
    DaemonUnreachable,
    ForeignProgram,
    NotCapable,
    NotPrivileged,
    UsageError,
    XdplbError,
)
from xdplb.paths import Instance, instances, only_instance


@pytest.fixture
def instance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Instance:
    monkeypatch.setenv("XDPLB_RUNTIME_DIRECTORY", str(tmp_path / "run"))
    return Instance("eth0")


async def echo(request: Request) -> Request:
    return request


@contextmanager
def connected(instance: Instance) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(instance.control))
        yield connection


def exchange(connection: socket.socket, line: bytes) -> dict[str, object]:
    connection.sendall(line + b"\n")
    answer = b""
    while not answer.endswith(b"\n"):
        piece = connection.recv(65536)
        assert piece, "closed without an answer"
        answer += piece
    return json.loads(answer)


def test_the_socket_has_its_name_only_once_it_listens(instance: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    named: list[bool] = []

    class Watched(socket.socket):
        def listen(self, *backlog: int) -> None:
            named.append(instance.control.exists())
            super().listen(*backlog)

    monkeypatch.setattr(server.socket, "socket", Watched)
    with serving(instance.control, {}):
        assert [path.name for path in instance.runtime.iterdir()] == [instance.control.name]
    assert named[0] is False


def test_a_request_reaches_its_handler_and_the_result_comes_back(instance: Instance) -> None:
    with serving(instance.control, {"echo": echo}):
        assert call(instance, "echo", text="é", number=1) == {"command": "echo", "text": "é", "number": 1}


def test_an_answer_of_many_megabytes_arrives_whole(instance: Instance) -> None:
    with serving(instance.control, {"echo": echo}):
        text = "x" * (5 << 20)
        assert call(instance, "echo", text=text) == {"command": "echo", "text": text}


SHAPES: list[JSON] = [None, [], {}, {"services": []}, {"a": {"b": [1, {"c": [None]}]}, "d": "é"}, [[1], [{}, "x"]], 1.5]


@pytest.mark.parametrize("result", SHAPES)
def test_an_answer_of_any_shape_arrives_as_it_was(instance: Instance, result: JSON) -> None:
    async def answer(request: Request) -> JSON:
        return result

    with serving(instance.control, {"answer": answer}):
        assert call(instance, "answer") == result


def test_a_long_answer_lets_others_have_the_loop() -> None:
    services: list[JSON] = [{"name": f"s{n}", "backends": ["x" * 99] * 99} for n in range(3000)]
    long: JSON = {"ok": True, "result": {"services": services}}

    async def turns_meanwhile() -> int:
        turns, encoding = 0, asyncio.create_task(server._encoded(long))
        while not encoding.done():
            await asyncio.sleep(0)
            turns += 1
        assert json.loads(await encoding) == long
        return turns

    assert asyncio.run(turns_meanwhile()) >= 4


def test_only_root_and_the_group_may_use_the_socket_whatever_the_umask(instance: Instance) -> None:
    before = os.umask(0)
    try:
        with serving(instance.control, {}):
            mode = instance.control.stat()
            assert stat.S_IMODE(mode.st_mode) == 0o660
            assert mode.st_gid == next((g.gr_gid for g in grp.getgrall() if g.gr_name == GROUP), os.getegid())
            assert stat.S_IMODE(instance.runtime.stat().st_mode) == 0o755
            assert stat.S_IMODE(instance.runtime.parent.stat().st_mode) == 0o755
    finally:
        os.umask(before)


@pytest.mark.parametrize("kind", [XdplbError, UsageError, DaemonUnreachable, NotPrivileged, NotCapable])
def test_an_error_of_the_daemon_is_the_same_error_at_the_client(instance: Instance, kind: type[XdplbError]) -> None:
    async def fail(request: Request) -> None:
        raise kind("what failed", "what to do")

    with serving(instance.control, {"fail": fail}), pytest.raises(XdplbError) as caught:
        call(instance, "fail")
    assert type(caught.value) is kind
    assert (caught.value.message, caught.value.hint) == ("what failed", "what to do")


def test_what_errors_carry_travels_along(instance: Instance) -> None:
    async def invalid(request: Request) -> None:
        raise ConfigError(["f:1: one", "f:2: two"], "look")

    async def uncompilable(request: Request) -> None:
        raise CompileError("no", "", "xdplb.c:3: error")

    async def foreign(request: Request) -> None:
        raise ForeignProgram("another program")

    with serving(instance.control, {"invalid": invalid, "uncompilable": uncompilable, "foreign": foreign}):
        with pytest.raises(ConfigError) as config_error:
            call(instance, "invalid")
        assert (config_error.value.mistakes, config_error.value.hint) == (("f:1: one", "f:2: two"), "look")
        with pytest.raises(CompileError) as compile_error:
            call(instance, "uncompilable")
        assert compile_error.value.log == "xdplb.c:3: error"
        with pytest.raises(NotCapable, match="another program"):
            call(instance, "foreign")


def test_a_bug_in_a_handler_is_logged_and_the_server_lives_on(
    instance: Instance, caplog: pytest.LogCaptureFixture
) -> None:
    async def bug(request: Request) -> None:
        raise ZeroDivisionError("oops")

    async def unserialisable(request: Request) -> object:
        return object()

    with serving(instance.control, {"bug": bug, "unserialisable": unserialisable, "echo": echo}):  # type: ignore[dict-item]
        for command in ("bug", "unserialisable"):
            with pytest.raises(XdplbError, match="internal error") as caught:
                call(instance, command)
            assert caught.value.exit_code == 1
        assert call(instance, "echo") == {"command": "echo"}
    assert "ZeroDivisionError: oops" in caplog.text
    assert "oops" not in caught.value.message


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"status", "not JSON"),
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b"[1, 2]", "not a JSON object"),
        (b"{}", "no command None"),
        (b'{"command": ["echo"]}', "no command"),
        (b'{"command": "explode"}', "no command 'explode'"),
    ],
)
def test_nonsense_is_answered_and_the_connection_lives_on(instance: Instance, line: bytes, says: str) -> None:
    with serving(instance.control, {"echo": echo}), connected(instance) as connection:
        answer = exchange(connection, line)
        error = answer["error"]
        assert answer["ok"] is False and isinstance(error, dict)
        assert says in error["message"] and error["exit_code"] == 2
        assert exchange(connection, b'{"command": "echo"}') == {"ok": True, "result": {"command": "echo"}}


def test_an_oversized_request_is_refused_with_its_reason(instance: Instance) -> None:
    with serving(instance.control, {"echo": echo}):
        with pytest.raises(UsageError, match="longer than 16 MiB"):
            call(instance, "echo", text="x" * MAX_REQUEST_BYTES)
        assert call(instance, "echo") == {"command": "echo"}


def test_a_client_that_leaves_in_the_middle_harms_nobody(instance: Instance, caplog: pytest.LogCaptureFixture) -> None:
    with serving(instance.control, {"echo": echo}):
        with connected(instance) as connection:
            connection.sendall(b'{"command": "ec')
        assert call(instance, "echo") == {"command": "echo"}
    assert not caplog.records


def test_a_slow_request_holds_up_no_other_client(instance: Instance) -> None:
    answers: list[object] = []

    async def serve() -> None:
        other = asyncio.Event()

        async def slow(request: Request) -> str:
            await other.wait()
            return "slow"

        async def quick(request: Request) -> str:
            other.set()
            return "quick"

        async with ControlServer(instance.control, {"slow": slow, "quick": quick}):
            first = asyncio.create_task(asyncio.to_thread(lambda: answers.append(call(instance, "slow"))))
            await asyncio.to_thread(lambda: answers.append(call(instance, "quick")))
            await first

    asyncio.run(serve())
    assert sorted(map(str, answers)) == ["quick", "slow"]


def test_a_closing_server_finishes_what_it_is_at_and_drops_idle_connections(instance: Instance) -> None:
    async def serve() -> object:
        begun, finish = asyncio.Event(), asyncio.Event()

        async def last(request: Request) -> str:
            begun.set()
            await finish.wait()
            return "done"

        idle_reader = None
        async with ControlServer(instance.control, {"last": last}):
            idle_reader, idle_writer = await asyncio.open_unix_connection(str(instance.control))
            answer = asyncio.create_task(asyncio.to_thread(call, instance, "last"))
            await begun.wait()
            asyncio.get_running_loop().call_later(0.05, finish.set)
        assert await idle_reader.read() == b""
        idle_writer.close()
        await idle_writer.wait_closed()
        return await answer

    assert asyncio.run(serve()) == "done"
    assert not instance.control.exists()


def test_the_socket_file_of_a_dead_daemon_is_in_nobodys_way(instance: Instance) -> None:
    instance.runtime.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(instance.control))
    with pytest.raises(DaemonUnreachable, match="is gone") as caught:
        call(instance, "echo")
    assert "xdplb up eth0" in caught.value.hint
    with serving(instance.control, {"echo": echo}):
        assert call(instance, "echo") == {"command": "echo"}


def test_without_a_socket_the_hint_says_how_to_start(instance: Instance) -> None:
    with pytest.raises(DaemonUnreachable, match="no xdplb daemon runs on eth0") as caught:
        call(instance, "status")
    assert caught.value.hint == "Start it with: xdplb up eth0"


def test_a_daemon_that_does_not_answer_in_time_is_unreachable(instance: Instance) -> None:
    async def hang(request: Request) -> None:
        await asyncio.Event().wait()

    def hung() -> None:
        with pytest.raises(DaemonUnreachable, match=r"within 0\.05 s"):
            call(instance, "hang", timeout_s=0.05)

    async def serve() -> None:
        async with ControlServer(instance.control, {"hang": hang}):
            await asyncio.to_thread(hung)
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

    asyncio.run(serve())


@pytest.mark.parametrize("garbage", [b"HTTP/1.1 400 Bad Request\n", b"{}\n", b"[]\n", b'{"ok": false}\n'])
def test_something_else_on_the_socket_is_no_daemon(instance: Instance, garbage: bytes) -> None:
    instance.runtime.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(instance.control))
        listener.listen()

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(garbage)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(DaemonUnreachable, match="not an xdplb daemon"):
            call(instance, "status")
        thread.join()


def test_a_path_too_long_for_a_socket_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDPLB_RUNTIME_DIRECTORY", str(tmp_path / ("d" * 100)))
    with (
        pytest.raises(XdplbError, match="cannot open the control socket") as caught,
        serving(Instance("eth0").control, {}),
    ):
        pass
    assert "XDPLB_RUNTIME_DIRECTORY" in caught.value.hint


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")
def test_others_may_not_use_the_socket(public_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDPLB_RUNTIME_DIRECTORY", str(public_path / "run"))
    instance = Instance("eth0")
    program = "import sys; from xdplb.cli.commands import main; main(['status'])"
    environment = {**os.environ, "PYTHONPATH": str(Path(xdplb.__file__).parents[1])}
    with serving(instance.control, {"status": echo}):
        nobody = subprocess.run(
            [*AS_NOBODY, sys.executable, "-c", program],
            env=environment,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=30,
        )
    assert nobody.returncode == 5, nobody.stderr
    assert "you may not open the control socket" in nobody.stderr
    assert "hint: Use sudo, or join the group 'xdplb'." in nobody.stderr


def test_an_instance_exists_while_it_has_a_socket_or_a_manifest(instance: Instance) -> None:
    assert instances() == []
    with pytest.raises(DaemonUnreachable, match="no xdplb runs on this host") as caught:
        only_instance()
    assert caught.value.hint == "Start one with: xdplb up IFACE"
    instance.runtime.mkdir(parents=True)
    instance.lock.touch()
    assert instances() == []
    instance.manifest.touch()
    assert only_instance() == only_instance("eth0") == instance


def test_among_several_instances_one_must_be_chosen(instance: Instance) -> None:
    for name in ("eth1", "eth0"):
        Instance(name).runtime.mkdir(parents=True)
        Instance(name).manifest.touch()
    with pytest.raises(UsageError, match="eth0, eth1") as caught:
        only_instance()
    assert caught.value.hint == "Choose one: --interface eth0"
    assert only_instance("eth1") == Instance("eth1")
    with pytest.raises(DaemonUnreachable, match="no xdplb runs on eth7") as unknown:
        only_instance("eth7")
    assert unknown.value.hint == "There is one on: eth0, eth1."


@pytest.mark.parametrize("name", ["", ".", "..", "../etc", "a b", "eth0:1", "a" * 128, "ä" * 64, "a\0"])
def test_what_cannot_be_an_interface_is_no_instance(name: str) -> None:
    with pytest.raises(UsageError, match="not an interface name"):
        Instance(name)
