"""The kernel's network configuration, through rtnetlink: interfaces, XDP programs, addresses, neighbours, events.

The only module that imports pyroute2 (the laboratory's beside). Everything happens in the network namespace of the
thread that enters `Links`.
"""

from __future__ import annotations

import asyncio
import difflib
import errno
import logging
import os
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.rtnl.marshal import MarshalRtnl

from xdplb.errors import ForeignProgram, NotCapable, NotPrivileged, XdplbError
from xdplb.model import Address, AttachMode, Network
from xdplb.net import announce, bulk, rtnl, wire
from xdplb.net.attach_errors import Refusal, attach_error
from xdplb.net.next_hops import Event, Interface, Neighbour, NeighbourKey, Route

log = logging.getLogger(__name__)

_T = TypeVar("_T")

XDP_FLAGS_UPDATE_IF_NOEXIST, XDP_FLAGS_REPLACE = 0x01, 0x10
XDP_FLAGS_MODE = {AttachMode.GENERIC: 0x02, AttachMode.NATIVE: 0x04}
IFA_F_NODAD = 0x02
LAST_PRIORITY = 0xFFFFFFFF
NLM_F_DUMP_INTR = 0x10
RTNLGRP_NEXTHOP = 32
EVENT_BUFFER_BYTES = 32 << 20
"""Of neighbours that all answer at once there are tens of thousands, at a kilobyte each."""
# RTMGRP_*: link, neighbour, and address, route, rule of both families
EVENT_GROUPS = 0x1 | 0x4 | 0x10 | 0x40 | 0x80 | 0x100 | 0x400 | 0x40000


@dataclass(frozen=True, slots=True)
class Attached:
    """The XDP program on an interface. A program in the card itself (offloaded) counts as native."""

    prog_id: int
    mode: AttachMode


@dataclass(frozen=True, slots=True)
class Observed:
    """An interface as it is now, and the program that runs there."""

    interface: Interface
    attached: Attached | None


@dataclass(frozen=True, slots=True)
class Attachment:
    """How a program was attached. `fallback` says why it is not native where `auto` had to fall back, else ""."""

    mode: AttachMode
    fallback: str = ""


class Links:
    """`async with Links() as links:`. One request socket; every method may be called from several tasks of one loop."""

    def __init__(self, event_buffer_bytes: int = EVENT_BUFFER_BYTES) -> None:
        self._netlink: Any = AsyncIPRoute(ext_ack=True)
        self._event_buffer_bytes = event_buffer_bytes

    async def __aenter__(self) -> Self:
        await self._netlink.setup_endpoint()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._netlink.close()

    async def interfaces(self) -> list[Interface]:
        return [rtnl.interface(message) for message in await self._dump("link")]

    async def interface(self, name: str) -> Interface:
        """By name or alternative name. Raises NotCapable, whose hint lists the interfaces there are."""
        known = await self.interfaces()
        for interface in known:
            if name == interface.name or name in interface.altnames:
                return interface
        names = sorted(interface.name for interface in known)
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        suggestion = f"did you mean '{close[0]}'? " if close else ""
        raise NotCapable(f"no interface is named '{name}'", f"{suggestion}this host has: {', '.join(names)}")

    async def devices(self) -> dict[int, bulk.Device]:
        """All interfaces of this host by index, and which stands on which."""
        return await asyncio.to_thread(bulk.devices)

    async def observe(self, index: int) -> Observed | None:
        """None where the interface is gone from this network namespace."""
        try:
            link = await self._link(index)
        except NotCapable:
            return None
        return Observed(rtnl.interface(link), _attached(link))

    async def attached(self, index: int) -> Attached | None:
        """Raises NotCapable where the interface is gone."""
        return _attached(await self._link(index))

    async def attach(
        self, index: int, prog_fd: int, mode: AttachMode = AttachMode.AUTO, expected_fd: int | None = None
    ) -> Attachment:
        """Attaches where no program is; with `expected_fd`, atomically in place of that one, in its mode.

        Raises ForeignProgram, NotCapable, NotPrivileged.
        """
        if expected_fd is not None:
            mode = await self._mode_to_keep(index, mode)
            await self._attach(index, prog_fd, mode, XDP_FLAGS_REPLACE, expected_fd)
            return Attachment(mode)
        return await self._attach_or_fall_back(index, prog_fd, mode, XDP_FLAGS_UPDATE_IF_NOEXIST)

    async def replace(self, index: int, prog_fd: int, mode: AttachMode = AttachMode.AUTO) -> Attachment:
        """Attaches whatever program is there. Where that one runs in another mode there is a moment without any."""
        current = await self.attached(index)
        if current is not None and current.mode is not (AttachMode.NATIVE if mode is AttachMode.AUTO else mode):
            await self.detach(index)
        return await self._attach_or_fall_back(index, prog_fd, mode, 0)

    async def detach(self, index: int, expected_fd: int | None = None) -> bool:
        """Detaches the program of `expected_fd`, or without it whatever is there.

        Idempotent: False where there is nothing (of ours) to detach, the interface gone included. Raises NotPrivileged,
        and ForeignProgram where a BPF link holds the program, which cannot be detached from outside.
        """
        try:
            current = await self.attached(index)
        except NotCapable:
            return False
        if current is None:
            return False
        flags = XDP_FLAGS_MODE[current.mode] | (XDP_FLAGS_REPLACE if expected_fd is not None else 0)
        try:
            await self._set_xdp(index, -1, flags, expected_fd)
        except NetlinkError as error:
            if error.code == errno.ENODEV or (error.code == errno.EEXIST and expected_fd is not None):
                return False
            raise await self._explain(index, current.mode, error) from error
        return True

    async def addresses(self) -> set[Address]:
        """All addresses of this host, of all its interfaces."""
        return await asyncio.to_thread(bulk.addresses)

    async def local_networks(self) -> set[Network]:
        """What this host takes for itself: its addresses, and networks that are local to it as a whole."""
        return await asyncio.to_thread(bulk.local_networks)

    async def announce(self, interface: Interface, addresses: Iterable[Address]) -> None:
        """Tells the link that these addresses are here: gratuitous ARP, unsolicited neighbour advertisements."""
        await self._on_the_wire(interface, announce.announce, tuple(addresses))

    async def ask(self, interface: Interface, source: Address, neighbours: Iterable[Address]) -> None:
        """Asks where these neighbours are now. Whatever answers is told as an event."""

        def ask(interface: Interface, neighbours: tuple[Address, ...]) -> None:
            announce.ask(interface, source, neighbours)

        await self._on_the_wire(interface, ask, tuple(neighbours))

    async def owners(self, interface: Interface, addresses: Collection[Address]) -> dict[Address, bytes]:
        """Which of the addresses another host on the link answers for, with its MAC. Takes a third of a second."""
        return await self._on_the_wire(interface, announce.owners, tuple(addresses)) or {}

    async def _on_the_wire(
        self, interface: Interface, what: Callable[..., _T], addresses: tuple[Address, ...]
    ) -> _T | None:
        """None where no frame can leave: not Ethernet, down, or gone."""
        if not addresses or not interface.mac or not interface.up:
            return None
        try:
            return await asyncio.to_thread(what, interface, addresses)
        except OSError as error:
            log.debug("%s: %s", interface.name, error)
            return None

    async def add_addresses(self, index: int, addresses: Iterable[Address]) -> None:
        """Adds each alone (/32, /128), usable at once, and never the source of this host's own connections. Nothing
        where this interface has it. XdplbError where one is refused: the others are there then.
        """
        for address, code in (await asyncio.to_thread(bulk.add_addresses, index, tuple(addresses))).items():
            if code != errno.EEXIST:
                raise _refused(f"cannot add the address {address}", code)

    async def remove_addresses(self, index: int, addresses: Iterable[Address]) -> None:
        """Idempotent: nothing where an address, or the interface, is not there. XdplbError as above."""
        for address, code in (await asyncio.to_thread(bulk.remove_addresses, index, tuple(addresses))).items():
            if code not in (errno.EADDRNOTAVAIL, errno.ENODEV):
                raise _refused(f"cannot remove the address {address}", code)

    async def route(self, address: Address) -> Route | None:
        """The way a packet from this host to `address` would take; None where there is none."""
        return (await self.routes([address]))[address]

    async def routes(self, addresses: Collection[Address]) -> dict[Address, Route | None]:
        """The same of many addresses."""
        return await asyncio.to_thread(bulk.routes, addresses)

    async def neighbours(self) -> list[Neighbour]:
        return await asyncio.to_thread(bulk.neighbours)

    async def keep_resolved(self, keys: Collection[NeighbourKey]) -> None:
        """Has the neighbours resolved now, and kept so by kernels from 5.16 on (NTF_EXT_MANAGED; older ones ignore it).

        The entries get our mark. Not for `fixed` ones: a permanent entry would become an ordinary one. Passes over an
        interface that is gone; raises XdplbError, which names the first that was refused.
        """
        for key, code in (await asyncio.to_thread(bulk.keep_resolved, keys)).items():
            if code == errno.ENOBUFS:
                version = "ipv4" if key.address.version == 4 else "ipv6"
                raise XdplbError(
                    f"cannot resolve the neighbour {key.address}: the neighbour table is full",
                    f"raise net.{version}.neigh.default.gc_thresh3 (and gc_thresh2) above the number of neighbours",
                )
            if code not in (errno.ENODEV, errno.ENETDOWN):
                raise _refused(f"cannot resolve the neighbour {key.address}", code)

    async def release(self, entries: Collection[Neighbour]) -> None:
        """Takes our mark off: a resolved entry becomes an ordinary one again, an unresolved one goes."""
        for entry, code in (await asyncio.to_thread(bulk.release, entries)).items():
            if code not in (errno.ENODEV, errno.ENETDOWN, errno.ENOENT, errno.ENXIO):
                raise _refused(f"cannot release the neighbour {entry.key.address}", code)

    async def add_pair(self, name: str, peer: str, mtu: int) -> None:
        """Two interfaces with a cable between, which no neighbour is asked for on and no address comes to by itself."""
        try:
            await self._netlink.link("add", ifname=name, kind="veth", peer=peer)
            for each in (peer, name):
                index = (await self.interface(each)).index
                await self._netlink.link("set", index=index, arp=False, mtu=mtu)
                await self._netlink.link("set", index=index, state="up")
        except NetlinkError as error:
            raise _failed(f"cannot make the interfaces {name} and {peer}", error) from error

    async def remove_interface(self, name: str) -> bool:
        """Its peer goes with it. Idempotent: False where there is none of this name."""
        try:
            await self._netlink.link("del", index=(await self.interface(name)).index)
        except NotCapable:
            return False
        except NetlinkError as error:
            if error.code == errno.ENODEV:
                return False
            raise _failed(f"cannot remove the interface {name}", error) from error
        return True

    async def route_through(self, index: int, address: Address) -> None:
        """A way to an address for sockets that are bound to the interface: any other one finds a better route."""
        try:
            await self._netlink.route(
                "replace", dst=f"{address}/{address.max_prefixlen}", oif=index, priority=LAST_PRIORITY
            )
        except NetlinkError as error:
            raise _failed(f"cannot add a route to {address}", error) from error

    async def refusing(self) -> frozenset[int] | None:
        """The interfaces that do not send frames which XDP redirects there. None where this kernel does not tell."""
        return await asyncio.to_thread(wire.refusing)

    async def checksums(self, interface: Interface) -> dict[bytes, bool]:
        """Of the hosts that send packets just now, by MAC: whether checksums are finished. Takes half a second."""
        return await asyncio.to_thread(wire.checksums, interface)

    def host_changes(self) -> AbstractContextManager[AsyncIterator[None]]:
        """Yields whenever interfaces, addresses or settings of this host have changed."""
        return bulk.host_changes()

    @asynccontextmanager
    async def events(self) -> AsyncIterator[AsyncIterator[Event]]:
        """What happens from now on to interfaces, neighbours and routes. The iterator raises EventsLostError."""
        with bulk.notifications(EVENT_GROUPS, [RTNLGRP_NEXTHOP], self._event_buffer_bytes) as messages:
            yield _events(messages)

    async def _dump(self, what: str) -> list[Any]:
        """Reads a whole table, again where it changed underneath so that entries may be missing."""
        for _ in range(10):
            messages = [message async for message in await getattr(self._netlink, what)("dump")]
            if not any(message["header"]["flags"] & NLM_F_DUMP_INTR for message in messages):
                break
        return messages

    async def _link(self, index: int) -> Any:
        try:
            return (await self._netlink.link("get", index=index))[0]
        except NetlinkError as error:
            raise NotCapable(f"the interface with index {index} is gone") from error

    async def _attach_or_fall_back(self, index: int, prog_fd: int, mode: AttachMode, flags: int) -> Attachment:
        if mode is not AttachMode.AUTO:
            await self._attach(index, prog_fd, mode, flags)
            return Attachment(mode)
        try:
            await self._attach(index, prog_fd, AttachMode.NATIVE, flags)
        except (ForeignProgram, NotPrivileged):
            raise
        except NotCapable as reason:
            await self._attach(index, prog_fd, AttachMode.GENERIC, flags)
            return Attachment(AttachMode.GENERIC, fallback=reason.message)
        return Attachment(AttachMode.NATIVE)

    async def _attach(
        self, index: int, prog_fd: int, mode: AttachMode, flags: int, expected_fd: int | None = None
    ) -> None:
        try:
            await self._set_xdp(index, prog_fd, XDP_FLAGS_MODE[mode] | flags, expected_fd)
        except NetlinkError as error:
            raise await self._explain(index, mode, error) from error

    async def _explain(self, index: int, mode: AttachMode, error: Any) -> XdplbError:
        link = await self._link(index)
        current = _attached(link)
        refusal = Refusal(error.code, str(error.args[1]))
        return attach_error(rtnl.interface(link), mode, refusal, current.prog_id if current else None)

    async def _mode_to_keep(self, index: int, mode: AttachMode) -> AttachMode:
        link = await self._link(index)
        current, name = _attached(link), link.get("ifname")
        if current is None:
            raise ForeignProgram(f"the XDP program that ran on {name} is gone", f"start anew: xdplb up {name}")
        if mode not in (AttachMode.AUTO, current.mode):
            raise NotCapable(
                f"{name} runs XDP in {current.mode} mode, which cannot become {mode} while it is attached",
                f"xdplb down {name}, then up with --mode {mode}",
            )
        return current.mode

    async def _set_xdp(self, index: int, prog_fd: int, flags: int, expected_fd: int | None = None) -> None:
        attributes: list[tuple[str, int]] = [("IFLA_XDP_FD", prog_fd), ("IFLA_XDP_FLAGS", flags)]
        if expected_fd is not None:
            attributes.append(("IFLA_XDP_EXPECTED_FD", expected_fd))
        await self._netlink.link("set", index=index, xdp={"attrs": attributes})


async def _events(messages: AsyncIterator[bulk.Message]) -> AsyncIterator[Event]:
    """Neighbours come in tens of thousands, all else by ones."""
    marshal = MarshalRtnl()
    async for message in messages:
        if message.kind in (bulk.RTM_NEWNEIGH, bulk.RTM_DELNEIGH):
            event: Event | None = bulk.neighbour_event(message)
            if event is not None:
                yield event
            continue
        for decoded in marshal.parse(bytes(message.whole)):
            if (event := rtnl.event(decoded)) is not None:
                yield event


def _attached(link: Any) -> Attached | None:
    xdp = link.get("xdp")
    prog_id = xdp.get_attr("IFLA_XDP_PROG_ID") if xdp else None
    if not prog_id:
        return None
    generic = xdp.get_attr("IFLA_XDP_ATTACHED") == "xdpgeneric"
    return Attached(prog_id, AttachMode.GENERIC if generic else AttachMode.NATIVE)


def _failed(what: str, error: Any) -> XdplbError:
    return _refused(what, error.code, str(error.args[1]))


def _refused(what: str, code: int, why: str = "") -> XdplbError:
    if code in (errno.EPERM, errno.EACCES):
        return NotPrivileged(what, "run as root, or with CAP_NET_ADMIN")
    return XdplbError(f"{what}: {why or os.strerror(code)}")
