"""What becomes of an error that nobody waits for: packets flow on, the daemon lives, and the operator sees it.

Every task of the daemon that runs as long as it does, and every handler that nobody calls to answer, runs under here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from xdplb.daemon.alarms import Alarms
from xdplb.errors import XdplbError

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
WELL_AFTER_S = 60.0
"""A task that has run for so long since its last error is well again."""


class Supervisor:
    """Keeps tasks running. `pause` waits between tries, so that a test need not."""

    def __init__(self, alarms: Alarms, pause: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        self._alarms = alarms
        self._pause = pause

    async def keep(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Runs `work`, again after each error, until cancelled. While it is not well there is an alarm."""
        pause_s = FIRST_PAUSE_S
        while True:
            begun = asyncio.get_running_loop().time()
            settled = asyncio.get_running_loop().call_later(WELL_AFTER_S, self._alarms.clear, "task-failed", name)
            try:
                await work()
                return
            except Exception as error:
                self.report(f"{name} failed, and begins again", error)
                text = f"{name} failed: {said(error)}"
                self._alarms.raise_("task-failed", text, "see the log; xdplb retries", about=name)
            finally:
                settled.cancel()
            if asyncio.get_running_loop().time() - begun >= WELL_AFTER_S:
                pause_s = FIRST_PAUSE_S
            await self._pause(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def once(self, what: str, work: Awaitable[None]) -> None:
        """Does it; an error is said in the log, and ends nothing."""
        try:
            await work
        except Exception as error:
            self.report(what, error)

    def report(self, what: str, error: Exception) -> None:
        """In the log: words for what may happen, a traceback for a bug."""
        if all(isinstance(part, XdplbError | OSError) for part in parts(error)):
            log.error("%s: %s", what, said(error))
        else:
            log.error("%s: this is a bug", what, exc_info=error)


def parts(error: BaseException) -> list[BaseException]:
    """The errors of a group, or the one that it is."""
    if isinstance(error, BaseExceptionGroup):
        return [part for member in error.exceptions for part in parts(member)]
    return [error]


def said(error: Exception) -> str:
    """In words, without a traceback."""

    def words(part: BaseException) -> str:
        if isinstance(part, XdplbError):
            return part.message
        return str(part) or type(part).__name__

    return "; ".join(dict.fromkeys(map(words, parts(error))))
