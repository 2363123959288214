"""From a backend's new status to the maps: its flag at once, the slots of its service when the loop's turn is over."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from xdplb.core.status import Statuses, keeps_flows
from xdplb.daemon.engine import Engine
from xdplb.model import BackendKey


class Failover:
    """`engine` gives the one that packets meet, or None before the start; `save` is called once slots are in place."""

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
            asyncio.get_running_loop().call_soon(self.repair)
        self._dirty.add(key.service)

    def repair(self) -> None:
        """Gives away the slots of services that changed, now."""
        dirty, self._dirty = self._dirty, set()
        engine = self._engine()
        if not dirty or engine is None:
            return
        for service in dirty & self._statuses.by_service.keys():
            engine.apply_service(service)
        self._save()
