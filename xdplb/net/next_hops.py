"""What the kernel says about reaching an address, as values; no sockets, no clocks.

`resolve` folds the kernel's answers (route, interface, neighbour) into the record the data plane needs: out of which
interface, from which MAC, to which MAC. `trouble` says whether a change of that record is bad news.
"""

from __future__ import annotations

import enum
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from xdplb.core.status import NextHop
from xdplb.model import Address, Network


class NextHopState(enum.StrEnum):
    REACHABLE = "reachable"
    RESOLVING = "resolving"
    """The neighbour has not answered yet."""
    FAILED = "failed"
    """The neighbour did not answer, or is not on an Ethernet link."""
    NO_ROUTE = "no-route"
    NO_CARRIER = "no-carrier"
    LOCAL = "local"
    """The address is one of this host's own: XDP cannot deliver to it."""


class Nud(enum.IntFlag):
    """Neighbour states: include/uapi/linux/neighbour.h."""

    INCOMPLETE = 0x01
    REACHABLE = 0x02
    STALE = 0x04
    DELAY = 0x08
    PROBE = 0x10
    FAILED = 0x20
    NOARP = 0x40
    PERMANENT = 0x80


HAS_MAC = Nud.REACHABLE | Nud.STALE | Nud.DELAY | Nud.PROBE | Nud.NOARP | Nud.PERMANENT
NO_MAC = bytes(6)


@dataclass(frozen=True, slots=True)
class Interface:
    """A network interface. `mac` is empty where it is not six bytes long (not Ethernet); `kind` is "" for hardware."""

    index: int
    name: str
    mac: bytes
    mtu: int
    kind: str
    up: bool
    carrier: bool
    master: int | None = None
    altnames: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NeighbourKey:
    ifindex: int
    address: Address


@dataclass(frozen=True, slots=True)
class Neighbour:
    """An entry of the neighbour table.

    `managed`: the kernel keeps it resolved. `ours`: it carries our protocol mark. `fixed`: somebody manages its MAC by
    hand or by protocol (permanent, externally learned), so it is not to be touched.
    """

    key: NeighbourKey
    state: Nud
    mac: bytes | None
    managed: bool = False
    ours: bool = False
    fixed: bool = False


@dataclass(frozen=True, slots=True)
class Route:
    """The kernel's answer for one destination. `source` is the address it would send from; `mtu` is the route's own."""

    ifindex: int
    gateway: Address | None
    source: Address | None
    mtu: int | None
    local: bool = False

    def neighbour_of(self, address: Address) -> NeighbourKey:
        return NeighbourKey(self.ifindex, self.gateway or address)


@dataclass(frozen=True, slots=True)
class Resolution:
    """How to reach `address`: leave by `ifindex` with `source_mac`, towards `via` at `dest_mac`.

    `dest_mac` is the last MAC known of this neighbour, None only where there never was one: `state` says whether it
    still answers. `source_address` is of the family of `address`. `mtu` is the smaller of the route's and the
    interface's, 0 without a route.
    """

    address: Address
    ifindex: int
    ifname: str
    source_mac: bytes
    dest_mac: bytes | None
    source_address: Address | None
    mtu: int
    state: NextHopState
    via: Address


@dataclass(frozen=True, slots=True)
class LinkEvent:
    """`interface` appeared or changed, or (`deleted`) is gone from this namespace."""

    interface: Interface
    deleted: bool = False


@dataclass(frozen=True, slots=True)
class NeighbourEvent:
    neighbour: Neighbour
    deleted: bool = False


@dataclass(frozen=True, slots=True)
class RouteEvent:
    """The way to every address within `network` may have changed."""

    network: Network


@dataclass(frozen=True, slots=True)
class NextHopEvent:
    """A next-hop object changed (`ip nexthop`): the routes that name it lead elsewhere, without an event of theirs."""


Event = LinkEvent | NeighbourEvent | RouteEvent | NextHopEvent


class EventsLostError(Exception):
    """Events were lost (the socket overflowed). Subscribe again and read everything anew."""


def within(addresses: Sequence[Address], network: Network) -> Sequence[Address]:
    """Those of `addresses` (sorted, all of the network's family) that lie in `network`."""
    return addresses[
        bisect_left(addresses, network.network_address) : bisect_right(addresses, network.broadcast_address)
    ]


def resolve(
    address: Address,
    route: Route | None,
    interface: Interface | None,
    neighbour: Neighbour | None,
    previous: Resolution | None = None,
) -> Resolution:
    """The record of `address`.

    `previous` is its last record: a neighbour that stops answering keeps its last MAC, so that a flushed table costs no
    packet, and one that failed stays failed while the kernel tries again.
    """
    if route is None or interface is None:
        return Resolution(address, 0, "", NO_MAC, None, None, 0, NextHopState.NO_ROUTE, address)
    via = route.neighbour_of(address).address
    same_hop = previous is not None and (previous.ifindex, previous.via) == (interface.index, via)
    mac = neighbour.mac if neighbour is not None and neighbour.state & HAS_MAC else None
    if mac is None and previous is not None and same_hop:
        mac = previous.dest_mac
    failed_before = previous is not None and same_hop and previous.state is NextHopState.FAILED
    return Resolution(
        address=address,
        ifindex=interface.index,
        ifname=interface.name,
        source_mac=interface.mac or NO_MAC,
        dest_mac=mac,
        source_address=route.source,
        mtu=min(route.mtu or interface.mtu, interface.mtu),
        state=_state(route, interface, neighbour, failed_before),
        via=via,
    )


def _state(route: Route, interface: Interface, neighbour: Neighbour | None, failed_before: bool) -> NextHopState:
    if route.local:
        return NextHopState.LOCAL
    if not interface.carrier:
        return NextHopState.NO_CARRIER
    if not interface.mac:
        return NextHopState.FAILED
    if neighbour is not None and neighbour.state & HAS_MAC:
        return NextHopState.REACHABLE if neighbour.mac is not None else NextHopState.FAILED
    if failed_before or (neighbour is not None and neighbour.state & Nud.FAILED):
        return NextHopState.FAILED
    return NextHopState.RESOLVING


_ALIVE = (NextHopState.REACHABLE, NextHopState.RESOLVING)


def trouble(previous: Resolution | None, current: Resolution) -> str | None:
    """Why the backend behind `current` may just have become unreachable; None where this change is no bad news."""
    if previous is None or previous.state not in _ALIVE or current.state in _ALIVE:
        return None
    match current.state:
        case NextHopState.FAILED:
            return f"{current.via} does not answer on {current.ifname}"
        case NextHopState.NO_CARRIER:
            return f"{current.ifname} has no carrier"
        case NextHopState.NO_ROUTE:
            return f"no route to {current.address} any more"
        case _:
            return f"{current.address} has become an address of this host"


def next_hop_of(record: Resolution | None) -> NextHop | None:
    """None where no frames can be sent: a neighbour that failed takes none."""
    if record is None or record.dest_mac is None:
        return None
    if record.state not in (NextHopState.REACHABLE, NextHopState.RESOLVING):
        return None
    return NextHop(record.ifindex, record.source_mac, record.dest_mac, record.source_address, record.mtu)
