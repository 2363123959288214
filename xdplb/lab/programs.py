"""Programs that run on hosts of a laboratory, in processes of their own: an HTTP load and a UDP echo server.

Run by path (`python -IS programs.py …`), so this file imports the standard library only.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import json
import re
import selectors
import socket
import struct
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

IP_PKTINFO = 8
"""linux/in.h; Python's socket module has no name for it before 3.14."""


@dataclass(frozen=True, slots=True)
class Target:
    host: str
    port: int
    request: bytes

    @classmethod
    def parse(cls, url: str, *, keep_alive: bool) -> Target:
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None:
            raise ValueError(f"{url}: not an http:// address")
        connection = "keep-alive" if keep_alive else "close"
        request = f"GET {parts.path or '/'} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: {connection}\r\n\r\n"
        return cls(parts.hostname, parts.port or 80, request.encode())


class Connection:
    """A connection to the target, opened at the first request and again after one that failed."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def measure(self, timeout_s: float) -> None:
        """Makes one request and prints what came of it as a line of JSON."""
        started_s = time.monotonic()
        status: int | None = None
        body, error = "", None
        try:
            async with asyncio.timeout(timeout_s):
                status, body = await self._request()
        except (TimeoutError, OSError, EOFError, ValueError) as failure:
            error = _reason(failure)
            self.close()
        if status is not None and status != 200:
            error = f"status {status}"
        latency_s = time.monotonic() - started_s
        line = {
            "started_s": started_s,
            "latency_s": latency_s,
            "backend": None if error else body,
            "status": status,
            "error": error,
        }
        print(json.dumps(line), flush=True)

    async def _request(self) -> tuple[int, str]:
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._target.host, self._target.port)
        reader, writer = self._streams
        writer.write(self._target.request)
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)\r\n", head)
        if not head.startswith(b"HTTP/1.1 ") or length is None:
            raise ValueError("not an HTTP/1.1 response with a length")
        body = await reader.readexactly(int(length[1]))
        return int(head[9:12]), body.decode(errors="replace").strip()

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None


def _reason(failure: Exception) -> str:
    match failure:
        case TimeoutError():
            return "timeout"
        case ConnectionRefusedError():
            return "refused"
        case ConnectionResetError() | BrokenPipeError():
            return "reset"
        case EOFError():
            return "closed"
        case OSError(errno=int(code)):
            return errno.errorcode.get(code, str(failure))
        case _:
            return str(failure)


async def http_load(target: Target, rate: float, workers: int, keep_alive: bool, timeout_s: float) -> None:
    """`rate` > 0 without keep-alive: open loop, a request starts every 1/rate seconds however slow the answers are.

    Otherwise `workers` make one request after the other, together not more than `rate` a second where that is > 0.
    """
    async with asyncio.TaskGroup() as group:
        if rate > 0 and not keep_alive:
            pace = Pace(1 / rate)
            while True:
                await pace.wait()
                group.create_task(_single(target, timeout_s))
        for number in range(workers):
            pace = Pace(workers / rate if rate > 0 else 0, phase=number / workers)
            group.create_task(_worker(target, pace, keep_alive, timeout_s))


async def _single(target: Target, timeout_s: float) -> None:
    connection = Connection(target)
    await connection.measure(timeout_s)
    connection.close()


async def _worker(target: Target, pace: Pace, keep_alive: bool, timeout_s: float) -> None:
    connection = Connection(target)
    while True:
        await pace.wait()
        await connection.measure(timeout_s)
        if not keep_alive:
            connection.close()


class Pace:
    """Turns at regular intervals; one that comes late shifts those after it, there is no catching up in a burst."""

    def __init__(self, period_s: float, phase: float = 0.0) -> None:
        self._period_s = period_s
        self._next_s = time.monotonic() + phase * period_s

    async def wait(self) -> None:
        await asyncio.sleep(max(0.0, self._next_s - time.monotonic()))
        self._next_s = max(self._next_s, time.monotonic() - self._period_s) + self._period_s


def udp_echo(name: str, first_port: int, last_port: int) -> None:
    """Answers `NAME:payload` to each datagram, from the address and port it was sent to."""
    selector = selectors.DefaultSelector()
    for port in range(first_port, last_port + 1):
        for family in (socket.AF_INET, socket.AF_INET6):
            server = socket.socket(family, socket.SOCK_DGRAM)
            if family == socket.AF_INET6:
                server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
            else:
                server.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
            server.bind(("", port))
            selector.register(server, selectors.EVENT_READ, server)
    print("ready", flush=True)
    while True:
        for key, _events in selector.select():
            _echo(key.data, name.encode() + b":")


def _echo(server: socket.socket, prefix: bytes) -> None:
    payload, ancillary, _flags, client = server.recvmsg(65536, 256)
    ((level, kind, info),) = ancillary
    if level == socket.IPPROTO_IP:
        _interface, _local, asked = struct.unpack("=I4s4s", info)
        source = struct.pack("=I4s4s", 0, asked, bytes(4))
    else:
        source = info[:16] + bytes(4)
    server.sendmsg([prefix, payload], [(level, kind, source)], 0, client)


def main() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    load = commands.add_parser("http-load")
    load.add_argument("url")
    load.add_argument("--rate", type=float, default=0.0)
    load.add_argument("--workers", type=int, default=1)
    load.add_argument("--keep-alive", action="store_true")
    load.add_argument("--timeout", type=float, default=1.0)
    echo = commands.add_parser("udp-echo")
    echo.add_argument("name")
    echo.add_argument("first_port", type=int)
    echo.add_argument("last_port", type=int)
    args = parser.parse_args()
    if args.command == "udp-echo":
        udp_echo(args.name, args.first_port, args.last_port)
    else:
        target = Target.parse(args.url, keep_alive=args.keep_alive)
        asyncio.run(http_load(target, args.rate, args.workers, args.keep_alive, args.timeout))


if __name__ == "__main__":
    main()
