"""What XDP cannot do for the interfaces as they are: nothing here is mended, as it lies with other hosts."""

from __future__ import annotations

import logging

from xdplb.daemon.known_links import KnownLinks
from xdplb.daemon.network import Network
from xdplb.daemon.ports import Ports
from xdplb.daemon.upkeep import Difference
from xdplb.model import Forward
from xdplb.net.bulk import Device
from xdplb.net.next_hops import Interface

log = logging.getLogger(__name__)

FORGOTTEN_AFTER = 3
"""So many times in a row a sender was silent before it counts as well."""


class Surroundings:
    """Egress that does not take redirected frames, neighbours that leave checksums to a card that is not there."""

    def __init__(self, network: Network, ports: Ports, links: KnownLinks) -> None:
        self._network = network
        self._ports = ports
        self._links = links
        self._unfinished: dict[tuple[Interface, bytes], int] = {}

    async def listen(self) -> None:
        """Looks at packets that arrive now, for half a second on each interface."""
        before, self._unfinished = self._unfinished, {}
        for port in self._ports.present:
            try:
                seen = await self._network.checksums(port)
            except OSError as error:  # it went away
                log.debug("%s: %s", port.name, error)
                continue
            for mac, finished in seen.items():
                if not finished:
                    self._unfinished[port, mac] = FORGOTTEN_AFTER
            for (where, mac), patience in before.items():
                if where == port and mac not in seen and patience > 1:
                    self._unfinished[port, mac] = patience - 1

    def differences(self) -> list[Difference]:
        found = [_unfinished(port, mac) for port, mac in self._unfinished]
        for index, modes in self._links.used_in_vain().items():
            found.append(_no_redirect(self._links.devices[index], modes))
        for index in self._links.without_replies():
            found.append(_past(self._links.devices[index], self._ports))
        return found


def _no_redirect(device: Device, modes: frozenset[Forward]) -> Difference:
    peer = "the peer of a veth needs GRO: ethtool -K PEER gro off, then gro on, while it is up"
    other = f"most cards take frames where an XDP program runs: name {device.name} at xdplb up as well"
    lost = "; backends of dsr behind it take no traffic" if Forward.DSR in modes else ""
    return Difference(
        "egress-no-redirect",
        device.name,
        f"{device.name} takes no frames from XDP: the kernel forwards what leaves by it, which is slower{lost}",
        f"{peer if device.kind == 'veth' else other}; or use --mode generic (slower)",
    )


def _past(device: Device, ports: Ports) -> Difference:
    names = " ".join([*(port.name for port in ports.all), device.name])
    return Difference(
        "replies-untranslated",
        device.name,
        f"replies of nat backends behind {device.name} come in where xdplb does not run: nobody translates them",
        f"start it there as well: xdplb up {names}",
    )


def _unfinished(port: Interface, mac: bytes) -> Difference:
    sender = mac.hex(":")
    return Difference(
        "checksums-unfinished",
        f"{port.name} {sender}",
        f"{sender} sends packets to {port.name} with unfinished checksums, which their receivers drop",
        "switch its offload off, on the host with that MAC: ethtool -K IFACE tx off",
    )
