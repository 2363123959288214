"""Tells packet path and daemon what they are to know of this host's interfaces, as they are now."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping

from xdplb.core import link_facts
from xdplb.core.link_facts import LinkFacts
from xdplb.daemon.backend_monitor import BackendMonitor
from xdplb.daemon.network import Network
from xdplb.daemon.ports import Ports
from xdplb.dataplane.loader import Dataplane
from xdplb.errors import XdplbError
from xdplb.model import AttachMode, Forward
from xdplb.net.bulk import Device
from xdplb.net.own_macs import above, own_macs

log = logging.getLogger(__name__)


MISSED_FOR_S = 60.0
COUNT_AT_MOST_EVERY_S = 5.0


class Told:
    """Who hears of interfaces: the packet path and the monitor of backends; and what these know of them. `plane` gives
    the maps that packets meet, None while there are none.
    """

    def __init__(self, monitor: BackendMonitor, plane: Callable[[], Dataplane | None]) -> None:
        self._monitor = monitor
        self._plane = plane
        self._egress: frozenset[tuple[int, Forward]] = frozenset()
        self._egress_at = -math.inf
        self._missed: dict[int, float] = {}

    def tell(self, links: Mapping[int, LinkFacts], avoided: frozenset[int]) -> None:
        """To backends behind the `avoided` interfaces the kernel has to forward."""
        if (plane := self._plane()) is not None:
            link_facts.write(plane.links, links)
        self._monitor.avoid(avoided)

    def egress(self) -> frozenset[tuple[int, Forward]]:
        """By which interfaces packets leave to backends, and in which modes; some seconds old."""
        now = time.monotonic()
        if now - self._egress_at > COUNT_AT_MOST_EVERY_S:
            self._egress, self._egress_at = self._monitor.egress, now
        return self._egress

    def missed(self) -> frozenset[int]:
        """By which interfaces replies should have left within the last minute, but XDP could not send there."""
        now = time.monotonic()
        if (plane := self._plane()) is not None:
            self._missed |= dict.fromkeys(plane.links_missed[plane.links_missed != 0].tolist(), now)
            plane.links_missed[:] = 0
        self._missed = {index: since for index, since in self._missed.items() if now - since < MISSED_FOR_S}
        return frozenset(self._missed)


class KnownLinks:
    """Level-triggered: whatever happened in between, all is right after a look."""

    devices: Mapping[int, Device] = {}
    refusing: frozenset[int] = frozenset()
    """Interfaces that take no frames of XDP."""

    def __init__(self, network: Network, ports: Ports, told: Told | None) -> None:
        self._network = network
        self._ports = ports
        self._told = told
        self._looking = asyncio.Lock()

    async def look(self) -> None:
        """Where the kernel does not answer, all stays as it was."""
        async with self._looking:
            try:
                self.devices = await self._network.devices()
                refusing = await self._network.refusing()
            except (XdplbError, OSError) as error:
                log.debug("the interfaces could not be looked at: %s", error)
                return
            self.refusing = self._without_a_driver(refusing or frozenset())
            if self._told is not None:
                self._told.tell(self._facts(), self._avoided())

    def _without_a_driver(self, refusing: frozenset[int]) -> frozenset[int]:
        """Of native mode: in generic mode frames leave as the kernel's own do."""
        if not any(program and program.mode is AttachMode.NATIVE for program in self._ports.programs.values()):
            return frozenset()
        return frozenset(index for index in refusing if index in self.devices and self.devices[index].mac)

    def _facts(self) -> dict[int, LinkFacts]:
        macs: dict[int, frozenset[bytes] | None] = {}
        for port in self._ports.all:
            macs |= own_macs(self.devices, port.index)
        return {
            index: LinkFacts(macs.get(index), takes_frames=index not in self.refusing)
            for index in macs.keys() | self.refusing
        }

    def _avoided(self) -> frozenset[int]:
        """On one interface, what came in leaves again without being redirected (XDP_TX); but not on veth."""
        first, *others = self._ports.all
        return self.refusing if others or first.kind == "veth" else self.refusing - {first.index}

    def used_in_vain(self) -> dict[int, frozenset[Forward]]:
        """Interfaces by which packets should leave but XDP cannot send; with the modes of backends behind them."""
        ports = frozenset(port.index for port in self._ports.all)
        egress = self._told.egress() if self._told else frozenset()
        missed = self._told.missed() if self._told else frozenset()
        used = (ports | missed | {index for index, _ in egress}) & self._avoided()
        return {index: frozenset(mode for at, mode in egress if at == index) for index in used}

    def forwards_tunnels(self) -> bool:
        """Whether the kernel has to send packets that are encapsulated."""
        return any(mode.encapsulates for modes in self.used_in_vain().values() for mode in modes)

    def without_replies(self) -> frozenset[int]:
        """Interfaces with backends behind them whose replies have to be translated, where none of our programs is."""
        covered = frozenset[int]().union(*(above(self.devices, port.index) for port in self._ports.all))
        egress = self._told.egress() if self._told else frozenset()
        return frozenset(index for index, mode in egress if mode.translates) - covered
