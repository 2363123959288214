"""What a check says of real servers on loopback, and what it says to them."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from probing import HttpServer, Watch, dropping, in_loop, probing, refusing, serving, silent, target, verdict

from xdplb import __version__
from xdplb.model import Check, CheckType

TCP, HTTP, HTTPS = CheckType.TCP, CheckType.HTTP, CheckType.HTTPS
LOOPBACKS = ["127.0.0.1", "::1"]
SHORT_S = 0.1
TCP_CLOSE = 7  # include/net/tcp_states.h

OK = b"HTTP/1.1 200 OK\r\n\r\n"


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    """A server's context, with a certificate nobody has reason to trust."""
    if shutil.which("openssl") is None:
        pytest.skip("the openssl command is not installed")
    directory: Path = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=nobody -days 1"
    files = ["-keyout", str(directory / "key"), "-out", str(directory / "certificate")]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "certificate", directory / "key")
    return context


LONG = b"x" * 9000

ANSWERS = [
    ("ok", OK, "L7OK/200", ""),
    ("redirect", b"HTTP/1.1 301 Moved\r\nLocation: http://127.0.0.1:1/\r\n\r\n", "L7OK/301", ""),
    ("no reason phrase", b"HTTP/1.1 200\r\n\r\n", "L7OK/200", ""),
    ("no blank before the phrase", b"HTTP/1.1 200OK\r\n\r\n", "L7OK/200", ""),
    ("long reason phrase", b"HTTP/1.1 200 " + LONG + b"\r\n\r\n", "L7OK/200", ""),
    ("small letters", b"http/1.1 200 ok\r\n\r\n", "L7OK/200", ""),
    ("many blanks", b"HTTP/1.1   200 OK\r\n\r\n", "L7OK/200", ""),
    ("bare line feeds", b"HTTP/1.1 200 OK\nX: y\n\n", "L7OK/200", ""),
    ("HTTP/1.0", b"HTTP/1.0 200 OK\r\n\r\n", "L7OK/200", ""),
    ("HTTP/2", b"HTTP/2 200 \r\n\r\n", "L7OK/200", ""),
    ("header line of 9000 bytes", b"HTTP/1.1 200 OK\r\nX: " + LONG + b"\r\n\r\n", "L7OK/200", ""),
    ("header without end", b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000, "L7OK/200", ""),
    ("150 headers", b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 150 + b"\r\n", "L7OK/200", ""),
    ("header without a colon", b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n", "L7OK/200", ""),
    ("blank before the colon", b"HTTP/1.1 200 OK\r\nX : y\r\n\r\n", "L7OK/200", ""),
    ("folded header", b"HTTP/1.1 200 OK\r\nX: y\r\n z\r\n\r\n", "L7OK/200", ""),
    ("two lengths", b"HTTP/1.1 200 OK\r\n" + b"Content-Length: 2\r\n" * 2 + b"\r\nok", "L7OK/200", ""),
    ("length that is none", b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\n", "L7OK/200", ""),
    ("204 with a body", b"HTTP/1.1 204 No Content\r\nContent-Length: 4\r\n\r\nbody", "L7OK/204", ""),
    ("bad chunk", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "L7OK/200", ""),
    ("body cut off", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort", "L7OK/200", ""),
    ("cut off in the header", b"HTTP/1.1 200 OK\r\nContent-", "L7OK/200", ""),
    ("not really gzip", b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\nno", "L7OK/200", ""),
    ("continued", b"HTTP/1.1 100 Continue\r\n\r\n" + OK, "L7OK/200", ""),
    ("hints", b"HTTP/1.1 103 Early Hints\nLink: " + LONG + b"\n\nHTTP/1.1 102\n\n" + OK, "L7OK/200", ""),
    ("not found", b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "L7STS/404", "answered 404 Not Found"),
    ("server error", b"HTTP/1.0 500 Oh \x1b[1m\r\n\r\nsorry", "L7STS/500", "answered 500 Oh .[1m"),
    ("nothing but a number", b"HTTP/1.1 503\r\n\r\n", "L7STS/503", "answered 503"),
    ("switching", b"HTTP/1.1 101 Switching\r\n\r\n", "L7STS/101", "answered 101 Switching"),
    ("out of range", b"HTTP/1.1 999 What\r\n\r\n", "L7STS/999", "answered 999 What"),
    ("SSH", b"SSH-2.0-OpenSSH_9.2p1\r\n", "L7RSP", "answer is no HTTP: 'SSH-2.0-OpenSSH_9.2p1'"),
    ("not even a line", b"nonsense", "L7RSP", "answer is no HTTP: 'nonsense'"),
    ("empty line first", b"\r\n" + OK, "L7RSP", "answer begins with an empty line"),
    ("status of four digits", b"HTTP/1.1 2000 OK\r\n\r\n", "L7RSP", "answer is no HTTP: 'HTTP/1.1 2000 OK'"),
    ("status of two digits", b"HTTP/1.1 20 OK\r\n\r\n", "L7RSP", "answer is no HTTP: 'HTTP/1.1 20 OK'"),
    (
        "long line",
        b"HTTP/" + b"1" * 9115 + b"\r\n",
        "L7RSP",
        f"line of 9120 bytes is no status line: 'HTTP/{'1' * 32}...'",
    ),
    ("line without end", b"HTTP/" + b"1" * 200_000, "L7RSP", "is no status line: 'HTTP/1111"),
    ("closed without a word", b"", "L7RSP", "connection closed without an answer"),
    ("cut off in the status", b"HTTP/1.1 20", "L7RSP", "connection closed after 'HTTP/1.1 20'"),
    ("only interim", b"HTTP/1.1 102\r\n\r\n", "L7RSP", "connection closed after an interim answer"),
    ("cut off in the interim", b"HTTP/1.1 102\r\nX: ", "L7RSP", "connection closed in an interim answer"),
    ("interim for ever", b"HTTP/1.1 102\r\nX: y\r\n\r\n" * 60_000, "L7RSP", "interim answers without end"),
]


@pytest.mark.parametrize("host", LOOPBACKS)
@pytest.mark.parametrize("type", [HTTP, HTTPS])
@pytest.mark.parametrize(("answer", "reason", "cause"), [pytest.param(*case[1:], id=case[0]) for case in ANSWERS])
@in_loop
async def test_http_answers(
    answer: bytes, reason: str, cause: str, type: CheckType, host: str, tls: ssl.SSLContext
) -> None:
    """As curl 7.88 takes them, which is the public's idea of a server that works."""
    async with serving(HttpServer(answer), host, tls if type is HTTPS else None) as port:
        result = await verdict(host, port, Check(type=type, timeout_s=10))
    assert (result.ok, result.reason) == (reason.startswith("L7OK"), reason)
    assert cause in result.cause and bool(cause) is bool(result.cause)


@in_loop
async def test_an_answer_in_pieces_is_an_answer() -> None:
    """Cut anywhere: in the status line, and between the bytes of a line end."""
    answer = b"HTTP/1.1 102 Processing\r\nX: y\r\n\r\nHTTP/1.1 204 No Content\r\n"

    async def in_pieces(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for byte in answer:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.001)

    async with serving(in_pieces) as port:
        result = await verdict("127.0.0.1", port, Check(type=HTTP, timeout_s=10))
    assert (result.reason, result.cause) == ("L7OK/204", "")


@in_loop
async def test_a_server_that_speaks_first_is_heard() -> None:
    async def eager(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example ESMTP\r\n")
        await silent(reader, writer)

    async with serving(eager) as port:
        result = await verdict("127.0.0.1", port, Check(type=HTTP, timeout_s=10))
    assert (result.reason, result.cause) == ("L7RSP", "answer is no HTTP: '220 mail.example ESMTP'")


@pytest.mark.parametrize("path", ["/?x=a%2Fb", "/a/../b", "/%zz", "//a//", "/a;b?c=[d]|{e}^`", "/?q=%C3%A4", "/?"])
@in_loop
async def test_the_path_goes_out_as_it_was_written(path: str) -> None:
    server = HttpServer(OK)
    async with serving(server) as port:
        await verdict("127.0.0.1", port, Check(type=HTTP, path=path, timeout_s=10))
    assert server.requests[0].startswith(f"GET {path} HTTP/1.1\r\n".encode())


@pytest.mark.parametrize(
    ("expect", "ok"), [(((404, 404),), True), (((200, 299), (400, 410)), True), (((200, 403), (405, 599)), False)]
)
@in_loop
async def test_only_expected_status_codes_are_good(expect: tuple[tuple[int, int], ...], ok: bool) -> None:
    async with serving(HttpServer(b"HTTP/1.1 404 Not Found\r\n\r\n")) as port:
        result = await verdict("127.0.0.1", port, Check(type=HTTP, expect=expect, timeout_s=10))
    assert (result.ok, result.reason) == (ok, "L7OK/404" if ok else "L7STS/404")


@pytest.mark.parametrize("host", LOOPBACKS)
@pytest.mark.parametrize("type", [TCP, HTTP, HTTPS])
@pytest.mark.parametrize(
    ("closed", "reason", "cause"),
    [(refusing, "L4CON", "connection refused"), (dropping, "L4TOUT", "no connection within 0.1s")],
)
@in_loop
async def test_no_connection(
    closed: Callable[[str], AbstractContextManager[int]], reason: str, cause: str, type: CheckType, host: str
) -> None:
    with closed(host) as port:
        result = await verdict(host, port, Check(type=type, timeout_s=SHORT_S if reason == "L4TOUT" else 10))
    assert (result.ok, result.reason, result.cause) == (False, reason, cause)


@pytest.mark.parametrize("type", [TCP, HTTP, HTTPS])
@in_loop
async def test_no_route(type: CheckType) -> None:
    """Linux refuses TCP to a broadcast address itself, without a packet."""
    result = await verdict("255.255.255.255", 80, Check(type=type, timeout_s=10))
    assert (result.ok, result.reason, result.cause) == (False, "L4CON", "network unreachable")


@pytest.mark.parametrize("host", LOOPBACKS)
@pytest.mark.parametrize(("type", "reason"), [(TCP, "L4OK"), (HTTP, "L7TOUT"), (HTTPS, "L6TOUT")])
@in_loop
async def test_a_server_that_never_answers(type: CheckType, reason: str, host: str) -> None:
    async with serving(silent, host) as port:
        result = await verdict(host, port, Check(type=type, timeout_s=SHORT_S))
    assert (result.ok, result.reason) == (type is TCP, reason)
    assert type is TCP or result.duration_s >= SHORT_S


@in_loop
async def test_a_tls_server_that_never_answers_the_request(tls: ssl.SSLContext) -> None:
    async with serving(silent, tls=tls) as port:
        result = await verdict("127.0.0.1", port, Check(type=HTTPS, timeout_s=1.0))
    assert (result.ok, result.reason) == (False, "L7TOUT")


@in_loop
async def test_the_time_limit_is_for_the_whole_answer() -> None:
    """A server that says a little, again and again, does not gain time by that."""

    async def dribble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 102 Processing\r\n")
        while True:
            writer.write(b"X: y\r\n")
            await writer.drain()
            await asyncio.sleep(SHORT_S / 10)

    async with serving(dribble) as port:
        result = await verdict("127.0.0.1", port, Check(type=HTTP, timeout_s=SHORT_S))
    assert (result.ok, result.reason, result.cause) == (False, "L7TOUT", "no answer within 0.1s")


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b""])
@in_loop
async def test_tls_with_a_server_that_speaks_none(answer: bytes) -> None:
    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(answer)
        await writer.drain()

    async with serving(plain) as port:
        result = await verdict("127.0.0.1", port, Check(type=HTTPS, timeout_s=10))
    assert (result.ok, result.reason) == (False, "L6RSP")
    assert result.cause.startswith("the server does not speak TLS" if answer else "connection closed in the TLS")


@pytest.mark.parametrize("host", LOOPBACKS)
@in_loop
async def test_the_request_on_the_wire(host: str) -> None:
    server = HttpServer(OK)
    async with serving(server, host) as port:
        await verdict(host, port, Check(type=HTTP, path="/health?deep=1", timeout_s=10))
    request, *headers = server.requests[0].decode().removesuffix("\r\n\r\n").split("\r\n")
    assert request == "GET /health?deep=1 HTTP/1.1"
    literal = f"[{host}]" if ":" in host else host
    assert sorted(headers) == [
        "Accept: */*",
        "Connection: close",
        f"Host: {literal}:{port}",
        f"User-Agent: xdplb/{__version__}",
    ]


@pytest.mark.parametrize(
    ("check_host", "server_host", "sent"),
    [
        ("example.org:8443", None, "example.org:8443"),
        ("example.org", "other.example", "example.org"),
        (None, "other.example", "other.example"),
    ],
)
@in_loop
async def test_the_host_header(check_host: str | None, server_host: str | None, sent: str) -> None:
    server = HttpServer(OK)
    async with serving(server) as port:
        await verdict("127.0.0.1", port, Check(type=HTTP, host=check_host, timeout_s=10), server_host)
    assert f"\r\nHost: {sent}\r\n".encode() in server.requests[0]


@pytest.fixture
def asked_names(tls: ssl.SSLContext) -> Iterator[list[str | None]]:
    """The names that clients ask for in the TLS handshake (SNI)."""
    names: list[str | None] = []
    tls.sni_callback = lambda _connection, name, _context: names.append(name)
    yield names
    tls.sni_callback = None


@pytest.mark.parametrize(
    ("check_host", "name"),
    [
        ("example.org", "example.org"),
        ("example.org:8443", "example.org"),
        ("example.org.", "example.org"),
        ("192.0.2.1", None),
        ("[2001:db8::1]:443", None),
        (None, None),
    ],
)
@in_loop
async def test_the_name_in_tls(
    check_host: str | None, name: str | None, tls: ssl.SSLContext, asked_names: list[str | None]
) -> None:
    async with serving(HttpServer(OK), tls=tls) as port:
        result = await verdict("127.0.0.1", port, Check(type=HTTPS, host=check_host, timeout_s=10))
    assert (result.reason, asked_names) == ("L7OK/200", [name])


@pytest.mark.parametrize("host", [".example.org", "two..dots", "x" * 64, "[::1", "a.example:http", "a\r\nB: c"])
@pytest.mark.parametrize("type", [HTTP, HTTPS])
@in_loop
async def test_a_host_that_cannot_be_one_harms_at_most_its_own_check(
    host: str, type: CheckType, tls: ssl.SSLContext
) -> None:
    """Nor does it leak the connection, which would be a ResourceWarning."""
    async with serving(HttpServer(OK), tls=tls if type is HTTPS else None) as port:
        result = await verdict("127.0.0.1", port, Check(type=type, host=host, timeout_s=10))
    no_name = type is HTTPS and host not in ("[::1", "a.example:http")
    refused = no_name or "\n" in host
    assert result.reason in (("L4CON", "L7RSP") if refused else ("L7OK/200",))


@in_loop
async def test_every_check_is_a_stranger(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No cookies come back, no redirect is followed, neither proxy nor password of the environment is used."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    server = HttpServer(b"HTTP/1.1 302 Found\r\nSet-Cookie: a=b; Path=/\r\nLocation: /login\r\n\r\n")
    watch = Watch()
    async with serving(server) as port:
        backend = target("a", "127.0.0.1", port, Check(type=HTTP, timeout_s=10))
        async with probing(watch, [backend]) as prober:
            assert (await watch.result()).reason == "L7OK/302"
            prober.burst(backend.address)
            assert (await watch.result()).reason == "L7OK/302"
    assert len(server.requests) == 2
    assert server.requests[0] == server.requests[1]
    assert b"Authorization" not in server.requests[0]


@pytest.mark.parametrize("type", [TCP, HTTP, HTTPS])
@in_loop
async def test_a_check_ends_with_a_reset(type: CheckType, tls: ssl.SSLContext) -> None:
    """Even from an endless body, of which it reads nothing on purpose."""
    ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if type is TCP:
                ended.set_result(f"not a reset but {await reader.read(1)!r}")
            writer.write(OK)
            while True:
                writer.write(b"more" * 1024)
                await writer.drain()
                await asyncio.sleep(0)  # drain() of TLS alone would never let the loop hear of the reset
        except ConnectionError as error:
            ended.set_result(error.__class__.__name__)

    async with serving(endless, tls=tls if type is HTTPS else None) as port:
        result = await verdict("127.0.0.1", port, Check(type=type, timeout_s=10))
        assert result.ok
        assert await ended in ("ConnectionResetError", "BrokenPipeError")


@in_loop
async def test_a_tls_server_that_does_not_say_goodbye_holds_nothing(tls: ssl.SSLContext) -> None:
    state: asyncio.Future[Callable[[], bool]] = asyncio.get_running_loop().create_future()

    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.transport.pause_reading()
        writer.write(OK)
        connection = writer.get_extra_info("socket")
        state.set_result(
            lambda: (
                connection.fileno() < 0 or connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == TCP_CLOSE
            )
        )
        await done.wait()

    done, watch = asyncio.Event(), Watch()
    async with serving(deaf, tls=tls) as port:
        try:
            async with probing(watch, [target("a", "127.0.0.1", port, Check(type=HTTPS, timeout_s=10))]):
                assert (await watch.result()).ok
                assert state.result()()
        finally:
            done.set()
