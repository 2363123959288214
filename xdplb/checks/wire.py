"""All kinds of checks by their `type`: a new kind is a file beside this one, and a line here."""

from __future__ import annotations

from typing import Self

from xdplb.checks import tcp
from xdplb.checks.endpoint import Endpoint, Perform, Progress
from xdplb.checks.http import HttpChecks
from xdplb.model import CheckType


class Wire:
    """The checks as configured, over real sockets; an asynchronous context manager."""

    def __init__(self) -> None:
        self._http = HttpChecks()
        self._kinds: dict[CheckType, Perform] = {
            CheckType.TCP: tcp.check,
            CheckType.HTTP: self._http.check,
            CheckType.HTTPS: self._http.check,
        }

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._http.__aexit__(*error)

    async def __call__(self, endpoint: Endpoint, progress: Progress) -> tuple[bool, str]:
        return await self._kinds[endpoint.check.type](endpoint, progress)
