"""The service addresses, and those that full NAT sends from: given to this host where it lacks them, and taken back."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from functools import partial
from ipaddress import ip_address

from xdplb.daemon.alarms import Alarms
from xdplb.daemon.ledger import Ledger
from xdplb.daemon.network import Network
from xdplb.daemon.ports import Ports
from xdplb.daemon.upkeep import Difference, together
from xdplb.errors import XdplbError
from xdplb.model import Address, Config, Upkeep
from xdplb.net.next_hops import Interface

log = logging.getLogger(__name__)

ANNOUNCE_AFTER_S = (0.0, 1.0, 2.0)


class Addresses:
    """Every address is noted in the ledger before it is added, and announced on the link after it."""

    def __init__(self, network: Network, ports: Ports, ledger: Ledger, alarms: Alarms) -> None:
        self._network = network
        self._ports = ports
        self._ledger = ledger
        self._alarms = alarms
        self._announcing: set[asyncio.Task[None]] = set()
        self._contested: dict[Address, bytes] = {}

    async def add(self, config: Config) -> None:
        """Gives the host what `config` needs and it does not have yet."""
        if config.host.addresses is not Upkeep.MEND:
            return
        present = await self._network.addresses()
        missing = [(port, address) for port, address in self._wanted(config) if address not in present]
        await self._warn_of_owners(missing)
        for port, addresses in _by_port(self._noted(missing)).items():
            await self._network.add_addresses(port.index, addresses)
        self._announce(missing)

    async def remove(self, config: Config | None) -> None:
        """Takes back those that we gave and that `config` (None: nobody) does not need any more."""
        needed = {str(address) for _, address in self._wanted(config)} if config else set()
        self._ledger.relies = sorted(needed)
        going = [(name, address) for name, address in self._ledger.addresses if address not in needed]
        for name in dict.fromkeys(name for name, _ in going):
            addresses = [ip_address(address) for of, address in going if of == name]
            with suppress(XdplbError):
                interface = await self._network.interface(name)
                await self._network.remove_addresses(interface.index, addresses)
        gone = set(going)
        self._ledger.addresses = [note for note in self._ledger.addresses if note not in gone]
        if config is not None:
            self._ledger.save()

    async def differences(self, config: Config) -> list[Difference]:
        present = await self._network.addresses()
        missing = [(port, address) for port, address in self._wanted(config) if address not in present]
        mending = config.host.addresses is Upkeep.MEND
        found = []
        for port in dict.fromkeys(port for port, _ in missing):
            of_port = [self._missing(port, address, mending) for where, address in missing if where == port]
            found += together(of_port, port.name, f"addresses are missing on {port.name}")
        return found + [_contest(address, mac) for address, mac in self._contested.items()]

    def _missing(self, port: Interface, address: Address, mending: bool) -> Difference:
        there = port in self._ports.present
        # an IPv6 address goes with the link, and comes back with it
        possible = there and (port.up or address.version == 4)
        return Difference(
            "address-missing",
            str(address),
            f"{address} is missing on {port.name}, so that no client reaches it",
            f"ip address add {address}/{address.max_prefixlen} dev {port.name}",
            partial(self._put_back, port, address) if mending and possible else None,
            f"{address} was missing on {port.name}: added again",
        )

    async def _put_back(self, port: Interface, address: Address) -> None:
        """One that we did not add may have gone to another host: that one keeps it."""
        if str(address) not in {noted for _, noted in self._ledger.addresses}:
            owner = (await self._network.owners(port, [address])).get(address)
            if owner is not None:
                self._contested[address] = owner
                raise XdplbError(
                    f"{address} is gone from this host, and {owner.hex(':')} answers for it",
                    "where another program moves it between hosts, write host: {addresses: alarm}",
                )
        self._contested.pop(address, None)
        self._noted([(port, address)])
        await self._network.add_addresses(port.index, [address])
        self._announce([(port, address)])

    def announce_again(self, config: Config) -> None:
        """On interfaces that appeared: what is attached to them may have forgotten where the addresses are."""
        ours = {address for _, address in self._ledger.addresses}
        wanted = [(port, address) for port, address in self._wanted(config) if str(address) in ours]
        self._announce([(port, address) for port, address in wanted if port in self._ports.appeared])

    async def look_at_owners(self, config: Config) -> None:
        """Whether those that another host answered for are still contested."""
        before, self._contested = self._contested, {}
        for port, address in self._wanted(config) if before else []:
            if address in before:
                self._contested |= await self._network.owners(port, [address])

    def close(self) -> None:
        for task in self._announcing:
            task.cancel()

    def _wanted(self, config: Config) -> list[tuple[Interface, Address]]:
        wanted: list[tuple[Interface, Address]] = [(self._ports.front, address) for address in _listened(config)]
        return wanted + [(self._ports.back, address) for address in config.sources(4) + config.sources(6)]

    def _noted(self, added: list[tuple[Interface, Address]]) -> list[tuple[Interface, Address]]:
        before, known = self._ledger.addresses, set(self._ledger.addresses)
        notes = [(port.name, str(address)) for port, address in added]
        self._ledger.addresses = before + [note for note in notes if note not in known]
        try:
            self._ledger.save()
        except XdplbError:
            self._ledger.addresses = before
            raise
        return added

    async def _warn_of_owners(self, missing: list[tuple[Interface, Address]]) -> None:
        """RFC 5227, RFC 4862: an address is probed before it is taken. It is taken all the same: so says the file."""
        for port in dict.fromkeys(port for port, _ in missing):
            addresses = [address for where, address in missing if where == port]
            for address, mac in (await self._network.owners(port, addresses)).items():
                self._contested[address] = mac
                contest = _contest(address, mac)
                self._alarms.raise_(contest.alarm, contest.text, contest.fix, contest.about)

    def _announce(self, added: list[tuple[Interface, Address]]) -> None:
        for port in dict.fromkeys(port for port, _ in added):
            addresses = [address for where, address in added if where == port]
            task = asyncio.create_task(self._tell_the_link(port, addresses))
            self._announcing.add(task)
            task.add_done_callback(self._announcing.discard)

    async def _tell_the_link(self, port: Interface, addresses: list[Address]) -> None:
        """A few times, since nobody acknowledges it."""
        begun = 0.0
        for after in ANNOUNCE_AFTER_S:
            await asyncio.sleep(after - begun)
            begun = after
            await self._network.announce(port, addresses)


def _contest(address: Address, mac: bytes) -> Difference:
    whose = mac.hex(":") if any(mac) else "another host"
    return Difference(
        "address-conflict",
        str(address),
        f"{address} is in use elsewhere: {whose} answers for it",
        "take it off that host; a backend of dsr has it on lo, with net.ipv4.conf.all.arp_ignore=1",
    )


def _by_port(wanted: list[tuple[Interface, Address]]) -> dict[Interface, list[Address]]:
    found: dict[Interface, list[Address]] = {}
    for port, address in wanted:
        found.setdefault(port, []).append(address)
    return found


def _listened(config: Config) -> list[Address]:
    return list(dict.fromkeys(service.listen.address for service in config.services))
