"""Which ports a service really serves: an exact port beats a range, a range beats all ports. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from xdplb.model import Address, Config, Listen, Protocol

Range = tuple[int, int]
"""First and last port."""


@dataclass(frozen=True, slots=True)
class Ports:
    """Ports of one address and protocol, as ranges that do not meet, in order."""

    address: Address
    protocol: Protocol
    ranges: tuple[Range, ...]

    def __bool__(self) -> bool:
        return bool(self.ranges)

    def without(self, taken: Iterable[Range]) -> Self:
        left = list(self.ranges)
        for first, last in taken:
            left = [
                part
                for low, high in left
                for part in ((low, min(high, first - 1)), (max(low, last + 1), high))
                if part[0] <= part[1]
            ]
        return type(self)(self.address, self.protocol, tuple(left))

    def within(self, other: Ports) -> Self:
        """Those that `other` has too."""
        if (self.address, self.protocol) != (other.address, other.protocol):
            return type(self)(self.address, self.protocol, ())
        common = ((max(low, first), min(high, last)) for low, high in self.ranges for first, last in other.ranges)
        return type(self)(self.address, self.protocol, tuple(part for part in common if part[0] <= part[1]))

    @property
    def count(self) -> int:
        return sum(last - first + 1 for first, last in self.ranges)


def served(config: Config) -> dict[str, Ports]:
    """By service, the ports that it listens on and no more exact one takes."""
    together: defaultdict[tuple[Address, Protocol], list[Listen]] = defaultdict(list)
    for service in config.services:
        together[service.listen.address, service.listen.protocol].append(service.listen)
    found = {}
    for service in config.services:
        listen = service.listen
        ports = Ports(listen.address, listen.protocol, ((listen.first_port, listen.last_port),))
        beaten_by = [] if listen.single_port else together[listen.address, listen.protocol]
        found[service.name] = ports.without(
            (other.first_port, other.last_port) for other in beaten_by if _rank(other) < _rank(listen)
        )
    return found


def _rank(listen: Listen) -> int:
    return 0 if listen.single_port else 2 if listen.all_ports else 1
