"""Work on the event loop that is long for a large gateway, in turns with everything else there."""

from __future__ import annotations

import asyncio
import time

TURN_S = 0.005


class Turns:
    """`await turns.over()` between two pieces of the work gives way where its turn is over."""

    def __init__(self) -> None:
        self._until = time.monotonic() + TURN_S

    async def over(self) -> None:
        if time.monotonic() >= self._until:
            await asyncio.sleep(0)
            self._until = time.monotonic() + TURN_S
