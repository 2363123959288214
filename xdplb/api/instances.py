"""Which instance a name means: its first interface, whatever that is called by now."""

from __future__ import annotations

from xdplb.daemon import ledger
from xdplb.errors import XdplbError
from xdplb.net import bulk
from xdplb.paths import Instance, instances


def canonical(interface: str) -> str:
    """The name behind an alternative one; as given where this host has no such interface."""
    link = bulk.link_named(interface)
    return interface if link is None else link.name


def named(interface: str) -> Instance:
    """The instance on that interface: one that exists, whatever the interface was called when it started; else the one
    that would be.
    """
    instance = Instance(interface)
    link = bulk.link_named(interface)
    if instance.exists or link is None:
        return instance
    for other in instances():
        try:
            first = next(iter(ledger.load(other).interfaces.values()), None)
        except XdplbError:
            continue
        if first == (link.index, link.mac.hex(":")):
            return other
    return Instance(link.name)
