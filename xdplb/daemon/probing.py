"""Checks through services' addresses: which source port stands for which backend, and the way that XDP sends it.

A port is a backend's as long as it is checked, over reloads too. Lives on the event loop's thread.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from heapq import heappop, heappush

import numpy as np

from xdplb.abi import FIRST_PROBE_PORT, MAX_PROBES, ForwardCode
from xdplb.checks.endpoint import Via
from xdplb.core.address_table import address_words
from xdplb.core.desired import DesiredBackend
from xdplb.core.entries import Tunnels, backend_entry
from xdplb.core.status import NextHop
from xdplb.daemon.probe_link import Ends
from xdplb.dataplane.codec import network_order
from xdplb.dataplane.loader import Dataplane
from xdplb.model import Address, Backend, Config, Service

log = logging.getLogger(__name__)

_Owner = tuple[Service, Backend]
_Identity = tuple[object, ...]


class Probing:
    """`device` is the interface that sockets of such checks are bound to."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._ports: dict[_Identity, int] = {}
        self._free = list(range(FIRST_PROBE_PORT, FIRST_PROBE_PORT + MAX_PROBES))
        self._owners: dict[int, _Owner] = {}
        self._plane: Dataplane | None = None
        self._ends: Ends | None = None
        self._tunnels = Tunnels()
        self._written: dict[int, tuple[_Owner, NextHop | None]] = {}
        self._vips: frozenset[Address] = frozenset()

    def way(self, service: Service, backend: Backend) -> Via | None:
        """The way to a backend of a configuration, in force or not. None where all ports are taken."""
        identity = (service.name, service.listen, service.forward, service.gue_port, backend.name, backend.address)
        port = self._ports.get(identity)
        if port is None:
            if not self._free:
                log.warning("%s/%s: checked directly, as all ports for it are taken", service.name, backend.name)
                return None
            port = self._ports[identity] = heappop(self._free)
        self._owners[port] = service, backend
        return Via(service.listen.address, self._device, port)

    def keep(self, vias: Collection[Via]) -> None:
        """The ports of all others are free again."""
        used = {via.source_port for via in vias}
        for port in self._owners.keys() - used:
            self.put(port, None)
            heappush(self._free, port)
        self._owners = {port: owner for port, owner in self._owners.items() if port in used}
        self._ports = {identity: port for identity, port in self._ports.items() if port in used}

    def begin(self, plane: Dataplane, ends: Ends | None, config: Config) -> None:
        """Packets meet the programs of `plane` and the services of `config` now. `put` follows for all ways."""
        self._plane, self._ends = plane, ends
        self._tunnels = Tunnels(config.tunnel_source4, config.tunnel_source6)
        self._written = {}
        if ends is not None:  # an earlier daemon gave the ports to others
            of_nobody = np.ones(MAX_PROBES, bool)
            of_nobody[[port - FIRST_PROBE_PORT for port in self._owners]] = False
            for half in ("hi", "lo"):
                plane.probe_ways["service"]["address"][half][of_nobody] = 0
        self._vips = frozenset(s.listen.address for s in config.services if s.probes_by_vip and ends is not None)

    def leads(self, via: Via | None) -> bool:
        """Whether a check on this way can have an answer."""
        return via is None or via.address in self._vips

    def put(self, port: int, next_hop: NextHop | None) -> None:
        """Where frames of the check of this port go now."""
        if self._plane is None or self._ends is None:
            return
        wanted = self._owners[port], next_hop
        if self._written.get(port) == wanted:
            return
        self._written[port] = wanted
        way = self._plane.probe_ways[port - FIRST_PROBE_PORT]
        way["service"]["address"] = (0, 0)  # nobody's while it changes
        if next_hop is None:
            return
        service, backend = self._owners[port]
        entry = backend_entry(service, DesiredBackend(backend, 1, True, False, next_hop, False), 0, self._tunnels)
        way["service"]["forward"] = ForwardCode[service.forward.name]
        way["service"]["gue_port"] = network_order(service.gue_port)
        for name in ("address", "source"):
            address = getattr(entry, name)
            way["backend"][name] = address_words(address) if address is not None else (0, 0)
        way["backend"]["source_spread"] = network_order(entry.source_spread, 4)
        way["backend"]["ifindex"] = entry.ifindex
        way["backend"]["macs"] = np.frombuffer(entry.macs, np.uint8)
        way["backend"]["mtu"] = entry.mtu
        way["backend"]["flags"] = int(entry.flags)
        way["macs"] = np.frombuffer(self._ends.inner.mac + self._ends.outer.mac, np.uint8)
        way["ifindex"] = self._ends.outer.index
        way["service"]["address"] = address_words(service.listen.address)
