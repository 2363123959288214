"""The daemon's two edges, played: a packet path that is arrays, and a kernel whose network is sets. Both note what is
done to them, in one list where a test wants the order.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, TypeVar
from typing import Protocol as Protocol_

import numpy as np

from xdplb.abi import FlowTimes, Geometry
from xdplb.core.hash_key import HashKey
from xdplb.core.operations import Applied, Operation, Publish
from xdplb.core.status import Statuses
from xdplb.daemon.backend_monitor import BackendMonitor
from xdplb.daemon.engine import Engine, Retired
from xdplb.errors import NotCapable
from xdplb.model import Address, AttachMode, Backend, Check, CheckType, Config, Forward, Listen, Protocol, Scheduler
from xdplb.model import Service as ServiceConfig
from xdplb.net.bulk import Device
from xdplb.net.links import Attached, Attachment, Observed
from xdplb.net.next_hops import Event, Interface, Neighbour, NeighbourKey, Nud, Route

KEY = HashKey.derive("daemon tests")
GEOMETRY = Geometry(services=16, backends=64, slots=1 << 13, address_buckets=64, intervals=1024, flow_sets=8)
FRONT = Interface(2, "eth0", bytes.fromhex("020000000002"), 1500, "veth", True, True)
BACKEND_MAC = bytes.fromhex("0200000000aa")
TCP = Check(interval_s=3600.0, fast_interval_s=0.01, fall=1, rise=1)


def service(*names: str, check: Check = TCP, **settings: Any) -> ServiceConfig:
    """A service "web" on 203.0.113.1:80, with backends of these names at 10.0.0.1, 10.0.0.2, …"""
    backends = tuple(Backend(name, IPv4Address(f"10.0.0.{n}"), None) for n, name in enumerate(names, 1))
    listen = Listen(IPv4Address("203.0.113.1"), 80, 80, Protocol.TCP)
    made = ServiceConfig("web", listen, Forward.DSR, Scheduler.MAGLEV, check, backends)
    return replace(made, **settings)


def config(*services: ServiceConfig) -> Config:
    return Config(("eth0",), services)


UNCHECKED = replace(TCP, type=CheckType.NONE)


class Ticks:
    """A clock of one tick a second that stands still."""

    tick = 1000
    tick_s = 1.0

    def ticks(self, seconds: float) -> int:
        return int(seconds)


@dataclass
class Features:
    times: FlowTimes = field(default_factory=FlowTimes)


class Plane:
    """A generation of maps, as far as the engine itself looks at them."""

    program_fd = 7
    program_id = 77
    probe_fd = 8

    def __init__(self, name: str, log: list[str], geometry: Geometry = GEOMETRY) -> None:
        self.name, self.log, self.geometry = name, log, geometry
        self.features = Features()
        self.pins = Path("/pins") / name
        self.loads = np.zeros(geometry.backends, [("active", "u4"), ("weight", "u4")])
        self.flow_words = np.zeros(8 * geometry.flow_sets, np.uint64)
        self.trusted_until: int | None = None
        self.unpinned: list[str] = []
        self.unpinnable: Exception | None = None
        keep_idle = np.zeros(geometry.services, [("keep_idle", "u2")])
        self.services = type("Table", (), {"entries": keep_idle})()

    def counter_fields(self, map_name: str) -> tuple[str, ...]:
        return ("packets", "bytes")

    def read_counter(self, map_name: str, index: int) -> np.ndarray:
        return np.array([index, 10 * index], np.uint64)

    def set_counters(self, map_name: str, index: int, values: np.ndarray) -> None:
        pass

    def copy_to(self, ifindex: int | None) -> None:
        pass

    def trust_until(self, tick: int) -> None:
        self.trusted_until = tick

    def pin_again(self) -> list[str]:
        if self.unpinnable is not None:
            raise self.unpinnable
        again, self.unpinned = self.unpinned, []
        return again

    def discard(self, kept: Plane) -> None:
        self.log.append(f"discard {self.name}")

    def forget_other_programs(self) -> None:
        self.log.append(f"only {self.name}")


class Writing:
    """Notes the operations."""

    window = 0

    def __init__(self) -> None:
        self.done: list[Operation] = []

    def apply(self, operation: Operation) -> None:
        self.done.append(operation)

    def build(self, publish: Publish) -> None:
        pass


def engine(plane: Plane, configured: Config, statuses: Statuses, writing: Writing | None = None) -> Engine:
    applied = Applied(plane.geometry)
    return Engine(plane, KEY, configured, statuses, applied, Retired(), Ticks(), writing or Writing())  # type: ignore[arg-type]


class Kernel:
    """One interface, eth0, behind which every address answers at once. A test may change what is there; `changed`
    then says that something is new.
    """

    def __init__(self, log: list[str] | None = None, addresses: Collection[Address] = ()) -> None:
        self.log = [] if log is None else log
        self.present = set(addresses)
        self.links = [FRONT]
        self.programs: dict[int, Attached] = {}
        self.elsewhere: dict[Address, bytes] = {}
        self.refuses: Mapping[str, Exception] = {}
        self.redirects: bool | None = None
        self.fixed = True
        self.senders: dict[bytes, bool] = {}
        self.changed = asyncio.Event()

    async def interfaces(self) -> list[Interface]:
        return list(self.links)

    async def interface(self, name: str) -> Interface:
        for interface in self.links:
            if name == interface.name:
                return interface
        raise NotCapable(f"no interface is named '{name}'")

    async def devices(self) -> dict[int, Device]:
        return {i.index: Device(i.index, i.name, i.kind, i.mac, i.up, None, i.master) for i in self.links}

    async def observe(self, index: int) -> Observed | None:
        for interface in self.links:
            if index == interface.index:
                return Observed(interface, self.programs.get(index))
        return None

    @contextmanager
    def host_changes(self) -> Iterator[AsyncIterator[None]]:
        async def changes() -> AsyncIterator[None]:
            while True:
                await self.changed.wait()
                self.changed.clear()
                yield

        yield changes()

    async def add_pair(self, name: str, peer: str, mtu: int) -> None:
        self._do(f"add {name} and {peer}")

    async def remove_interface(self, name: str) -> bool:
        self._do(f"remove {name}")
        return True

    async def route_through(self, index: int, address: Address) -> None:
        self._do(f"route {address} through {index}")

    async def refusing(self) -> frozenset[int] | None:
        return None if self.redirects is None else frozenset(() if self.redirects else [FRONT.index])

    async def checksums(self, interface: Interface) -> dict[bytes, bool]:
        return dict(self.senders)

    async def announce(self, interface: Interface, addresses: Iterable[Address]) -> None:
        self.log += [f"announce {address} on {interface.name}" for address in addresses]

    async def owners(self, interface: Interface, addresses: Collection[Address]) -> dict[Address, bytes]:
        return {address: self.elsewhere[address] for address in addresses if address in self.elsewhere}

    async def neighbours(self) -> list[Neighbour]:
        state = Nud.PERMANENT if self.fixed else Nud.REACHABLE
        return [
            Neighbour(NeighbourKey(FRONT.index, IPv4Address(f"10.0.0.{n}")), state, BACKEND_MAC, fixed=self.fixed)
            for n in range(1, 9)
        ]

    async def routes(self, addresses: Collection[Address]) -> dict[Address, Route | None]:
        return {address: Route(FRONT.index, None, IPv4Address("10.0.0.254"), None) for address in addresses}

    async def keep_resolved(self, keys: Collection[NeighbourKey]) -> None:
        pass

    async def release(self, entries: Collection[Neighbour]) -> None:
        pass

    async def ask(self, interface: Interface, source: Address, neighbours: Iterable[Address]) -> None:
        self.log += [f"ask for {neighbour} in the name of {source}" for neighbour in neighbours]

    @asynccontextmanager
    async def events(self) -> AsyncIterator[AsyncIterator[Event]]:
        async def nothing() -> AsyncIterator[Event]:
            await asyncio.get_running_loop().create_future()
            yield  # type: ignore[misc]

        yield nothing()

    async def attached(self, index: int) -> Attached | None:
        return self.programs.get(index)

    async def attach(
        self, index: int, prog_fd: int, mode: AttachMode = AttachMode.AUTO, expected_fd: int | None = None
    ) -> Attachment:
        return await self.replace(index, prog_fd, mode)

    async def replace(self, index: int, prog_fd: int, mode: AttachMode = AttachMode.AUTO) -> Attachment:
        self._do(f"attach to {index}")
        attached = AttachMode.GENERIC if mode is AttachMode.GENERIC else AttachMode.NATIVE
        self.programs[index] = Attached(self.program_id, attached)
        return Attachment(attached)

    program_id = 77

    async def detach(self, index: int, expected_fd: int | None = None) -> bool:
        self._do(f"detach from {index}")
        return self.programs.pop(index, None) is not None

    async def addresses(self) -> set[Address]:
        return set(self.present)

    async def add_addresses(self, index: int, addresses: Iterable[Address]) -> None:
        for address in addresses:
            self._do(f"add {address}")
            self.present.add(address)

    async def remove_addresses(self, index: int, addresses: Iterable[Address]) -> None:
        for address in addresses:
            self._do(f"remove {address}")
            self.present.discard(address)

    def _do(self, what: str) -> None:
        if what in self.refuses:
            raise self.refuses[what]
        self.log.append(what)


class Watching(Protocol_):
    """What a test sets up around a monitor."""

    monitor: BackendMonitor


House = TypeVar("House", bound=Watching)
Scenario = Callable[[House], Coroutine[Any, Any, None]]


def inside(make: Callable[[Path], House]) -> Callable[[Scenario[House]], Callable[[Path], None]]:
    """A coroutine over what `make` sets up, as a test, with the monitor running."""

    def as_test(scenario: Scenario[House]) -> Callable[[Path], None]:
        def test(tmp_path: Path) -> None:
            async def run() -> None:
                house = make(tmp_path)
                watching = asyncio.create_task(house.monitor.run())
                try:
                    async with asyncio.timeout(20):
                        await scenario(house)
                finally:
                    watching.cancel()
                    await asyncio.gather(watching, return_exceptions=True)

            asyncio.run(run())

        test.__doc__ = scenario.__doc__
        return test

    return as_test
