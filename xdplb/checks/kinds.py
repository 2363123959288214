"""All kinds of checks by their `type`.

A new kind is a file beside this one, a line here, and its word in model.CheckType. Its keys go to config/parts.py, its
reasons to core/health.py.
"""

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
