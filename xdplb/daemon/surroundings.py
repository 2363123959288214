"""What XDP cannot do for the interfaces as they are: nothing here is mended, as it lies with other hosts."""

from __future__ import annotations

import logging

from xdplb.daemon.network import Network
from xdplb.daemon.ports import Ports
from xdplb.daemon.upkeep import Difference
from xdplb.model import AttachMode
from xdplb.net.next_hops import Interface

log = logging.getLogger(__name__)

FORGOTTEN_AFTER = 3
"""So many times in a row a sender was silent before it counts as well."""


class Surroundings:
    """Egress that does not take redirected frames, neighbours that leave checksums to a card that is not there."""

    def __init__(self, network: Network, ports: Ports) -> None:
        self._network = network
        self._ports = ports
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

    async def differences(self) -> list[Difference]:
        found = [_unfinished(port, mac) for port, mac in self._unfinished]
        for port in self._ports.present:
            attached = self._ports.programs[port.index]
            redirects = len(self._ports.all) > 1 or port.kind == "veth"
            if attached is None or attached.mode is not AttachMode.NATIVE or not redirects:
                continue
            if await self._network.takes_redirected(port.index) is False:
                found.append(_no_redirect(port))
        return found


def _no_redirect(port: Interface) -> Difference:
    peer = "the peer of a veth needs GRO: ethtool -K PEER gro off, then gro on, while it is up"
    other = f"see what the driver can: ethtool -i {port.name}"
    return Difference(
        "egress-no-redirect",
        port.name,
        f"{port.name} drops frames that XDP sends out of it",
        f"{peer if port.kind == 'veth' else other}; or use --mode generic (slower)",
    )


def _unfinished(port: Interface, mac: bytes) -> Difference:
    sender = mac.hex(":")
    return Difference(
        "checksums-unfinished",
        f"{port.name} {sender}",
        f"{sender} sends packets to {port.name} with unfinished checksums, which their receivers drop",
        "switch its offload off, on the host with that MAC: ethtool -K IFACE tx off",
    )
