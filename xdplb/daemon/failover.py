"""From a backend's new status to the maps: its flag at once, the slots of its service when the loop's turn is over.

Where so many services change at once that their slots would hold up the loop, the rest waits for its next turns.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from xdplb.core.status import Statuses, keeps_flows
from xdplb.daemon.engine import Engine
from xdplb.model import BackendKey

TURN_S = 0.01
"""How long slots are given away before the loop does something else."""


class Failover:
    """`engine` gives the one that packets meet, or None before the start and while it is filled; `save` is called once
    slots are in place.
    """

    def __init__(self, statuses: Statuses, engine: Callable[[], Engine | None], save: Callable[[], None]) -> None:
        self._statuses = statuses
        self._engine = engine
        self._save = save
        self._dirty: set[str] = set()

    def on_change(self, key: BackendKey) -> None:
        """A backend that cannot serve loses its flag before this returns. Changes of one turn share a plan."""
        engine = self._engine()
        if engine is None:
            return
        if not keeps_flows(self._statuses.get(key)):
            engine.withdraw(key)
        if not self._dirty:
            asyncio.get_running_loop().call_soon(self._take_a_turn)
        self._dirty.add(key.service)

    def repair(self, service: str) -> None:
        """Gives away the slots of a service that changed, now."""
        self._dirty.discard(service)
        self._give_away(service)

    def _take_a_turn(self) -> None:
        until = time.monotonic() + TURN_S
        while self._dirty and time.monotonic() < until:
            self._give_away(self._dirty.pop())
        if self._dirty:
            asyncio.get_running_loop().call_soon(self._take_a_turn)

    def _give_away(self, service: str) -> None:
        engine = self._engine()
        if engine is not None:
            if service in self._statuses.by_service:
                engine.apply_service(service)
            self._save()
