"""Messages of the kernel's rtnetlink, as pyroute2 decodes them, turned into our values. No sockets here.

`Any` is what pyroute2's messages are; it ends here.
"""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

from xdplb.net.next_hops import (
    Event,
    Interface,
    LinkEvent,
    Neighbour,
    NeighbourEvent,
    NeighbourKey,
    NextHopEvent,
    Nud,
    RouteEvent,
)

AF_UNSPEC, AF_INET, AF_INET6 = 0, 2, 10
ARPHRD_ETHER = 1
IFF_UP, IFF_LOWER_UP = 0x1, 0x10000
NTF_EXT_LEARNED = 0x10
NTF_EXT_MANAGED = 0x1
RTM_NEWNEXTHOP, RTM_DELNEXTHOP = 104, 105
EVERYWHERE = {AF_INET: ip_network("0.0.0.0/0"), AF_INET6: ip_network("::/0")}

NEIGHBOUR_PROTOCOL = 177
"""Our mark on neighbour entries (NDA_PROTOCOL), so that they are known as ours over a restart. Free in rt_protos."""


def interface(message: Any) -> Interface:
    mac = bytes.fromhex((message.get("address") or "").replace(":", ""))
    names = message.get("prop_list")
    return Interface(
        index=message["index"],
        name=message.get("ifname"),
        mac=mac if message["ifi_type"] == ARPHRD_ETHER and len(mac) == 6 else b"",
        mtu=message.get("mtu") or 0,
        kind=message.get(("linkinfo", "kind")) or "",
        up=bool(message["flags"] & IFF_UP),
        carrier=bool(message["flags"] & IFF_LOWER_UP),
        master=message.get("master"),
        altnames=tuple(names.altnames()) if names else (),
    )


def neighbour(message: Any) -> Neighbour | None:
    """None for entries that are not about IP addresses (bridge forwarding tables, proxies)."""
    if message["family"] not in EVERYWHERE or message.get("dst") is None:
        return None
    mac = bytes.fromhex((message.get("lladdr") or "").replace(":", ""))
    state = Nud(message["state"])
    return Neighbour(
        key=NeighbourKey(message["ifindex"], ip_address(message.get("dst"))),
        state=state,
        mac=mac if len(mac) == 6 else None,
        managed=bool((message.get("flags_ext") or 0) & NTF_EXT_MANAGED),
        ours=message.get("protocol") == NEIGHBOUR_PROTOCOL,
        fixed=bool(state & (Nud.PERMANENT | Nud.NOARP)) or bool(message["flags"] & NTF_EXT_LEARNED),
    )


def event(message: Any) -> Event | None:
    """What a notification is about; None for what we do not follow."""
    if message["header"]["type"] in (RTM_NEWNEXTHOP, RTM_DELNEXTHOP):
        return NextHopEvent()
    name = dict.get(message, "event")  # its own `get` would find the attribute IFLA_EVENT, a number
    if not isinstance(name, str):
        return None
    deleted = name.startswith("RTM_DEL")
    match name.removeprefix("RTM_NEW").removeprefix("RTM_DEL"):
        case "LINK" if message["family"] == AF_UNSPEC:  # AF_BRIDGE: a port left its bridge, not this host
            return LinkEvent(interface(message), deleted)
        case "NEIGH":
            entry = neighbour(message)
            return None if entry is None else NeighbourEvent(entry, deleted)
        case "ROUTE" if message["family"] in EVERYWHERE:
            destination = message.get("dst")
            if destination is None:
                return RouteEvent(EVERYWHERE[message["family"]])
            return RouteEvent(ip_network((destination, message["dst_len"]), strict=False))
        case "ADDR" | "RULE" if message["family"] in EVERYWHERE:  # source addresses, the choice of the table
            return RouteEvent(EVERYWHERE[message["family"]])
    return None
