"""Follows the kernel's routes, interfaces and neighbours, and says how each wanted address is reached at the moment.

Neighbours stay resolved: XDP forwards past the kernel, which would let their entries go stale and collect them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from math import ceil
from types import MappingProxyType
from typing import Protocol, TypeVar

from xdplb.errors import XdplbError
from xdplb.model import Address
from xdplb.net.next_hops import (
    Event,
    EventsLostError,
    Interface,
    LinkEvent,
    Neighbour,
    NeighbourEvent,
    NeighbourKey,
    NextHopEvent,
    Nud,
    Resolution,
    Route,
    RouteEvent,
    resolve,
    trouble,
    within,
)

log = logging.getLogger(__name__)

_T = TypeVar("_T")

DEBOUNCE_S = 0.05
TEND_INTERVAL_S = 1.0
LOOK_AGAIN_EVERY_S = 10.0
"""All routes are looked up anew within this time, so that an event that never came does not count for long."""
ASK_AGAIN_S = 1.0
"""How often a neighbour in doubt is asked at most. For so long the kernel sticks to a new answer (locktime)."""
LOOK_AGAIN_PER_S = 250
"""But not more of them: tens of thousands take their time, rather than a share of a core for good."""
SLICE = 250
"""Addresses looked up before something else has its turn: some milliseconds."""
RESUBSCRIBE_PAUSE_S = 0.1
CONFIRMED = Nud.REACHABLE | Nud.DELAY | Nud.PROBE


class Kernel(Protocol):
    """What the watcher needs of `links.Links`; documented there."""

    async def interfaces(self) -> list[Interface]: ...
    async def neighbours(self) -> list[Neighbour]: ...
    async def routes(self, addresses: Collection[Address]) -> Mapping[Address, Route | None]: ...
    async def keep_resolved(self, keys: Collection[NeighbourKey]) -> None: ...
    async def release(self, entries: Collection[Neighbour]) -> None: ...
    async def ask(self, interface: Interface, source: Address, neighbours: Iterable[Address]) -> None: ...
    def events(self) -> AbstractAsyncContextManager[AsyncIterator[Event]]: ...


class NextHopWatcher:
    """Calls back, from within `run()`, on what changes:

    - `on_change(record)`: the record of an address is new, or not what it was;
    - `on_trouble(address, reason)`: right after the `on_change` that took the address's next hop from it;
    - `on_link(event)`: an interface appeared (all of them at the start), changed or went.

    An exception out of a callback ends `run()`.
    """

    def __init__(
        self,
        kernel: Kernel,
        on_change: Callable[[Resolution], None],
        on_trouble: Callable[[Address, str], None] = lambda address, reason: None,
        on_link: Callable[[LinkEvent], None] = lambda event: None,
        look_again_s: float = LOOK_AGAIN_EVERY_S,
    ) -> None:
        self._look_again_s = look_again_s
        self._kernel = kernel
        self._on_change = on_change
        self._on_trouble = on_trouble
        self._on_link = on_link
        self._addresses: set[Address] = set()
        self._in_order: dict[int, list[Address]] = {}
        """Those of a family, sorted once somebody asks."""
        self._interfaces: dict[int, Interface] = {}
        self._neighbours: dict[NeighbourKey, Neighbour] = {}
        self._routes: dict[Address, Route | None] = {}
        self._users: dict[NeighbourKey, set[Address]] = {}
        self._records: dict[Address, Resolution] = {}
        self._unused: set[NeighbourKey] = set()
        self._told: set[NeighbourKey] = set()
        self._to_tend: set[NeighbourKey] = set()
        """Neighbours that may need care: whatever they hear of, events and routes put here."""
        self._unresolved: set[Address] = set()
        self._all_unresolved = False
        self._doubted: set[Address] = set()
        self._doubt = asyncio.Event()
        self._work = asyncio.Event()
        self._complaint = ""

    @property
    def records(self) -> Mapping[Address, Resolution]:
        """The last record of each address; none yet for those not looked up so far."""
        return MappingProxyType(self._records)

    def set_addresses(self, addresses: Iterable[Address]) -> None:
        """Replaces the set of addresses to follow. May be called at any time, before `run()` too."""
        wanted = frozenset(addresses)
        self.change_addresses(self._addresses - wanted, wanted)

    def change_addresses(self, gone: Iterable[Address], new: Iterable[Address]) -> None:
        """No more of these, and those as well; the others stay as they are."""
        for address in self._addresses.intersection(gone):
            self._addresses.discard(address)
            self._set_route(address, None)
            self._routes.pop(address)
            self._records.pop(address, None)
        fresh = frozenset(new) - self._addresses
        self._addresses |= fresh
        self._look_up(fresh)
        self._in_order = {}

    def _sorted(self, version: int) -> Sequence[Address]:
        if version not in self._in_order:
            of_family = (address for address in self._addresses if address.version == version)
            self._in_order[version] = sorted(of_family, key=int)
        return self._in_order[version]

    def doubt(self, address: Address) -> None:
        """There is no answer from `address`: its next hop may have another MAC by now, without a word of it.

        So the link is asked (RFC 1122, 2.3.2.1), past the kernel, which would wait for 20 s. No answer changes nothing.
        """
        self._doubted.add(address)
        self._doubt.set()

    async def run(self) -> None:
        """Runs until cancelled; then gives back the neighbour entries that it kept resolved."""
        try:
            while True:
                try:
                    await self._follow()
                except* EventsLostError as lost:
                    log.warning("kernel events were lost (%s): reading everything again", lost.exceptions[0])
                await asyncio.sleep(RESUBSCRIBE_PAUSE_S)
        finally:
            await self._release(tuple(self._unused | self._users.keys()))

    async def _follow(self) -> None:
        """From one subscription to its loss. Subscribes before it reads, so that nothing falls in between."""
        async with self._kernel.events() as events:
            await self._reload()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._resolve())
                tasks.create_task(self._tend())
                tasks.create_task(self._ask())
                async for event in events:
                    self._apply(event)

    async def _reload(self) -> None:
        interfaces = {interface.index: interface for interface in await self._kernel.interfaces()}
        neighbours = {entry.key: entry for entry in await self._kernel.neighbours()}
        for gone in self._interfaces.keys() - interfaces.keys():
            self._apply(LinkEvent(self._interfaces[gone], deleted=True))
        self._neighbours = neighbours
        for interface in interfaces.values():
            self._apply(LinkEvent(interface))
        self._to_tend.update(self._users)
        for part in _slices(tuple(self._records)):
            for address in part:
                if address in self._routes:
                    self._refresh(address)
            await asyncio.sleep(0)
        self._look_up_all()

    def _apply(self, event: Event) -> None:
        match event:
            case LinkEvent():
                self._apply_link(event)
            case NeighbourEvent(neighbour, deleted):
                self._told.add(neighbour.key)
                if deleted:
                    self._neighbours.pop(neighbour.key, None)
                else:
                    self._neighbours[neighbour.key] = neighbour
                users = self._users.get(neighbour.key)
                if users is not None:
                    self._to_tend.add(neighbour.key)
                    for address in tuple(users):
                        self._refresh(address)
            case RouteEvent(network) if network.prefixlen == 0:
                self._look_up_all()
            case RouteEvent(network):
                self._look_up(within(self._sorted(network.version), network))
            case NextHopEvent():
                self._look_up_all()

    def _apply_link(self, event: LinkEvent) -> None:
        index = event.interface.index
        if event.deleted:
            if self._interfaces.pop(index, None) is None:
                return
            for key in [key for key in self._neighbours if key.ifindex == index]:
                del self._neighbours[key]
        elif self._interfaces.get(index) == event.interface:
            return
        else:
            self._interfaces[index] = event.interface
        self._on_link(event)
        self._to_tend.update(key for key in self._users if key.ifindex == index)
        affected = [address for address, route in self._routes.items() if route is not None and route.ifindex == index]
        for address in affected:
            self._refresh(address)
        self._look_up_all()

    def _refresh(self, address: Address) -> None:
        route = self._routes[address]
        interface = self._interfaces.get(route.ifindex) if route else None
        neighbour = self._neighbours.get(route.neighbour_of(address)) if route else None
        previous = self._records.get(address)
        current = resolve(address, route, interface, neighbour, previous)
        if current == previous:
            return
        self._records[address] = current
        self._on_change(current)
        reason = trouble(previous, current)
        if reason is not None:
            self._on_trouble(address, reason)

    def _look_up(self, addresses: Iterable[Address]) -> None:
        self._unresolved.update(addresses)
        if self._unresolved:
            self._work.set()

    def _look_up_all(self) -> None:
        self._all_unresolved = True
        self._work.set()

    async def _resolve(self) -> None:
        """Asks for the routes of addresses whose way may have changed, those of one burst of events together. Where
        that takes long, it pauses for as long.
        """
        loop, took_s = asyncio.get_running_loop(), 0.0
        while True:
            await self._work.wait()
            await asyncio.sleep(max(DEBOUNCE_S, took_s))
            began = loop.time()
            self._work.clear()
            batch = set(self._addresses) if self._all_unresolved else self._unresolved
            self._unresolved, self._all_unresolved = set(), False
            for part in _slices(tuple(batch)):
                try:
                    routes = await self._kernel.routes(part)
                except (XdplbError, OSError) as error:
                    log.warning("%s; trying again", error)
                    await asyncio.sleep(TEND_INTERVAL_S)
                    self._look_up(self._addresses.intersection(batch))
                    break
                batch.difference_update(part)
                for address, route in routes.items():
                    if address in self._addresses and (address not in self._records or self._routes[address] != route):
                        self._set_route(address, route)
                        self._refresh(address)
                await self._keep_all([route.neighbour_of(address) for address, route in routes.items() if route])
            took_s = loop.time() - began

    def _set_route(self, address: Address, route: Route | None) -> None:
        before = self._routes.get(address)
        if before == route and address in self._routes:
            return
        if before is not None:
            key = before.neighbour_of(address)
            self._users[key].discard(address)
            if not self._users[key]:
                del self._users[key]
                self._unused.add(key)
        if route is not None:
            key = route.neighbour_of(address)
            self._users.setdefault(key, set()).add(address)
            self._unused.discard(key)
            self._to_tend.add(key)
        self._routes[address] = route

    async def _tend(self) -> None:
        """Revives entries that were deleted or, by kernels before 5.16, let go; gives back those not used any more.
        Looks up routes again, a part of them at a time, and at the whole table, whose marks change without an event.
        """
        to_look_up: list[Address] = []
        latest = asyncio.get_running_loop().time()
        while True:
            await asyncio.sleep(TEND_INTERVAL_S)
            to_tend, self._to_tend = self._to_tend, set()
            for some in _slices(tuple(to_tend)):
                self._to_tend.update(key for key in some if key in self._users and self._needs_care(key))
                await self._keep_all(some)
                await asyncio.sleep(0)
            await self._release(tuple(self._unused))
            to_look_up = to_look_up or list(self._addresses)
            every_s = max(self._look_again_s, len(self._addresses) / LOOK_AGAIN_PER_S)
            part = ceil(len(self._addresses) * TEND_INTERVAL_S / every_s)
            self._look_up(self._addresses.intersection(to_look_up[:part]))
            to_look_up = to_look_up[part:]
            if asyncio.get_running_loop().time() - latest >= every_s:
                latest = asyncio.get_running_loop().time()
                await self._read_neighbours()

    async def _ask(self) -> None:
        while True:
            await self._doubt.wait()
            await asyncio.sleep(DEBOUNCE_S)
            self._doubt.clear()
            doubted, self._doubted = self._doubted, set()
            questions: dict[tuple[Interface, Address], set[Address]] = {}
            for address in doubted:
                if (question := self._question(address)) is not None:
                    interface, source, neighbour = question
                    questions.setdefault((interface, source), set()).add(neighbour)
            for (interface, source), neighbours in questions.items():
                await self._kernel.ask(interface, source, neighbours)
            await asyncio.sleep(ASK_AGAIN_S)

    def _question(self, address: Address) -> tuple[Interface, Address, Address] | None:
        """From where, in which name, for which neighbour. None where a question can tell nothing."""
        route = self._routes.get(address)
        interface = self._interfaces.get(route.ifindex) if route else None
        if route is None or route.local or route.source is None or interface is None:
            return None
        key = route.neighbour_of(address)
        entry = self._neighbours.get(key)
        if route.source.version != key.address.version or (entry is not None and entry.fixed):
            return None
        return interface, route.source, key.address

    async def _read_neighbours(self) -> None:
        """But for those of which an event told meanwhile, which is newer."""
        self._told.clear()
        try:
            table = {entry.key: entry for entry in await self._kernel.neighbours()}
        except (XdplbError, OSError) as error:
            log.warning("the neighbours could not be read again: %s", error)
            return
        for part in _slices(tuple(self._users)):
            for key in part:
                self._take_over(key, table.get(key))
            await asyncio.sleep(0)

    def _take_over(self, key: NeighbourKey, now: Neighbour | None) -> None:
        """What the table says of a neighbour, unless an event has said something since."""
        before = self._neighbours.get(key)
        if key in self._told or key not in self._users or before == now:
            return
        if now is None:
            del self._neighbours[key]
        else:
            self._neighbours[key] = now
        self._to_tend.add(key)
        for address in tuple(self._users[key]):
            self._refresh(address)

    async def _keep_all(self, keys: Iterable[NeighbourKey]) -> None:
        for part in _slices(tuple(key for key in keys if key in self._users and self._needs_care(key))):
            for key in part:
                # noted first: the kernel tells of a new entry only once it has been resolved, and not of a mark alone
                known = self._neighbours.get(key)
                if known is None:
                    self._neighbours[key] = Neighbour(key, Nud.INCOMPLETE, None, ours=True)
                elif not known.ours:
                    self._neighbours[key] = replace(known, ours=True)
            try:
                await self._kernel.keep_resolved(part)
            except XdplbError as error:
                if self._complaint != error.hint:
                    log.warning("%s; %s", error.message, error.hint)
                self._complaint = error.hint
                return

    def _needs_care(self, key: NeighbourKey) -> bool:
        interface = self._interfaces.get(key.ifindex)
        if interface is None or not interface.mac or not interface.up:
            return False
        entry = self._neighbours.get(key)
        if entry is None:
            return True
        if entry.fixed or entry.managed:
            return False
        return not entry.ours or not entry.state & CONFIRMED

    async def _release(self, keys: Collection[NeighbourKey]) -> None:
        self._unused.difference_update(keys)
        known = (self._neighbours.get(key) for key in keys)
        entries = [entry for entry in known if entry is not None and entry.ours]
        try:
            if entries:
                await self._kernel.release(entries)
        except XdplbError as error:
            log.warning("%s", error.message)


def _slices(items: tuple[_T, ...]) -> Iterator[tuple[_T, ...]]:
    return (items[at : at + SLICE] for at in range(0, len(items), SLICE))
