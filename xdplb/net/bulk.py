"""What may come in thousands is read from rtnetlink here, at a few microseconds each; and the signal to look again.

Beside pyroute2, which takes a hundred times as long for a message. Functions block: they are for threads, and see the
network namespace of the thread that calls them. Numbers: include/uapi/linux/{netlink,rtnetlink,if_addr}.h.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_network
from itertools import islice
from typing import NamedTuple, TypeVar

from xdplb.errors import XdplbError
from xdplb.model import Address, Network
from xdplb.net import rtnl
from xdplb.net.next_hops import HAS_MAC, EventsLostError, Neighbour, NeighbourEvent, NeighbourKey, Nud, Route

_T = TypeVar("_T")

RTM_GETLINK, RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR, RTM_GETROUTE = 18, 20, 21, 22, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
NLM_F_REQUEST, NLM_F_ACK, NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x01, 0x04, 0x100, 0x200, 0x400
NLM_F_DUMP, NLM_F_DUMP_INTR = 0x300, 0x10
NLMSG_ERROR, NLMSG_DONE = 2, 3
IFLA_ADDRESS, IFLA_IFNAME, IFLA_ALT_IFNAME, IFNAMSIZ = 1, 3, 53, 16
IFLA_LINK, IFLA_MASTER, IFLA_LINKINFO, IFLA_LINK_NETNSID, IFLA_INFO_KIND = 5, 10, 18, 37, 1
IFA_ADDRESS, IFA_LOCAL, IFA_CACHEINFO, IFA_FLAGS = 1, 2, 6, 8
IFA_F_NODAD, FOR_EVER = 0x02, 0xFFFFFFFF
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PREFSRC, RTA_METRICS, RTA_VIA = 1, 4, 5, 7, 8, 18
RTAX_MTU = 2
NDA_DST, NDA_LLADDR, NDA_PROTOCOL, NDA_FLAGS_EXT = 1, 2, 12, 15
NTF_USE = 0x01
RTPROT_KERNEL = 2
RTN_UNICAST, RTN_LOCAL = 1, 2
RT_TABLE_LOCAL = 255
SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, NETLINK_GET_STRICT_CHK = 270, 1, 12
# no route at all, or one that says unreachable, prohibit, blackhole, throw; the interface gone or down
NO_ROUTE = {
    *(errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL, errno.EAGAIN),
    *(errno.ENODEV, errno.ENETDOWN),
}
BUFFER_BYTES = 1 << 18
EVENT_BYTES = 1 << 15
SO_RCVBUFFORCE = 33
BATCH = 64
"""Questions under way at once: their answers must fit into the receive buffer."""
ATTEMPTS = 10
# RTMGRP_LINK, addresses of both families, and RTNLGRP_{IPV4,IPV6}_NETCONF: forwarding, rp_filter
HOST_GROUPS = 0x1 | 0x10 | 0x100 | 1 << 23 | 1 << 24

_libc = ctypes.CDLL(None, use_errno=True)
_HEADER = struct.Struct("=IHHII")
_LINK = struct.Struct("=BBHiII")
_ADDRESS = struct.Struct("=BBBBI")
_ROUTE = struct.Struct("=BBBBBBBBI")
_WORD = struct.Struct("=I")
_NEIGHBOUR = struct.Struct("=BBHiHBB")
_LENGTH_AND_KIND = struct.Struct("=IH")
# A neighbour with a MAC as neigh_fill_info (net/core/neighbour.c) writes it: family and interface; state; flags and
# type; address; MAC; and the heads of two attributes, of counts and of times.
_RESOLVED: dict[int, struct.Struct] = {
    socket.AF_INET: struct.Struct("=8sH2s8s12s4s4x4s16x"),
    socket.AF_INET6: struct.Struct("=8sH2s20s12s4s4x4s16x"),
}
_LLADDR, _PROBES, _CACHEINFO = (struct.pack("=HH", size, kind) for size, kind in ((10, 2), (8, 4), (20, 3)))
GATHER_S = 0.02
"""How long notifications are let come together: some thousands come each second while nothing happens."""


def addresses() -> set[Address]:
    """All addresses of this host, of all its interfaces."""
    return {address for message in _dump(RTM_GETADDR, bytes(_ADDRESS.size)) if (address := _local(message)) is not None}


@dataclass(frozen=True, slots=True)
class Link:
    index: int
    name: str
    mac: bytes


@dataclass(frozen=True, slots=True)
class Device:
    """An interface among others. `mac` is empty where it is not Ethernet; `below` is the one that it stands on, if that
    is in this network namespace; `master` is the bond or bridge that it belongs to.
    """

    index: int
    name: str
    kind: str
    mac: bytes
    up: bool
    below: int | None
    master: int | None


def local_networks() -> set[Network]:
    """What this host takes for itself: its addresses, and networks that are routed to it as local (AnyIP). Not the
    loopback networks, for which nothing may come from outside.
    """
    found = set()
    for family in (socket.AF_INET, socket.AF_INET6):
        for message in _dump(RTM_GETROUTE, _ROUTE.pack(family, 0, 0, 0, RT_TABLE_LOCAL, 0, 0, 0, 0), strict=True):
            _, length, _, _, _, _, _, kind, _ = _ROUTE.unpack_from(message)
            if kind != RTN_LOCAL:
                continue
            everything = bytes(4 if family == socket.AF_INET else 16)
            packed = bytes(dict(attributes(message, _ROUTE.size)).get(RTA_DST, everything))
            found.add(ip_network((packed, length)))
    return {network for network in found if not network.is_loopback}


def link_named(name: str) -> Link | None:
    """By its name or an alternative one."""
    text = name.encode()
    body = bytes(_LINK.size) + attribute(IFLA_IFNAME if len(text) < IFNAMSIZ else IFLA_ALT_IFNAME, text + b"\0")
    with _socket() as requests:
        requests.settimeout(5)
        requests.send(_HEADER.pack(_HEADER.size + len(body), RTM_GETLINK, NLM_F_REQUEST, 1, 0) + body)
        message = next(messages(memoryview(requests.recv(BUFFER_BYTES))))
    if message.kind == NLMSG_ERROR:
        return None
    fields = dict(attributes(message.body, _LINK.size))
    mac = bytes(fields.get(IFLA_ADDRESS, b""))
    ethernet = _LINK.unpack_from(message.body)[2] == rtnl.ARPHRD_ETHER and len(mac) == 6
    now = bytes(fields[IFLA_IFNAME]).rstrip(b"\0").decode()
    return Link(_LINK.unpack_from(message.body)[3], now, mac if ethernet else b"")


def devices() -> dict[int, Device]:
    """All interfaces of this network namespace, by index."""
    found = (_device(message) for message in _dump(RTM_GETLINK, bytes(_LINK.size)))
    return {device.index: device for device in found}


def _device(message: memoryview) -> Device:
    _, _, hardware, index, flags, _ = _LINK.unpack_from(message)
    fields = dict(attributes(message, _LINK.size))
    mac = bytes(fields.get(IFLA_ADDRESS, b""))
    kind = dict(attributes(fields.get(IFLA_LINKINFO, memoryview(b"")), 0)).get(IFLA_INFO_KIND)
    below, master = fields.get(IFLA_LINK), fields.get(IFLA_MASTER)
    return Device(
        index=index,
        name=_text(fields[IFLA_IFNAME]),
        kind=_text(kind) if kind else "",
        mac=mac if hardware == rtnl.ARPHRD_ETHER and len(mac) == 6 else b"",
        up=bool(flags & rtnl.IFF_UP),
        below=_WORD.unpack(below)[0] if below and IFLA_LINK_NETNSID not in fields else None,
        master=_WORD.unpack(master)[0] if master else None,
    )


def _text(raw: memoryview) -> str:
    return bytes(raw).rstrip(b"\0").decode(errors="surrogateescape")


def routes(addresses: Collection[Address]) -> dict[Address, Route | None]:
    """The way a packet from this host to each address would take; None where there is none."""
    return {address: _route(address, answer) for address, answer in _asked(addresses, _route_request)}


def _asked(items: Iterable[_T], request: Callable[[int, _T], bytes]) -> Iterator[tuple[_T, Message]]:
    """The one answer to each request, which is built from its number and its item."""
    waiting = iter(items)
    with _socket() as requests:
        requests.settimeout(5)
        requests.bind((0, 0))
        while batch := list(islice(waiting, BATCH)):
            requests.send(b"".join(request(number, item) for number, item in enumerate(batch)))
            missing = len(batch)
            while missing:
                for message in messages(memoryview(requests.recv(BUFFER_BYTES))):
                    missing -= 1
                    yield batch[message.number], message


def _route_request(number: int, address: Address) -> bytes:
    packed = address.packed
    body = _ROUTE.pack(_family(address), 8 * len(packed), 0, 0, 0, 0, 0, 0, 0) + attribute(RTA_DST, packed)
    return _HEADER.pack(_HEADER.size + len(body), RTM_GETROUTE, NLM_F_REQUEST, number, 0) + body


def _family(address: Address) -> int:
    return socket.AF_INET if address.version == 4 else socket.AF_INET6


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value.ljust((len(value) + 3) & ~3, b"\0")


def _route(address: Address, message: Message) -> Route | None:
    """None for routes that lead to no single host: unreachable, blackhole, broadcast, multicast."""
    if message.kind == NLMSG_ERROR:
        if message.error not in NO_ROUTE:
            raise XdplbError(f"cannot look up the route to {address}: {os.strerror(message.error)}")
        return None
    fields = dict(attributes(message.body, _ROUTE.size))
    kind = message.body[7]
    if kind not in (RTN_UNICAST, RTN_LOCAL) or RTA_OIF not in fields:
        return None
    via = fields.get(RTA_VIA)
    mtu = dict(attributes(fields.get(RTA_METRICS, memoryview(b"")), 0)).get(RTAX_MTU)
    return Route(
        ifindex=_WORD.unpack(fields[RTA_OIF])[0],
        gateway=_address(via[2:] if via else fields.get(RTA_GATEWAY)),
        source=_address(fields.get(RTA_PREFSRC)),
        mtu=_WORD.unpack(mtu)[0] if mtu else None,
        local=kind == RTN_LOCAL,
    )


def add_addresses(index: int, addresses: Iterable[Address]) -> dict[Address, int]:
    """Each alone (/32, /128), usable at once. The errno of each that the kernel refused.

    An IPv6 address is added as deprecated (preferred lifetime 0), so that the host does not choose it as the source of
    its own connections: RFC 6724, rule 3.
    """

    def request(number: int, address: Address) -> bytes:
        body = b""
        if address.version == 6:
            body = attribute(IFA_FLAGS, _WORD.pack(IFA_F_NODAD))
            body += attribute(IFA_CACHEINFO, struct.pack("=4I", 0, FOR_EVER, 0, 0))
        return _address_request(number, RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, index, address) + body

    return _refused(addresses, lambda number, address: _with_length(request(number, address)))


def remove_addresses(index: int, addresses: Iterable[Address]) -> dict[Address, int]:
    """The errno of each that the kernel refused."""
    return _refused(
        addresses, lambda number, address: _with_length(_address_request(number, RTM_DELADDR, 0, index, address))
    )


def _address_request(number: int, kind: int, flags: int, index: int, address: Address) -> bytes:
    body = _ADDRESS.pack(_family(address), address.max_prefixlen, 0, 0, index)
    body += attribute(IFA_LOCAL, address.packed) + attribute(IFA_ADDRESS, address.packed)
    return _HEADER.pack(0, kind, NLM_F_REQUEST | NLM_F_ACK | flags, number, 0) + body


def _with_length(message: bytes) -> bytes:
    return _WORD.pack(len(message)) + message[_WORD.size :]


def neighbours() -> list[Neighbour]:
    """The whole table, without what is not about IP addresses (bridge forwarding tables, proxies)."""
    entries = (_neighbour(message) for message in _dump(RTM_GETNEIGH, bytes(_NEIGHBOUR.size)))
    return [entry for entry in entries if entry is not None]


def _neighbour(message: memoryview) -> Neighbour | None:
    family, _, _, ifindex, state, flags, _ = _NEIGHBOUR.unpack_from(message)
    fields = dict(attributes(message, _NEIGHBOUR.size))
    address = _address(fields.get(NDA_DST)) if family in (socket.AF_INET, socket.AF_INET6) else None
    if address is None:
        return None
    mac = bytes(fields.get(NDA_LLADDR, b""))
    protocol, more = fields.get(NDA_PROTOCOL), fields.get(NDA_FLAGS_EXT)
    return Neighbour(
        key=NeighbourKey(ifindex, address),
        state=Nud(state),
        mac=mac if len(mac) == 6 else None,
        managed=bool(more and _WORD.unpack(more)[0] & rtnl.NTF_EXT_MANAGED),
        ours=bool(protocol and protocol[0] == rtnl.NEIGHBOUR_PROTOCOL),
        fixed=bool(state & (Nud.PERMANENT | Nud.NOARP) or flags & rtnl.NTF_EXT_LEARNED),
    )


def keep_resolved(keys: Iterable[NeighbourKey]) -> dict[NeighbourKey, int]:
    """Has neighbours resolved now, kept so, and marked as ours. The errno of each that the kernel refused."""
    attributes = {NDA_PROTOCOL: bytes([rtnl.NEIGHBOUR_PROTOCOL]), NDA_FLAGS_EXT: _WORD.pack(rtnl.NTF_EXT_MANAGED)}
    return _refused(keys, lambda number, key: _neighbour_request(number, key, RTM_NEWNEIGH, attributes))


def release(entries: Iterable[Neighbour]) -> dict[Neighbour, int]:
    """Takes our mark off: a resolved entry becomes an ordinary one again, an unresolved one goes. Errors likewise."""

    def request(number: int, entry: Neighbour) -> bytes:
        if entry.state & HAS_MAC:
            return _neighbour_request(number, entry.key, RTM_NEWNEIGH, {NDA_PROTOCOL: bytes([RTPROT_KERNEL])})
        return _neighbour_request(number, entry.key, RTM_DELNEIGH, {})

    return _refused(entries, request)


def _refused(items: Iterable[_T], request: Callable[[int, _T], bytes]) -> dict[_T, int]:
    return {item: answer.error for item, answer in _asked(items, request) if answer.error}


def _neighbour_request(number: int, key: NeighbourKey, kind: int, attributes: dict[int, bytes]) -> bytes:
    creates = kind == RTM_NEWNEIGH
    flags = NLM_F_REQUEST | NLM_F_ACK | (NLM_F_CREATE | NLM_F_REPLACE if creates else 0)
    body = _NEIGHBOUR.pack(_family(key.address), 0, 0, key.ifindex, 0, NTF_USE if creates else 0, 0)
    body += attribute(NDA_DST, key.address.packed)
    body += b"".join(attribute(name, value) for name, value in attributes.items())
    return _HEADER.pack(_HEADER.size + len(body), kind, flags, number, 0) + body


@contextmanager
def notifications(groups: int, further: Iterable[int], buffer_bytes: int) -> Iterator[AsyncIterator[Message]]:
    """What these groups are told (RTMGRP_* as bits, `further` by number), but for news of neighbours that are none. The
    iterator raises EventsLostError.
    """
    with _socket(socket.SOCK_NONBLOCK) as subscription:
        subscription.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, buffer_bytes)
        subscription.bind((0, groups))
        for group in further:
            subscription.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
        yield _received(subscription)


async def _received(subscription: socket.socket) -> AsyncIterator[Message]:
    """What comes within `GATHER_S` after a notification is read together: to wake up costs more than to read one."""
    loop, readable, several = asyncio.get_running_loop(), asyncio.Event(), _Several(subscription.fileno())
    known = KnownNeighbours()
    try:
        while True:
            loop.add_reader(subscription, readable.set)
            await readable.wait()
            readable.clear()
            loop.remove_reader(subscription)
            while found := several.receive():
                for data in found:
                    if not known.repeated_by(data):
                        for message in messages(data):
                            yield message
                await asyncio.sleep(0)
            await asyncio.sleep(GATHER_S)
    finally:
        loop.remove_reader(subscription)


class KnownNeighbours:
    """Of tens of thousands of neighbours that are kept resolved, each is confirmed anew every half a minute, in three
    notifications of which none says anything new. They are told here, for a microsecond each.
    """

    def __init__(self) -> None:
        self._known: dict[bytes, tuple[bytes, int]] = {}
        """By family, interface and address: all else that is told but times and counts, and states that mean the same.
        """

    def repeated_by(self, data: memoryview) -> bool:
        """Whether this datagram says nothing that was not told before."""
        if len(data) < _HEADER.size + _NEIGHBOUR.size:
            return False
        length, kind = _LENGTH_AND_KIND.unpack_from(data)
        layout = _RESOLVED.get(data[_HEADER.size])
        if kind not in (RTM_NEWNEIGH, RTM_DELNEIGH) or layout is None:
            return False
        if length != len(data):  # several in one, which does not happen
            self._known.clear()
            return False
        if length < _HEADER.size + layout.size or kind == RTM_DELNEIGH:
            self._forget(data)
            return False
        link, state, more, address, mac, probes, cache = layout.unpack_from(data, _HEADER.size)
        if (mac[:4], probes, cache) != (_LLADDR, _PROBES, _CACHEINFO):
            self._forget(data)
            return False
        where, content = link + address, more + mac + bytes(data[_HEADER.size + layout.size :])
        before = self._known.get(where)
        if before is not None and before[0] == content and before[1] & state:
            return True
        entry = _neighbour(data[_HEADER.size :])
        self._known[where] = content, _same(state, managed=entry is not None and entry.managed)
        return False

    def _forget(self, data: memoryview) -> None:
        at = _HEADER.size + _NEIGHBOUR.size
        size = 8 if data[_HEADER.size] == socket.AF_INET else 20
        self._known.pop(bytes(data[_HEADER.size : _HEADER.size + 8]) + bytes(data[at : at + size]), None)


def _same(state: int, managed: bool) -> int:
    """The states that mean the same of a neighbour whose MAC stays. Who manages it asks it again where it is stale."""
    confirmed = Nud.REACHABLE | Nud.DELAY | Nud.PROBE | (Nud.STALE if managed else Nud(0))
    return confirmed if state & confirmed else 0


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Mmsghdr(ctypes.Structure):
    """struct mmsghdr, recvmmsg(2)."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("iovec", ctypes.POINTER(_Iovec)),
        ("iovecs", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
        ("pad", ctypes.c_int),
        ("length", ctypes.c_uint32),
    )


class _Several:
    """Receives many datagrams at once. Each system call lets another thread compute, for milliseconds where that
    does not wait; one for each of thousands of notifications would be too many.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._buffer = ctypes.create_string_buffer(BATCH * EVENT_BYTES)
        base = ctypes.addressof(self._buffer)
        self._iovecs = (_Iovec * BATCH)(*(_Iovec(base + n * EVENT_BYTES, EVENT_BYTES) for n in range(BATCH)))
        self._headers = (_Mmsghdr * BATCH)()
        for header, iovec in zip(self._headers, self._iovecs, strict=True):
            header.iovec, header.iovecs = ctypes.pointer(iovec), 1

    def receive(self) -> list[memoryview]:
        """Valid until the next call. EventsLostError where some are missing."""
        count = _libc.recvmmsg(self._descriptor, self._headers, BATCH, socket.MSG_DONTWAIT, None)
        if count < 0:
            code = ctypes.get_errno()
            if code in (errno.EAGAIN, errno.EINTR):
                return []
            raise EventsLostError(os.strerror(code))
        found = []
        whole = memoryview(self._buffer).cast("B")
        for number, header in enumerate(self._headers[:count]):
            if header.flags & socket.MSG_TRUNC:
                raise EventsLostError("a message is too long")
            found.append(whole[number * EVENT_BYTES :][: header.length])
        return found


def neighbour_event(message: Message) -> NeighbourEvent | None:
    """Of RTM_NEWNEIGH and RTM_DELNEIGH; None as for `neighbours`."""
    entry = _neighbour(message.body)
    return None if entry is None else NeighbourEvent(entry, message.kind == RTM_DELNEIGH)


@contextmanager
def host_changes() -> Iterator[AsyncIterator[None]]:
    """Yields whenever interfaces, addresses or settings of this host have changed; which ones, it does not say."""
    with _socket(socket.SOCK_NONBLOCK) as subscription:
        subscription.bind((0, HOST_GROUPS))
        yield _signals(subscription)


async def _signals(subscription: socket.socket) -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()
    while True:
        with suppress(OSError):  # ENOBUFS: something was lost, so there is something to look at
            await loop.sock_recv(subscription, BUFFER_BYTES)
        yield


def _local(message: memoryview) -> Address | None:
    fields = dict(attributes(message, _ADDRESS.size))
    raw = fields.get(IFA_LOCAL) or fields.get(IFA_ADDRESS)  # IFA_ADDRESS is the peer's on point-to-point links
    return _address(raw)


def _address(raw: memoryview | None) -> Address | None:
    if raw is None:
        return None
    return IPv4Address(bytes(raw)) if len(raw) == 4 else IPv6Address(bytes(raw))


def _dump(kind: int, header: bytes, strict: bool = False) -> list[memoryview]:
    """The payloads of a whole table, read again where it changed underneath so that entries may be missing. With
    `strict` the kernel keeps to what the header asks for.
    """
    found: list[memoryview] = []
    with _socket() as requests:
        requests.settimeout(5)
        requests.bind((0, 0))
        if strict:
            requests.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1)
        for _ in range(ATTEMPTS):
            flags = NLM_F_REQUEST | NLM_F_DUMP
            requests.send(_HEADER.pack(_HEADER.size + len(header), kind, flags, 1, 0) + header)
            found, interrupted = answers(requests)
            if not interrupted:
                break
    return found


def answers(requests: socket.socket) -> tuple[list[memoryview], bool]:
    """The payloads of all messages of a dump, and whether the table changed underneath."""
    found: list[memoryview] = []
    interrupted = False
    while True:
        for message in messages(memoryview(requests.recv(BUFFER_BYTES))):
            interrupted |= bool(message.flags & NLM_F_DUMP_INTR)
            if message.kind == NLMSG_DONE:
                return found, interrupted
            if message.kind == NLMSG_ERROR:
                raise XdplbError(f"the kernel's tables cannot be read: {os.strerror(message.error)}")
            found.append(message.body)


class Message(NamedTuple):
    kind: int
    flags: int
    number: int
    whole: memoryview
    """With its header."""

    @property
    def body(self) -> memoryview:
        return self.whole[_HEADER.size :]

    @property
    def error(self) -> int:
        """The errno of an NLMSG_ERROR."""
        return -int(struct.unpack_from("=i", self.body)[0])


def messages(data: memoryview) -> Iterator[Message]:
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, flags, number, _ = _HEADER.unpack_from(data, offset)
        yield Message(kind, flags, number, data[offset : offset + length])
        offset += (length + 3) & ~3


def attributes(message: memoryview, offset: int) -> Iterator[tuple[int, memoryview]]:
    while offset + 4 <= len(message):
        length, kind = struct.unpack_from("=HH", message, offset)
        if length < 4:
            return
        yield kind & 0x3FFF, message[offset + 4 : offset + length]
        offset += (length + 3) & ~3


def _socket(flags: int = 0) -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | flags, socket.NETLINK_ROUTE)
