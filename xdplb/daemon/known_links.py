"""Tells the packet path what it is to know of this host's interfaces, as they are now."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from xdplb.core import link_facts
from xdplb.core.link_facts import LinkFacts, Words
from xdplb.daemon.network import Network
from xdplb.daemon.ports import Ports
from xdplb.errors import XdplbError
from xdplb.net.own_macs import own_macs

log = logging.getLogger(__name__)


class KnownLinks:
    """`words` gives the map of the program that packets meet, or None while there is none."""

    def __init__(self, network: Network, ports: Ports, words: Callable[[], Words | None]) -> None:
        self._network = network
        self._ports = ports
        self._words = words
        self._looking = asyncio.Lock()

    async def look(self) -> None:
        """Level-triggered: whatever happened in between, the map is right afterwards. Where the kernel does not answer,
        it stays as it was.
        """
        async with self._looking:
            try:
                devices = await self._network.devices()
            except (XdplbError, OSError) as error:
                log.debug("the interfaces could not be looked at: %s", error)
                return
            links: dict[int, LinkFacts] = {}
            for port in self._ports.all:
                links |= {index: LinkFacts(macs) for index, macs in own_macs(devices, port.index).items()}
            if (words := self._words()) is not None:
                link_facts.write(words, links)
