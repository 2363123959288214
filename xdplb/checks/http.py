"""An http or https check: one GET on a fresh connection; the status code decides.

    L7OK/200    the status is among those that `expect` names
    L7STS/500   it is not: the server answers, and says that it is faulty
    L7RSP       what came back is no valid HTTP answer, or the connection broke
    L7TOUT      connected, but no status within the time-out
    L6RSP       https: the TLS handshake failed             L6TOUT  or did not end in time
    L4CON       the connection was refused, or no way leads there             L4TOUT  nothing came back

Each is one result. How many of them in a row make a backend DOWN or UP is decided in core/health.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import ssl
from contextvars import ContextVar
from typing import Self

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.tracing import Trace
from yarl import URL

from xdplb import __version__
from xdplb.checks.endpoint import Endpoint, Layer, Progress
from xdplb.checks.tcp import connect
from xdplb.model import CheckType


class HttpChecks:
    """The checks of both kinds, over one aiohttp session; an asynchronous context manager."""

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

    async def check(self, endpoint: Endpoint, progress: Progress) -> tuple[bool, str]:
        status = await self._status(endpoint, progress)
        ok = any(low <= status <= high for low, high in endpoint.check.expect)
        return ok, f"L7OK/{status}" if ok else f"L7STS/{status}"

    async def _status(self, endpoint: Endpoint, progress: Progress) -> int:
        _exchange.set((endpoint, progress))
        headers = {"Host": endpoint.host} if endpoint.host else None
        async with self._session.get(endpoint.url, headers=headers, allow_redirects=False) as response:
            return response.status


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
        connection = await connect(endpoint)
        progress.layer = Layer.L6 if https else Layer.L7
        _, handler = await loop.create_connection(
            lambda: _ResettingHandler(loop), sock=connection, ssl=tls, server_hostname=tls_name
        )
        progress.layer = Layer.L7
        return handler


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
