"""Checks by datagram, and what a backend says of itself: against small servers on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import cast

import pytest
from probing import HttpServer, in_loop, serving, silent, verdict

from xdplb.checks.agent import judge
from xdplb.checks.attempt import CheckFailed, Verdict
from xdplb.checks.dns import question
from xdplb.core.health import AgentWord
from xdplb.model import Admin, Check, CheckType, DnsRecord, Rcode

UDP, DNS, AGENT = CheckType.UDP, CheckType.DNS, CheckType.AGENT
LOOPBACKS = ["127.0.0.1", "::1"]
SHORT_S = 0.1


class Datagrams(asyncio.DatagramProtocol):
    """Answers each datagram with those that `answers` makes of it; keeps what came."""

    def __init__(self, answers: Callable[[bytes], list[bytes]]) -> None:
        self.answers = answers
        self.received: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.DatagramTransport, transport)  # as a class it is one from 3.12 on

    def datagram_received(self, data: bytes, address: object) -> None:
        self.received.append(data)
        for answer in self.answers(data):
            self.transport.sendto(answer, address)


@contextlib.asynccontextmanager
async def datagrams(
    answers: Callable[[bytes], list[bytes]], host: str = "127.0.0.1"
) -> AsyncIterator[tuple[int, Datagrams]]:
    server = Datagrams(answers)
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: server, (host, 0))
    try:
        yield transport.get_extra_info("sockname")[1], server
    finally:
        transport.close()


def closed_port(host: str) -> int:
    """Nothing is there, and nothing is likely to come: the port was free a moment ago."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as taken:
        taken.bind((host, 0))
        return taken.getsockname()[1]


@pytest.mark.parametrize("host", LOOPBACKS)
@pytest.mark.parametrize(
    ("answer", "wanted", "reason", "cause"),
    [
        (b"pong\0", None, "L7OK", ""),
        (b"a pong at last", b"pong", "L7OK", ""),
        (b"nothing\xff\x1b", b"pong", "L7RSP", "answer without the expected bytes: 'nothing..'"),
    ],
)
@in_loop
async def test_a_udp_server_that_answers(
    answer: bytes, wanted: bytes | None, reason: str, cause: str, host: str
) -> None:
    async with datagrams(lambda _: [answer], host) as (port, server):
        result = await verdict(host, port, Check(UDP, send=b"\0ping", answer=wanted, timeout_s=10))
    assert (result.ok, result.reason, result.cause) == (reason == "L7OK", reason, cause)
    assert server.received == [b"\0ping"]


@pytest.mark.parametrize("host", LOOPBACKS)
@in_loop
async def test_a_udp_server_that_does_not_answer(host: str) -> None:
    async with datagrams(lambda _: [], host) as (port, _):
        result = await verdict(host, port, Check(UDP, timeout_s=SHORT_S))
        assert (result.ok, result.reason, result.cause) == (False, "L7TOUT", "no answer within 0.1s")
        result = await verdict(host, port, Check(UDP, silence_is_fine=True, timeout_s=SHORT_S))
        assert (result.ok, result.reason) == (True, "L4OK")
        assert result.duration_s >= SHORT_S


@pytest.mark.parametrize("host", LOOPBACKS)
@pytest.mark.parametrize(
    "check",
    [Check(UDP), Check(UDP, silence_is_fine=True), Check(DNS, name="a.example")],
    ids=["answer", "no-refusal", "dns"],
)
@in_loop
async def test_a_closed_udp_port(check: Check, host: str) -> None:
    result = await verdict(host, closed_port(host), check)
    assert (result.ok, result.reason, result.cause) == (False, "L4CON", "port unreachable")


@in_loop
async def test_whoever_answers_need_not_be_waited_for_to_the_end() -> None:
    async with datagrams(lambda _: [b"x"]) as (port, _):
        result = await verdict("127.0.0.1", port, Check(UDP, silence_is_fine=True, timeout_s=20))
    assert result.ok and result.duration_s < 10


def dns_answer(rcode: int, tail: bytes = b"", flags: int = 0x8180) -> Callable[[bytes], list[bytes]]:
    return lambda query: [query[:2] + struct.pack("!HHHHH", flags | rcode, 1, 0, 0, 0) + query[12:] + tail]


@pytest.mark.parametrize("host", LOOPBACKS)
@pytest.mark.parametrize(
    ("rcode", "expect", "reason"),
    [
        (0, (Rcode.NOERROR,), "L7OK/NOERROR"),
        (3, (Rcode.NOERROR, Rcode.NXDOMAIN), "L7OK/NXDOMAIN"),
        (2, (Rcode.NOERROR,), "L7STS/SERVFAIL"),
        (5, (Rcode.NOERROR,), "L7STS/REFUSED"),
        (0, (Rcode.REFUSED,), "L7STS/NOERROR"),
        (15, (Rcode.NOERROR,), "L7STS/RCODE15"),
    ],
)
@in_loop
async def test_response_codes(rcode: int, expect: tuple[Rcode, ...], reason: str, host: str) -> None:
    async with datagrams(dns_answer(rcode, b"more"), host) as (port, server):
        result = await verdict(host, port, Check(DNS, name="Www.Example.org", rcodes=expect, timeout_s=10))
    assert (result.ok, result.reason) == (reason.startswith("L7OK"), reason)
    assert result.cause == ("" if result.ok else f"answered {reason.partition('/')[2]}")
    assert server.received[0][2:] == struct.pack("!HHHHH", 0x0100, 1, 0, 0, 0) + question(
        "www.example.org", DnsRecord.A
    ).replace(b"www", b"Www").replace(b"example", b"Example")


@pytest.mark.parametrize(
    ("answers", "cause"),
    [
        (lambda query: [query], "answer is a question"),
        (lambda query: [query[:5]], "answer of 5 bytes is no DNS message"),
        (
            lambda query: [query[:2] + b"\x81\x80" + query[4:12] + question("b.example", DnsRecord.A)],
            "answer is about another question",
        ),
    ],
    ids=["question", "short", "other"],
)
@in_loop
async def test_what_is_no_answer_to_the_question(answers: Callable[[bytes], list[bytes]], cause: str) -> None:
    async with datagrams(answers) as (port, _):
        result = await verdict("127.0.0.1", port, Check(DNS, name="a.example", timeout_s=10))
    assert (result.ok, result.reason, result.cause) == (False, "L7RSP", cause)


@in_loop
async def test_an_answer_of_another_number_is_nobodys() -> None:
    right = dns_answer(0)
    async with datagrams(lambda query: [bytes([query[0] ^ 1]) + query[1:], b"x", *right(query)]) as (port, _):
        result = await verdict("127.0.0.1", port, Check(DNS, name="a.example", timeout_s=10))
    assert result.reason == "L7OK/NOERROR"


def test_questions_as_in_rfc_1035() -> None:
    assert question("example.org", DnsRecord.AAAA) == b"\x07example\x03org\0" + b"\0\x1c\0\x01"
    assert question("example.org.", DnsRecord.A) == b"\x07example\x03org\0" + b"\0\x01\0\x01"
    assert question(".", DnsRecord.SOA) == b"\0" + b"\0\x06\0\x01"


@in_loop
async def test_a_real_name_server(tmp_path: Path) -> None:
    program = shutil.which("dnsmasq")
    if program is None:
        pytest.skip("dnsmasq is not installed")
    port = closed_port("127.0.0.1")
    arguments = ["-k", "-C", "/dev/null", "-p", str(port), "-a", "127.0.0.1", "-z", "-R", "-x", str(tmp_path / "pid")]
    arguments += ["--address=/a.example/192.0.2.1", "--local=/example/"]
    server = await asyncio.create_subprocess_exec(program, *arguments, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 10
        while (await verdict("127.0.0.1", port, Check(DNS, name="a.example"))).reason != "L7OK/NOERROR":
            assert time.monotonic() < end
        missing = await verdict("127.0.0.1", port, Check(DNS, name="b.example", timeout_s=10))
        assert missing.reason == "L7STS/NXDOMAIN"
    finally:
        with contextlib.suppress(ProcessLookupError):
            server.kill()
        await server.wait()


@pytest.mark.parametrize(
    ("line", "admin", "percent"),
    [
        (b"up", None, None),
        (b"ready", Admin.ACTIVE, None),
        (b"75%", None, 75),
        (b"up ready 100%", Admin.ACTIVE, 100),
        (b"UP,50%\r", None, 50),
        (b"drain", Admin.DRAIN, None),
        (b"maint,0%", Admin.MAINT, 0),
        (b"up 999% maxconn:30", None, 256),
        (b"ready\tup # \xe4 all is well, 3% load, down yesterday", Admin.ACTIVE, None),
    ],
)
def test_words_of_a_backend_that_works(line: bytes, admin: Admin | None, percent: int | None) -> None:
    assert judge(line) == Verdict(True, "L7OK", "", AgentWord(admin, percent))


@pytest.mark.parametrize(
    ("line", "reason", "cause"),
    [
        (b"down", "L7STS/down", "the agent says down"),
        (b"fail#disk full\x1b[m", "L7STS/fail", "the agent says fail: disk full.[m"),
        (b"STOPPED 10%", "L7STS/stopped", "the agent says stopped"),
    ],
)
def test_words_of_a_backend_that_does_not_work(line: bytes, reason: str, cause: str) -> None:
    found = judge(line)
    assert (found.ok, found.reason, found.cause) == (False, reason, cause)


@pytest.mark.parametrize("line", [b"", b"# well", b"  ", b"HTTP/1.1 400 Bad Request", b"-5%", b"75", b"7.5%", b"1000%"])
def test_what_an_agent_cannot_have_meant(line: bytes) -> None:
    with pytest.raises(CheckFailed, match=r"^the agent said"):
        judge(line)


@in_loop
async def test_an_agent_is_asked_and_heard() -> None:
    asked: list[bytes] = []

    async def agent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readline())
        for piece in (b"up 7", b"5%", b"\nmore"):
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.01)
        await silent(reader, writer)

    async with serving(agent) as port:
        result = await verdict("127.0.0.1", port, Check(AGENT, send=b"web/a\n", timeout_s=10))
    assert (result.ok, result.reason, result.word) == (True, "L7OK", AgentWord(None, 75))
    assert asked == [b"web/a\n"]


@in_loop
async def test_an_agent_that_ends_without_a_line_end() -> None:
    async def agent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"drain")

    async with serving(agent) as port:
        result = await verdict("127.0.0.1", port, Check(AGENT, timeout_s=10))
    assert result.word == AgentWord(Admin.DRAIN, None)


@in_loop
async def test_an_agent_that_is_none() -> None:
    async with serving(HttpServer(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as port:
        result = await verdict("127.0.0.1", port, Check(AGENT, send=b"GET /\r\n\r\n", timeout_s=10))
    assert (result.ok, result.reason) == (False, "L7RSP")
    assert result.cause == "the agent said 'HTTP/1.1 400 Bad Request.'"
    async with serving(silent) as port:
        result = await verdict("127.0.0.1", port, Check(AGENT, timeout_s=SHORT_S))
    assert (result.ok, result.reason) == (False, "L7TOUT")
