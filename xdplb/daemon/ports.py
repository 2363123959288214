"""The interfaces of one instance as they are now. Known by index; names are labels, which may change."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress

from xdplb.daemon.ledger import Ledger
from xdplb.daemon.network import Network
from xdplb.daemon.upkeep import Difference
from xdplb.errors import NotCapable, XdplbError
from xdplb.net.links import Attached
from xdplb.net.next_hops import Interface

log = logging.getLogger(__name__)


class Ports:
    """`all` has each as it was last seen, the one that faces the clients first."""

    def __init__(self, network: Network, interfaces: Sequence[Interface], ledger: Ledger) -> None:
        self.all = list(interfaces)
        self.programs: dict[int, Attached | None] = {}
        """What runs on those that are there, by index, as last observed."""
        self.appeared: list[Interface] = []
        """Those that came up, came back or changed their MAC at the last look: the link may have forgotten us."""
        self._network = network
        self._ledger = ledger
        self._names = [{interface.name} for interface in interfaces]

    @property
    def present(self) -> list[Interface]:
        return [interface for interface in self.all if interface.index in self.programs]

    @property
    def front(self) -> Interface:
        """Faces the clients."""
        return self.all[0]

    @property
    def back(self) -> Interface:
        """Faces the backends."""
        return self.all[-1]

    async def look(self) -> list[Difference]:
        """Observes all. An interface that is gone is found again when one of its names comes back."""
        before, self.programs, self.appeared = list(self.all), {}, []
        found = []
        for place, known in enumerate(before):
            seen = await self._network.observe(known.index)
            if seen is None and (anew := await self._returned(place)) is not None:
                seen = await self._network.observe(anew.index)
            if seen is None:
                found.append(_gone(known))
                continue
            now = self.all[place] = seen.interface
            self.programs[now.index] = seen.attached
            self._names[place].add(now.name)
            self._tell(known, now)
            if not (now.up and now.carrier):
                found.append(_down(now))
        if [(i.index, i.name, i.mac) for i in before] != [(i.index, i.name, i.mac) for i in self.all]:
            self._ledger.know(self.all)
            with suppress(XdplbError):  # `down` finds it by its index as well
                self._ledger.save()
        return found

    async def _returned(self, place: int) -> Interface | None:
        others = {interface.index for interface in self.all}
        for name in sorted(self._names[place], key=lambda name: name != self.all[place].name):
            try:
                found = await self._network.interface(name)
            except NotCapable:
                continue
            if found.index not in others:
                self._ledger.forget(self.all[place].name)
                return found
        return None

    def _tell(self, known: Interface, now: Interface) -> None:
        usable, usable_before = now.up and now.carrier, known.up and known.carrier
        if known.index != now.index:
            log.warning("%s is back, with index %d instead of %d", now.name, now.index, known.index)
        elif known.name != now.name:
            log.info("%s is called %s now", known.name, now.name)
        if (known.index, known.mac, True) != (now.index, now.mac, usable_before) and usable:
            self.appeared.append(now)


def _gone(interface: Interface) -> Difference:
    return Difference(
        "interface-gone",
        interface.name,
        f"{interface.name} is gone: deleted, or moved to another network namespace",
        f"bring it back under that name; where it was moved, xdplb's program is still on it: "
        f"ip -n NAMESPACE link set dev {interface.name} xdp off",
    )


def _down(interface: Interface) -> Difference:
    why = "has no carrier" if interface.up else "is down"
    fix = "look at the cable, or its peer" if interface.up else f"ip link set dev {interface.name} up"
    return Difference("interface-down", interface.name, f"{interface.name} {why}", fix)
