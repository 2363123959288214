"""How long the event loop stood still: measured by the loop itself, for `status` and metrics."""

from __future__ import annotations

import asyncio
from collections import deque

EVERY_S = 0.02
KEPT_S = 10.0


class LoopLag:
    """The longest of the latest `KEPT_S` seconds."""

    def __init__(self) -> None:
        self._late: deque[tuple[float, float]] = deque()
        """When, and by how much; only those that no later one exceeds, so that the first is the longest."""

    @property
    def longest_s(self) -> float:
        return self._late[0][1] if self._late else 0.0

    async def measure(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + EVERY_S
            await asyncio.sleep(EVERY_S)
            self.note(loop.time(), max(0.0, loop.time() - due))

    def note(self, now: float, late_s: float) -> None:
        while self._late and self._late[-1][1] <= late_s:
            self._late.pop()
        self._late.append((now, late_s))
        while self._late[0][0] < now - KEPT_S:
            self._late.popleft()
