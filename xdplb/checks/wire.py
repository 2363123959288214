"""What a health check does on the wire. When it is done, and what follows from it, is decided elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import hashlib
import ipaddress
import socket
import ssl
import struct
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol, Self

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.tracing import Trace
from yarl import URL

from xdplb import __version__
from xdplb.model import Address, Check, CheckType

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
"""struct linger {on, 0 s}: close() resets. Otherwise whoever closes first keeps the connection in TIME_WAIT for a
minute; at thousands of checks a second that would be the gateway. HAProxy ends its checks in the same way."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """All that the bytes and the times of a check depend on. `host` goes into Host and SNI; without it the address."""

    address: Address
    port: int
    check: Check
    host: str | None = None

    @property
    def url(self) -> URL:
        literal = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        return URL(f"{self.check.type}://{literal}:{self.port}{self.check.path}")

    @property
    def phase(self) -> float:
        """In [0, 1): where in the interval the checks start. The same at every start of the daemon."""
        identity = f"{self.address} {self.port} {self.check} {self.host}".encode()
        return int.from_bytes(hashlib.blake2b(identity, digest_size=4).digest(), "big") / 2**32


class Layer(enum.StrEnum):
    """The layer a check is at work on: what fails now fails there."""

    L4 = "L4"
    L6 = "L6"
    L7 = "L7"

    @property
    def failure(self) -> str:
        return "L4CON" if self is Layer.L4 else f"{self}RSP"

    @property
    def timeout(self) -> str:
        return f"{self}TOUT"


@dataclass(slots=True)
class Progress:
    """How far a check has got; outlives the exception that ends it."""

    layer: Layer = Layer.L4


class Perform(Protocol):
    """One check on the wire, without time limit: (ok, reason). Every exception is a failure at `progress.layer`."""

    async def __call__(self, endpoint: Endpoint, progress: Progress) -> tuple[bool, str]: ...


async def _connect(endpoint: Endpoint) -> socket.socket:
    family = socket.AF_INET6 if endpoint.address.version == 6 else socket.AF_INET
    connection = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        await asyncio.get_running_loop().sock_connect(connection, (str(endpoint.address), endpoint.port))
    except BaseException:
        connection.close()
        raise
    return connection


def _tls_name(host: str | None) -> str:
    """The name for SNI, "" for none: RFC 6066 section 3 allows no port, no address and no final dot there.

    ValueError for what cannot be a name; asyncio of Python 3.11 finds that out with a connection in hand, and loses it.
    """
    name = URL(f"//{host}").raw_host or "" if host else ""
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name)
        return ""
    return name.rstrip(".").encode("idna").decode()


def _unverified_tls() -> ssl.SSLContext:
    """Takes any certificate: a check asks whether the server works, not who it is; clients verify for themselves."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


_exchange: ContextVar[tuple[Endpoint, Progress]] = ContextVar("_exchange")
"""The HTTP check that the current task performs: aiohttp has no other way to tell a connector which layer failed."""


class _ResettingHandler(ResponseHandler):
    """Ends the connection at once: a TLS transport's close() waits up to 30 s for the server's close_notify."""

    def close(self) -> None:
        if isinstance(self.transport, asyncio.Transport):
            self.transport.abort()
        super().close()


class _Connector(aiohttp.BaseConnector):
    """One fresh connection a check, opened like a TCP check's. Extends aiohttp as its own UnixConnector does."""

    def __init__(self) -> None:
        super().__init__(force_close=True, limit=0)
        self._tls = _unverified_tls()

    async def _create_connection(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Trace],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109
    ) -> ResponseHandler:
        endpoint, progress = _exchange.get()
        https = endpoint.check.type is CheckType.HTTPS
        tls, tls_name = (self._tls, _tls_name(endpoint.host)) if https else (None, None)
        loop = asyncio.get_running_loop()
        connection = await _connect(endpoint)
        progress.layer = Layer.L6 if https else Layer.L7
        _, handler = await loop.create_connection(
            lambda: _ResettingHandler(loop), sock=connection, ssl=tls, server_hostname=tls_name
        )
        progress.layer = Layer.L7
        return handler


class Wire:
    """The checks as configured, over real sockets; an asynchronous context manager."""

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=_Connector(),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": f"xdplb/{__version__}", "Connection": "close"},
            skip_auto_headers=("Accept-Encoding",),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
            auto_decompress=False,
            trust_env=False,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def __call__(self, endpoint: Endpoint, progress: Progress) -> tuple[bool, str]:
        if endpoint.check.type is CheckType.TCP:
            (await _connect(endpoint)).close()
            return True, "L4OK"
        status = await self._http_status(endpoint, progress)
        ok = any(low <= status <= high for low, high in endpoint.check.expect)
        return ok, f"L7OK/{status}" if ok else f"L7STS/{status}"

    async def _http_status(self, endpoint: Endpoint, progress: Progress) -> int:
        _exchange.set((endpoint, progress))
        headers = {"Host": endpoint.host} if endpoint.host else None
        async with self._session.get(endpoint.url, headers=headers, allow_redirects=False) as response:
            return response.status
