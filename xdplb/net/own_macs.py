"""To which MAC addresses an interface takes frames: as the kernel does (eth_type_trans, ip_rcv). Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

ABOVE = frozenset({"vlan", "macvlan", "ipvlan", "macsec"})
"""Stand on another interface, and take frames to their own MAC address from it. Not macvtap: that is a guest's."""
MASTERS = frozenset({"bond", "team", "bridge", "vrf"})
"""Take what their members receive, under their own MAC address."""
BUNDLES = frozenset({"bond", "team"})
"""What runs on them sees frames as their members' (native XDP)."""


class Device(Protocol):
    """`net.bulk.Device`, as far as it matters here."""

    @property
    def index(self) -> int: ...
    @property
    def kind(self) -> str: ...
    @property
    def mac(self) -> bytes: ...
    @property
    def up(self) -> bool: ...
    @property
    def below(self) -> int | None: ...
    @property
    def master(self) -> int | None: ...


def own_macs(devices: Mapping[int, Device], index: int) -> dict[int, frozenset[bytes] | None]:
    """By the interface that a frame comes in by: this one, and the members of a bond. None: they cannot be told."""
    if index not in devices:
        return {}
    found = {index: _reached(devices, devices[index])}
    if devices[index].kind in BUNDLES:
        found |= {each.index: _reached(devices, each) for each in devices.values() if each.master == index}
    return found


def above(devices: Mapping[int, Device], index: int) -> frozenset[int]:
    """The interface and those that get what it receives, up or not."""
    seen, waiting = {index}, [index]
    while waiting:
        here = waiting.pop()
        found = {each.index for each in devices.values() if each.below == here and each.kind in ABOVE}
        if here in devices and (master := devices[here].master) is not None:
            found.add(master)
        waiting += found - seen
        seen |= found
    return frozenset(seen)


def _reached(devices: Mapping[int, Device], device: Device) -> frozenset[bytes] | None:
    """The addresses of the interface and of all above it that are up. None where one of them is of an unknown kind, as
    Open vSwitch is: whose frames it takes does not show. The same goes for an interface that has none.
    """
    if not device.mac:
        return None
    seen = {device.index}
    waiting, macs = [device], set()
    while waiting:
        here = waiting.pop()
        macs.add(here.mac)
        above = [each for each in devices.values() if each.below == here.index and each.kind in ABOVE]
        if here.master is not None:
            master = devices.get(here.master)
            if master is None or master.kind not in MASTERS:
                return None
            above.append(master)
        for each in above:
            if each.up and each.index not in seen:
                seen.add(each.index)
                waiting.append(each)
    return frozenset(macs - {b""})
