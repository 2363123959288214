"""What the ways of tunnels carry: from routers' reports in the map to the backends' statuses, while they hold."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

from xdplb.daemon.engine import Engine
from xdplb.dataplane.tunnel_map import Report, TunnelMap
from xdplb.model import Address

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.2
FOLLOW_EVERY_S = 5.0


class TunnelMtus:
    """`engine` gives the one that packets meet, None before the start; `tell` is called with all that is known whenever
    it changes: the MTU of the way to each address that has one.

    Level-triggered: a daemon that starts finds what an earlier one left in the map, and fills larger maps again.
    """

    def __init__(
        self,
        engine: Callable[[], Engine | None],
        tell: Callable[[Mapping[Address, int]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._tell = tell
        self._clock = clock
        self._seen: Engine | None = None
        self._map: TunnelMap | None = None
        self._news = 0
        self._followed = 0.0
        self._ways: dict[Address, tuple[Address, int]] = {}
        self._reports: dict[Address, Report] = {}

    async def run(self) -> None:
        while True:
            if (engine := self._engine()) is not None:
                self.look(engine)
            await asyncio.sleep(LOOK_EVERY_S)

    def look(self, engine: Engine) -> None:
        """Takes in what was reported since the last time, and lets go of what does not hold any more."""
        if self._map is None or self._seen is None or engine.plane is not self._seen.plane:
            self._map, self._ways, self._news = TunnelMap(engine.plane), {}, 0
        before = {address: report.mtu for address, report in self._reports.items()}
        if engine is not self._seen or self._clock() >= self._followed + FOLLOW_EVERY_S:
            self._follow(engine, self._map)
        news = self._map.news
        if news != self._news:
            self._read(self._map)
            self._news = news
        if self._reports:
            tick = engine.clock.tick
            self._reports = {address: report for address, report in self._reports.items() if report.holds(tick)}
        now = {address: report.mtu for address, report in self._reports.items()}
        if now != before:
            self._log(before, now)
            self._tell(now)

    def _follow(self, engine: Engine, map_: TunnelMap) -> None:
        """Enters the tunnels that there are into the map, and no other."""
        self._seen, self._followed = engine, self._clock()
        encapsulates = {name for name, service in engine.services.items() if service.forward.encapsulates}
        ways = {
            entry.address: (entry.source, entry.source_spread)
            for key, (_, entry) in engine.applied.backends.items()
            if key.service in encapsulates and entry.source is not None
        }
        if ways == self._ways:
            return
        for address in self._ways.keys() - ways.keys():
            map_.remove(address)
            self._reports.pop(address, None)
        for address, way in ways.items():
            if self._ways.get(address) != way:
                report = map_.report(address) or self._reports.get(address)
                map_.enter(address, *way, report)
                if report is not None:
                    self._reports[address] = report
        self._ways = ways

    def _read(self, map_: TunnelMap) -> None:
        since = map_.reported_since(self._news)
        for address in self._ways if since is None else since:
            report = map_.report(address) if address in self._ways else None
            if report is not None:
                self._reports[address] = report

    def _log(self, before: Mapping[Address, int], now: Mapping[Address, int]) -> None:
        for address in now:
            if before.get(address) != now[address]:
                log.info("%s: its tunnel carries %d bytes, a router reports", address, now[address])
        for address in before.keys() - now.keys():
            log.info("%s: no report any more that its tunnel carries less than its interface", address)
