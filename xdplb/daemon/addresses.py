"""The service addresses, and those that full NAT sends from: given to this host where it lacks them, and taken back."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from ipaddress import ip_address

from xdplb.daemon.network import Network
from xdplb.dataplane.manifest import Manifest
from xdplb.errors import XdplbError
from xdplb.model import Address, Config
from xdplb.net.next_hops import Interface
from xdplb.paths import Instance


class Addresses:
    """Every address is noted in the manifest before it is added."""

    def __init__(self, network: Network, instance: Instance, interfaces: Sequence[Interface], notes: Manifest) -> None:
        self._network = network
        self._instance = instance
        self._interfaces = interfaces
        self._notes = notes

    async def add(self, config: Config) -> None:
        """Gives the host the service addresses, and those that full NAT sends from, that it does not have yet."""
        client_side, backend_side = self._interfaces[0], self._interfaces[-1]
        present = await self._network.addresses()
        wanted = [(client_side, address) for address in _listened(config)]
        wanted += [(backend_side, address) for address in config.sources(4) + config.sources(6)]
        missing = [(interface, address) for interface, address in wanted if address not in present]
        notes = [[interface.name, str(address)] for interface, address in missing]
        self._notes.addresses += [note for note in notes if note not in self._notes.addresses]
        self._notes.save(self._instance.manifest)
        for interface, address in missing:
            await self._network.add_address(interface.index, address, present)

    async def remove(self, config: Config | None) -> None:
        """Takes back those that we gave and that `config` (None: nobody) does not need any more."""
        wanted = {str(a) for a in (*_listened(config), *config.sources(4), *config.sources(6))} if config else set()
        for name, address in list(self._notes.addresses):
            if address in wanted:
                continue
            with suppress(XdplbError):
                interface = await self._network.interface(name)
                await self._network.remove_address(interface.index, ip_address(address))
            self._notes.addresses.remove([name, address])


def _listened(config: Config) -> list[Address]:
    return list(dict.fromkeys(service.listen.address for service in config.services))
