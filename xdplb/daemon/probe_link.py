"""The interfaces of checks through a service's address: a veth pair, with xdplb's program for them on one end.

Sockets of checks are bound to the other end. The answers come in there: the main program recognizes them. Packets that
are cut into fragments for a tunnel go through the pair as well (bpf/cut.h).
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address

from xdplb import abi
from xdplb.daemon.ledger import Ledger
from xdplb.daemon.network import Network
from xdplb.daemon.upkeep import Difference
from xdplb.dataplane import syscall
from xdplb.model import Address, AttachMode, Config
from xdplb.net import offloads
from xdplb.net.next_hops import Interface
from xdplb.net.sysctl import Sysctls

log = logging.getLogger(__name__)

_SETTINGS = {"accept_local": "1", "rp_filter": "2"}
"""The answers come from an address of this host, which its routes know elsewhere."""

_MTU = abi.MOST_TO_CUT + 100
"""Room for the largest packet that is cut, and what goes before it. A veth with XDP cannot have much more."""

_DUMMY = ip_address("192.0.0.8")
"""The IPv4 dummy address (RFC 7600): an interface without any takes nothing that the reverse path filter looks at."""


def device_of(front: Interface) -> str:
    """The end that sockets are bound to, by the interface that faces the clients: an instance has one."""
    return f"xdplb-p{front.index}"


def _peer(device: str) -> str:
    return device.replace("-p", "-q")


@dataclass(frozen=True, slots=True)
class Ends:
    """`inner` is where sockets are, `outer` where the program runs."""

    inner: Interface
    outer: Interface


@dataclass(slots=True)
class _Wanted:
    """`program` is a descriptor of our own, `id` the program's."""

    vips: Sequence[Address]
    program: int
    id: int
    ends: Ends


class ProbeLink:
    """Noted in the ledger before it is made. With it go its settings, and the routes through it."""

    def __init__(
        self,
        network: Network,
        device: str,
        ledger: Ledger,
        sysctls: Sysctls,
        on_renewed: Callable[[Ends], None] = lambda ends: None,
    ) -> None:
        """`on_renewed` hears of interfaces that were made anew because somebody removed them."""
        self._network = network
        self._device = device
        self._ledger = ledger
        self._sysctls = sysctls
        self._on_renewed = on_renewed
        self._wanted: _Wanted | None = None

    async def make(self, config: Config, program: int) -> Ends | None:
        """None where `config` needs none; then there is none."""
        vips = sorted({s.listen.address for s in config.services if s.probes_by_vip}, key=str)
        cuts = any(s.forward.encapsulates and s.listen.address.version == 4 for s in config.services)
        self._forget()
        if not vips and not cuts:
            await self._remove()
            return None
        ends = await self._make(vips, program)
        self._wanted = _Wanted(vips, os.dup(program), syscall.program_id(program), ends)
        return ends

    async def differences(self) -> list[Difference]:
        wanted = self._wanted
        if wanted is None:
            return []
        inner = await self._network.observe(wanted.ends.inner.index)
        outer = await self._network.observe(wanted.ends.outer.index)
        works = inner is not None and inner.interface.carrier and outer is not None and outer.attached is not None
        if works and outer is not None and outer.attached is not None and outer.attached.prog_id == wanted.id:
            return []
        return [
            Difference(
                "probes-left-out",
                self._device,
                f"{self._device} does not work: no checks through services' addresses, and no fragments for tunnels",
                f"ip link del {self._device}",
                partial(self._renew, wanted),
                f"{self._device} did not work: made again",
            )
        ]

    async def _renew(self, wanted: _Wanted) -> None:
        await self._network.remove_interface(self._device)
        wanted.ends = await self._make(wanted.vips, wanted.program)
        self._on_renewed(wanted.ends)

    def close(self) -> None:
        self._forget()

    def _forget(self) -> None:
        if self._wanted is not None:
            os.close(self._wanted.program)
            self._wanted = None

    async def _make(self, vips: Sequence[Address], program: int) -> Ends:
        present = {interface.name: interface for interface in await self._network.interfaces()}
        names = {self._device, _peer(self._device)}
        if not names <= present.keys() or any(present[name].mtu != _MTU for name in names):
            await self._make_pair()
            present = {interface.name: interface for interface in await self._network.interfaces()}
        ends = Ends(present[self._device], present[_peer(self._device)])
        await asyncio.to_thread(self._set)
        await self._network.add_addresses(ends.inner.index, [_DUMMY])
        await self._add_routes(ends.inner, vips)
        await self._network.replace(ends.outer.index, program, AttachMode.NATIVE)
        return ends

    async def _make_pair(self) -> None:
        for left in {self._device, self._ledger.probe_link} - {""}:
            await self._network.remove_interface(left)
        self._ledger.probe_link = self._device
        self._ledger.save()
        await self._network.add_pair(self._device, _peer(self._device), _MTU)
        log.info("made %s, for checks through services' addresses, and for fragments", self._device)

    def _set(self) -> None:
        for name, value in _SETTINGS.items():
            self._sysctls.set(f"net/ipv4/conf/{self._device}/{name}", value)
        offloads.suit_redirection(self._device)

    async def _add_routes(self, inner: Interface, vips: Sequence[Address]) -> None:
        for address in vips:
            await self._network.route_through(inner.index, address)

    async def _remove(self) -> None:
        if self._ledger.probe_link:
            await self._network.remove_interface(self._ledger.probe_link)
            self._ledger.probe_link = ""
            self._ledger.save()
