"""The map of tunnels: where encapsulated packets go, and what routers on the way reported of their size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address

import numpy as np
from numpy.typing import NDArray

from xdplb import abi
from xdplb.core.address_table import address_words
from xdplb.dataplane import syscall
from xdplb.dataplane.codec import Codec, Value, network_order
from xdplb.dataplane.loader import Dataplane
from xdplb.model import Address


@dataclass(frozen=True, slots=True)
class Report:
    """`mtu` is the largest outer packet that goes the whole way, as somebody reported at `tick`."""

    mtu: int
    tick: int

    def holds(self, tick: int) -> bool:
        """Not for ever: ways change, and nobody reports that a packet would have been small enough."""
        return tick - self.tick & 0xFFFFFFFF < abi.TUNNEL_MTU_TICKS


class TunnelMap:
    """One generation's."""

    def __init__(self, plane: Dataplane) -> None:
        self._map = plane.fd("tunnels")
        self._layout = plane.layout("tunnels")
        self._codec = Codec(self._layout)
        news = syscall.map_memory(plane.fd("tunnel_news"))
        self._count: NDArray[np.uint32] = np.frombuffer(news, np.uint32)
        self._latest: NDArray[np.uint64] = np.frombuffer(news, np.uint64, 2 * abi.TUNNEL_NEWS, 8).reshape(-1, 2)

    @property
    def news(self) -> int:
        """How many reports have come so far; it wraps."""
        return int(self._count[0])

    def reported_since(self, news: int) -> Iterator[Address] | None:
        """Whose reports came since there were so many; None where they are too many to know."""
        now = self.news
        if now - news & 0xFFFFFFFF > abi.TUNNEL_NEWS:
            return None
        return (_address(self._latest[number % abi.TUNNEL_NEWS]) for number in range(news, now))

    def enter(self, address: Address, source: Address, spread: int, report: Report | None) -> None:
        """Has reports about packets to `address` noted, of that source and its last `spread` bits."""
        values: dict[str, Value] = {
            "source": address_words(source),
            "source_spread": network_order(spread, 4),
            "mtu": report.mtu if report else 0,
            "tick": report.tick if report else 0,
        }
        syscall.update(self._map, _key(address), self._codec.encode(values))

    def remove(self, address: Address) -> None:
        with suppress(FileNotFoundError):
            syscall.delete(self._map, _key(address))

    def report(self, address: Address) -> Report | None:
        """What was reported last of the way to `address`, however long ago."""
        value = syscall.look_up(self._map, _key(address), self._codec.size)
        if value is None:
            return None
        entry = np.frombuffer(value, self._layout)[0]
        return Report(int(entry["mtu"]), int(entry["tick"])) if entry["mtu"] else None


def _key(address: Address) -> bytes:
    return np.array(address_words(address), np.uint64).tobytes()


def _address(words: NDArray[np.uint64]) -> Address:
    address = ip_address(words.tobytes())
    return getattr(address, "ipv4_mapped", None) or address
