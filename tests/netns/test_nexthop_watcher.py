"""Next hops are found, kept resolved and followed, against the real kernel: real neighbours, routes, cables."""

from __future__ import annotations

import asyncio
import contextlib
import math
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address

import pytest
from cable import BACKEND4, BACKEND6, GATEWAY4, GATEWAY6, TIMEOUT_S, Lab, add_cable, cabled, mac_of, neighbour_line

from xdplb.model import Address
from xdplb.net.links import Links
from xdplb.net.next_hop_watcher import NextHopWatcher
from xdplb.net.next_hops import Event, LinkEvent, NeighbourKey, NextHopState, Resolution

BEHIND4, BEHIND6 = ip_address("10.8.0.5"), ip_address("fd08::5")

pytestmark = pytest.mark.usefixtures("able")


@pytest.fixture
def lab() -> Iterator[Lab]:
    with cabled() as made:
        yield made


@dataclass
class Seen:
    """What a watcher has called back, and waiting for more of it."""

    watcher: NextHopWatcher
    running: asyncio.Task[None]
    changes: list[Resolution]
    troubles: list[tuple[Address, str]] = field(default_factory=list)
    links: list[LinkEvent] = field(default_factory=list)
    tick: asyncio.Event = field(default_factory=asyncio.Event)

    async def until(self, happened: Callable[[], bool]) -> None:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                while not happened():
                    if self.running.done():
                        self.running.result()
                    self.tick.clear()
                    await self.tick.wait()
        except TimeoutError:
            pytest.fail(f"still waiting; records {dict(self.watcher.records)}, troubles {self.troubles}")

    async def record(self, address: Address, accept: Callable[[Resolution], bool]) -> Resolution:
        await self.until(lambda: address in self.watcher.records and accept(self.watcher.records[address]))
        return self.watcher.records[address]

    async def state(self, address: Address, state: NextHopState) -> Resolution:
        return await self.record(address, lambda record: record.state is state)


@contextlib.asynccontextmanager
async def watching(
    *addresses: Address, links: Links | None = None, look_again_s: float = math.inf
) -> AsyncIterator[Seen]:
    async with links or Links() as kernel:
        changes: list[Resolution] = []
        troubles: list[tuple[Address, str]] = []
        events: list[LinkEvent] = []
        tick = asyncio.Event()

        def noting(append: Callable[..., None]) -> Callable[..., None]:
            def note(*what: object) -> None:
                append(what if len(what) > 1 else what[0])
                tick.set()

            return note

        watcher = NextHopWatcher(
            kernel, noting(changes.append), noting(troubles.append), noting(events.append), look_again_s
        )
        watcher.set_addresses(addresses)
        running = asyncio.create_task(watcher.run())
        running.add_done_callback(lambda task: tick.set())
        try:
            yield Seen(watcher, running, changes, troubles, events, tick)
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running


@pytest.mark.parametrize(("address", "source"), [(BACKEND4, GATEWAY4), (BACKEND6, GATEWAY6)])
def test_a_backend_on_the_link(lab: Lab, address: Address, source: Address) -> None:
    async def test() -> None:
        async with watching(address) as seen:
            record = await seen.state(address, NextHopState.REACHABLE)
            assert (record.ifname, record.via, record.source_address, record.mtu) == ("gw0", address, source, 1500)
            assert record.source_mac == mac_of(lab.gateway, "gw0")
            assert record.dest_mac == mac_of(lab.backend, "be0")
            assert not seen.troubles
            assert "managed" in neighbour_line(lab, address)
        assert "managed" not in neighbour_line(lab, address)

    lab.run(test)


@pytest.mark.parametrize(("address", "gateway"), [(BEHIND4, BACKEND4), (BEHIND6, BACKEND6)])
def test_a_backend_behind_a_router(lab: Lab, address: Address, gateway: Address) -> None:
    async def test() -> None:
        async with watching(address) as seen:
            record = await seen.state(address, NextHopState.REACHABLE)
            assert (record.via, record.mtu) == (gateway, 1380)
            assert record.dest_mac == mac_of(lab.backend, "be0")

    lab.gw(f"route add {address} via {gateway} dev gw0 mtu 1380")
    lab.run(test)


def test_an_ipv4_backend_behind_an_ipv6_router(lab: Lab) -> None:
    async def test() -> None:
        async with watching(BEHIND4) as seen:
            record = await seen.state(BEHIND4, NextHopState.REACHABLE)
            assert (record.via, record.source_address) == (BACKEND6, GATEWAY4)

    lab.gw(f"route add {BEHIND4} via inet6 {BACKEND6} dev gw0")
    lab.run(test)


@pytest.mark.parametrize("address", [GATEWAY4, GATEWAY6])
def test_an_address_of_this_host(lab: Lab, address: Address) -> None:
    async def test() -> None:
        async with watching(address) as seen:
            await seen.state(address, NextHopState.LOCAL)

    lab.run(test)


@pytest.mark.parametrize("address", [BEHIND4, BEHIND6])
def test_routes_are_followed(lab: Lab, address: Address) -> None:
    first, second = (BACKEND4, ip_address("10.7.0.12")) if address.version == 4 else (BACKEND6, ip_address("fd07::12"))

    async def test() -> None:
        async with watching(address) as seen:
            await seen.state(address, NextHopState.NO_ROUTE)
            lab.gw(f"route add {address} via {first}")
            await seen.record(address, lambda record: record.via == first and record.dest_mac is not None)
            lab.gw(f"route replace {address} via {second}")
            await seen.record(address, lambda record: record.via == second and record.dest_mac is not None)
            lab.gw(f"route replace blackhole {address}" if address.version == 4 else f"route del {address}")
            await seen.state(address, NextHopState.NO_ROUTE)
            await seen.until(lambda: (address, f"no route to {address} any more") in seen.troubles)

    lab.be("addr add 10.7.0.12/24 dev be0")
    lab.be("addr add fd07::12/64 dev be0 nodad")
    lab.run(test)


@pytest.mark.parametrize("compatible", [0, 1], ids=["objects-alone", "compatible"])
@pytest.mark.parametrize("address", [BEHIND4, BEHIND6])
def test_next_hop_objects_are_followed(lab: Lab, address: Address, compatible: int) -> None:
    """With nexthop_compat_mode=0 the kernel tells of the object alone, not of the routes that name it."""
    first, second = (BACKEND4, "10.7.0.12") if address.version == 4 else (BACKEND6, "fd07::12")

    async def test() -> None:
        lab.gw(f"nexthop add id 7 via {first} dev gw0")
        lab.gw(f"route add {address} nhid 7")
        async with watching(address) as seen:
            await seen.record(address, lambda record: record.via == first)
            lab.gw(f"nexthop replace id 7 via {second} dev gw0")
            await seen.record(address, lambda record: str(record.via) == second and record.dest_mac is not None)
            lab.gw("nexthop del id 7")
            await seen.state(address, NextHopState.NO_ROUTE)

    lab.be("addr add 10.7.0.12/24 dev be0")
    lab.be("addr add fd07::12/64 dev be0 nodad")
    setting = f"net.ipv4.nexthop_compat_mode={compatible}"
    subprocess.run(["ip", "netns", "exec", lab.gateway, "sysctl", "-qw", setting], check=True)
    lab.run(test)


def test_a_route_whose_event_never_came_is_found(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.asynccontextmanager
    async def deaf() -> AsyncIterator[AsyncIterator[Event]]:
        async def nothing() -> AsyncIterator[Event]:
            await asyncio.get_running_loop().create_future()
            yield  # type: ignore[misc]

        yield nothing()

    async def test() -> None:
        links = Links()
        monkeypatch.setattr(links, "events", deaf)
        async with watching(BEHIND4, links=links, look_again_s=2) as seen:
            await seen.state(BEHIND4, NextHopState.NO_ROUTE)
            lab.gw(f"route add {BEHIND4} via {BACKEND4}")
            await seen.record(BEHIND4, lambda record: record.via == BACKEND4)

    lab.run(test)


@pytest.mark.parametrize(("silent", "living"), [("10.7.0.99", BACKEND4), ("fd07::99", BACKEND6)])
def test_a_neighbour_that_never_answers(lab: Lab, silent: str, living: Address) -> None:
    address = ip_address(silent)

    async def test() -> None:
        async with watching(address, living) as seen:
            record = await seen.state(address, NextHopState.FAILED)
            assert record.dest_mac is None
            assert seen.troubles == [(address, f"{address} does not answer on gw0")]
            lab.be(f"addr add {address}/{24 if address.version == 4 else 64} dev be0 nodad")
            await seen.state(address, NextHopState.REACHABLE)
        assert "managed" not in neighbour_line(lab, address)

    lab.run(test)


def test_a_neighbour_that_falls_silent(lab: Lab) -> None:
    """The carrier stays: the backend stops answering ARP, as a crashed machine behind a switch does."""

    async def test() -> None:
        async with watching(BACKEND4) as seen:
            before = await seen.state(BACKEND4, NextHopState.REACHABLE)
            lab.be(f"addr del {BACKEND4}/24 dev be0")
            lab.gw(f"neigh change {BACKEND4} dev gw0 nud probe lladdr {(before.dest_mac or b'').hex(':')}")
            record = await seen.state(BACKEND4, NextHopState.FAILED)
            assert record.dest_mac == before.dest_mac
            await seen.until(lambda: seen.troubles == [(BACKEND4, f"{BACKEND4} does not answer on gw0")])

    lab.run(test)


def test_a_new_mac_is_followed(lab: Lab) -> None:
    async def test() -> None:
        async with watching(BACKEND4) as seen:
            await seen.state(BACKEND4, NextHopState.REACHABLE)
            lab.be("link set be0 address 02:00:00:00:00:99")
            await seen.record(BACKEND4, lambda record: record.dest_mac == bytes.fromhex("020000000099"))
            lab.gw("link set gw0 address 02:00:00:00:00:55")
            await seen.record(BACKEND4, lambda record: record.source_mac == bytes.fromhex("020000000055"))

    subprocess.run(  # announces a changed MAC by gratuitous ARP
        ["ip", "netns", "exec", lab.backend, "sysctl", "-qw", "net.ipv4.conf.be0.arp_notify=1"], check=True
    )
    lab.run(test)


@pytest.mark.parametrize("address", [BACKEND4, BACKEND6])
def test_a_mac_that_changed_without_a_word_is_asked_for(lab: Lab, address: Address) -> None:
    async def test() -> None:
        async with watching(address) as seen:
            await seen.state(address, NextHopState.REACHABLE)
            lab.be("link set be0 address 02:00:00:00:00:99")
            seen.watcher.doubt(address)
            await seen.record(address, lambda record: record.dest_mac == bytes.fromhex("020000000099"))
            assert not seen.troubles

    setting = "net.ipv4.neigh.gw0.locktime=0"  # the entry is younger than that second
    subprocess.run(["ip", "netns", "exec", lab.gateway, "sysctl", "-qw", setting], check=True)
    lab.run(test)


@pytest.mark.parametrize("address", [BACKEND4, BACKEND6])
def test_a_neighbour_in_doubt_that_stays_silent_keeps_its_mac(lab: Lab, address: Address) -> None:
    async def test() -> None:
        async with watching(address) as seen:
            before = await seen.state(address, NextHopState.REACHABLE)
            lab.be(f"addr del {address}/{24 if address.version == 4 else 64} dev be0")
            seen.watcher.doubt(address)
            await asyncio.sleep(0.3)
            assert seen.watcher.records[address] == before and not seen.troubles

    lab.run(test)


def test_a_flushed_table_recovers_without_losing_the_mac(lab: Lab) -> None:
    async def test() -> None:
        async with watching(BACKEND4, BACKEND6) as seen:
            for address in (BACKEND4, BACKEND6):
                await seen.state(address, NextHopState.REACHABLE)
            seen.changes.clear()
            lab.gw("neigh flush dev gw0")
            await seen.until(lambda: {record.address for record in seen.changes} == {BACKEND4, BACKEND6})
            for address in (BACKEND4, BACKEND6):
                await seen.state(address, NextHopState.REACHABLE)
            assert all(record.dest_mac is not None for record in seen.changes)

    lab.run(test)


def test_a_lost_carrier_is_told_at_once(lab: Lab) -> None:
    async def test() -> None:
        async with watching(BACKEND4, BACKEND6) as seen:
            for address in (BACKEND4, BACKEND6):
                await seen.state(address, NextHopState.REACHABLE)
            lab.be("link set be0 down")
            await seen.until(lambda: {address for address, _ in seen.troubles} == {BACKEND4, BACKEND6})
            assert {reason for _, reason in seen.troubles} == {"gw0 has no carrier"}
            assert not seen.links[-1].interface.carrier and not seen.links[-1].deleted
            lab.be("link set be0 up")
            await seen.state(BACKEND4, NextHopState.REACHABLE)

    lab.run(test)


def test_an_interface_deleted_and_made_again(lab: Lab) -> None:
    async def test() -> None:
        async with watching(BACKEND4, BACKEND6) as seen:
            old = await seen.state(BACKEND4, NextHopState.REACHABLE)
            lab.gw("link del gw0")
            await seen.until(lambda: any(event.deleted and event.interface.name == "gw0" for event in seen.links))
            await seen.state(BACKEND4, NextHopState.NO_ROUTE)
            await seen.state(BACKEND6, NextHopState.NO_ROUTE)
            add_cable(lab)
            new = await seen.state(BACKEND4, NextHopState.REACHABLE)
            await seen.state(BACKEND6, NextHopState.REACHABLE)
            assert new.dest_mac == mac_of(lab.backend, "be0") and new.dest_mac != old.dest_mac

    lab.run(test)


def test_entries_of_others_are_left_alone(lab: Lab) -> None:
    permanent, managed = ip_address("10.7.0.50"), BACKEND4

    async def test() -> None:
        async with watching(permanent, managed) as seen:
            record = await seen.state(permanent, NextHopState.REACHABLE)
            assert record.dest_mac == bytes.fromhex("020000000050")
            await seen.state(managed, NextHopState.REACHABLE)
        assert "PERMANENT" in neighbour_line(lab, permanent)
        assert "managed" in neighbour_line(lab, managed)

    lab.gw(f"neigh add {permanent} dev gw0 lladdr 02:00:00:00:00:50")
    lab.gw(f"neigh add {managed} dev gw0 managed")
    lab.run(test)


def test_an_address_no_longer_wanted_is_let_go(lab: Lab) -> None:
    async def test() -> None:
        async with watching(BACKEND4) as seen:
            await seen.state(BACKEND4, NextHopState.REACHABLE)
            seen.watcher.set_addresses([BACKEND6])
            await seen.state(BACKEND6, NextHopState.REACHABLE)
            assert BACKEND4 not in seen.watcher.records
            async with asyncio.timeout(TIMEOUT_S), Links() as links, links.events() as events:
                if "managed" in neighbour_line(lab, BACKEND4):
                    async for _ in events:
                        if "managed" not in neighbour_line(lab, BACKEND4):
                            break

    lab.run(test)


def test_lost_events_are_made_up_for(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    """The event buffer overflows while the loop is held up; what happened meanwhile is found out all the same."""

    async def test() -> None:
        async with watching(BEHIND4, links=Links(event_buffer_bytes=1)) as seen:
            await seen.state(BEHIND4, NextHopState.NO_ROUTE)
            lab.gw("-batch -", "".join(f"route add 10.9.{n}.0/24 dev gw0\n" for n in range(200)))
            lab.gw(f"route add {BEHIND4} via {BACKEND4}")
            await seen.state(BEHIND4, NextHopState.REACHABLE)
        assert "kernel events were lost" in caplog.text

    lab.run(test)


def test_stopping_while_a_neighbour_is_silent_leaves_no_entry(lab: Lab) -> None:
    silent = ip_address("10.7.0.99")

    async def test() -> None:
        async with watching(silent) as seen:
            await seen.state(silent, NextHopState.RESOLVING)
            assert "managed INCOMPLETE" in neighbour_line(lab, silent)
        assert neighbour_line(lab, silent) == ""

    lab.run(test)


def test_entries_of_a_killed_predecessor_are_given_back(lab: Lab) -> None:
    async def test() -> None:
        async with Links() as links:
            await links.keep_resolved([NeighbourKey((await links.interface("gw0")).index, BACKEND4)])
        assert "managed" in neighbour_line(lab, BACKEND4)
        async with watching(BACKEND4) as seen:
            await seen.state(BACKEND4, NextHopState.REACHABLE)
        assert "managed" not in neighbour_line(lab, BACKEND4)

    lab.run(test)
