"""The host is kept as it should be: what differs is mended, told where it must not be, and not fought without end."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from edges import FRONT, Kernel, config, service

from xdplb.daemon.alarms import Alarms
from xdplb.daemon.host import Host
from xdplb.errors import NotPrivileged, XdplbError
from xdplb.model import AttachMode, Config, Forward, HostUpkeep, Upkeep
from xdplb.net.links import Attached
from xdplb.net.sysctl import Sysctls
from xdplb.paths import Instance

WEB = config(service("a"))
VIP = WEB.services[0].listen.address
NAT = config(service("a", forward=Forward.NAT))
IPV4 = "net/ipv4/conf"


class Given:
    """A host that is kept as a configuration needs it. Time passes where a test says so."""

    def __init__(self, tmp_path: Path) -> None:
        self.instance = Instance("eth0")
        self.kernel = Kernel()
        self.alarms = Alarms()
        self.root = tmp_path / "sys"
        for name in ("all", "eth0", "wan"):
            for setting in ("forwarding", "accept_local", "rp_filter"):
                path = self.root / IPV4 / name / setting
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("0\n")
        self.now = 1000.0
        self.host = Host(
            self.kernel, self.instance, [FRONT], self.alarms, sysctls=Sysctls(self.root), clock=lambda: self.now
        )

    async def begin(self, wanted: Config) -> None:
        await self.host.prepare(wanted)
        await self.host.add_addresses(wanted)
        await self.host.release(wanted)
        await self.host.reconcile()
        self.kernel.log.clear()

    def setting(self, name: str, interface: str = "eth0") -> Path:
        return self.root / IPV4 / interface / name

    @property
    def told(self) -> set[tuple[str, str]]:
        return {(alarm.name, alarm.about) for alarm in self.alarms}

    @property
    def noted(self) -> dict[str, Any]:
        return dict(json.loads(self.instance.ledger.read_text()))


def given(scenario: Callable[[Given], Awaitable[None]]) -> Callable[[Path, pytest.MonkeyPatch], None]:
    def test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDPLB_RUNTIME_DIRECTORY", str(tmp_path / "run"))
        monkeypatch.setattr("xdplb.daemon.addresses.ANNOUNCE_AFTER_S", ())

        async def run() -> None:
            async with asyncio.timeout(20):
                await scenario(Given(tmp_path))

        asyncio.run(run())

    return test


@given
async def test_where_nothing_differs_nothing_is_done(given: Given) -> None:
    await given.begin(NAT)
    before = given.noted
    await given.host.reconcile()
    assert given.kernel.log == [] and given.noted == before and not given.alarms


@given
async def test_before_a_configuration_is_in_force_nothing_is_wanted(given: Given) -> None:
    await given.host.prepare(WEB)
    await given.host.add_addresses(WEB)
    given.kernel.present.clear()
    await given.host.reconcile()
    assert not given.kernel.present


@given
async def test_settings_are_put_back_and_what_was_before_us_stays_noted(given: Given) -> None:
    await given.begin(NAT)
    assert given.setting("forwarding").read_text() == "1"
    given.setting("forwarding").write_text("0\n")
    await given.host.reconcile()
    assert given.setting("forwarding").read_text() == "1"
    assert given.noted["sysctls"] == {f"{IPV4}/eth0/forwarding": "0", f"{IPV4}/eth0/accept_local": "0"}


@given
async def test_a_strict_reverse_path_filter_that_comes_later_is_loosened(given: Given) -> None:
    await given.begin(NAT)
    given.setting("rp_filter", "all").write_text("1\n")
    await given.host.reconcile()
    assert given.setting("rp_filter").read_text() == "2"


@given
async def test_pinned_settings_are_told_at_the_start_too(given: Given) -> None:
    await given.begin(replace(NAT, host=HostUpkeep(settings=Upkeep.ALARM)))
    assert given.setting("forwarding").read_text() == "0\n"
    about = {f"net.ipv4.conf.eth0.{name}" for name in ("forwarding", "accept_local")}
    assert given.told == {("setting-changed", name) for name in about}
    for name in ("forwarding", "accept_local"):
        given.setting(name).write_text("1\n")
    await given.host.reconcile()
    assert not given.alarms


@given
async def test_a_renamed_interface_is_the_same_one(given: Given) -> None:
    await given.begin(NAT)
    given.kernel.links = [replace(FRONT, name="wan")]
    await given.host.reconcile()
    assert [interface.name for interface in given.host.interfaces] == ["wan"] and not given.alarms
    assert given.noted["addresses"] == [["wan", str(VIP)]]
    assert given.setting("forwarding", "wan").read_text() == "1"


@given
async def test_one_that_is_gone_is_an_alarm_until_it_is_back_and_then_all_is_done_again(given: Given) -> None:
    await given.begin(NAT)
    given.kernel.links = []
    given.kernel.present.clear()
    await given.host.reconcile()
    assert ("interface-gone", "eth0") in given.told
    for name in ("forwarding", "accept_local"):
        given.setting(name).write_text("0\n")
    given.kernel.links = [replace(FRONT, index=9)]
    await given.host.reconcile()
    assert not given.alarms and given.kernel.present == {VIP}
    assert given.setting("forwarding").read_text() == "1"
    assert given.noted["interfaces"]["eth0"][0] == 9 and given.host.interfaces[0].index == 9


@given
async def test_addresses_are_announced_again_once_the_link_is_back(given: Given) -> None:
    await given.begin(WEB)
    given.kernel.links = [replace(FRONT, carrier=False)]
    await given.host.reconcile()
    assert given.told == {("interface-down", "eth0")}
    given.kernel.links = [FRONT]
    announced: list[list[Any]] = []
    given.host._addresses._announce = announced.append  # type: ignore[method-assign]
    await given.host.reconcile()
    assert announced == [[(FRONT, VIP)]] and not given.alarms


@given
async def test_what_cannot_be_mended_is_an_alarm_and_not_tried_at_every_look(given: Given) -> None:
    await given.begin(WEB)
    given.kernel.present.clear()
    given.kernel.refuses = {f"add {VIP}": NotPrivileged("cannot add it", "be root")}
    for _ in range(9):
        await given.host.reconcile()
    assert given.told == {("address-missing", str(VIP))}
    given.kernel.refuses = {}
    await given.host.reconcile()
    assert not given.kernel.present, "it waits a second"
    given.now += 1
    await given.host.reconcile()
    assert given.kernel.present == {VIP}


@given
async def test_what_flaps_stays_an_alarm_until_it_is_calm(given: Given) -> None:
    await given.begin(WEB)
    for _ in range(5):
        given.kernel.present.clear()
        await given.host.reconcile()
    given.kernel.present.clear()
    await given.host.reconcile()
    (alarm,) = given.alarms
    assert not given.kernel.present and "(mended 5 times within a minute)" in alarm.text
    given.now += 1
    await given.host.reconcile()
    assert given.kernel.present == {VIP} and given.alarms
    given.now += 63
    await given.host.reconcile()
    assert not given.alarms


@given
async def test_events_are_looked_at_at_once_and_errors_end_nothing(given: Given) -> None:
    await given.begin(WEB)
    keeping = asyncio.create_task(given.host.run())
    await asyncio.sleep(0.3)
    observe = given.kernel.observe
    given.kernel.observe = fails  # type: ignore[method-assign,assignment]
    given.kernel.present.clear()
    given.kernel.changed.set()
    while not given.alarms:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert given.told == {("host-unknown", "")}
    given.kernel.observe = observe  # type: ignore[method-assign]
    given.kernel.changed.set()
    while given.alarms or VIP not in given.kernel.present:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)


async def fails(index: int) -> None:
    raise XdplbError("the kernel does not answer", "wait")


@given
async def test_what_is_mended_is_logged_once(given: Given) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("xdplb").addHandler(handler)
    try:
        await given.begin(WEB)
        lines.clear()
        given.kernel.present.clear()
        for _ in range(3):
            await given.host.reconcile()
    finally:
        logging.getLogger("xdplb").removeHandler(handler)
    assert lines == [f"{VIP} was missing on eth0: added again"]


@given
async def test_what_another_instance_relies_on_is_known(given: Given) -> None:
    await given.begin(WEB)
    assert given.noted["relies"] == [str(VIP)]


@given
async def test_what_lies_with_other_hosts_is_told(given: Given) -> None:
    await given.begin(WEB)
    given.kernel.programs[FRONT.index] = Attached(7, AttachMode.NATIVE)
    given.kernel.redirects = False
    unfinished, finished = bytes.fromhex("02000000aaaa"), bytes.fromhex("02000000bbbb")
    given.kernel.senders = {unfinished: False, finished: True}
    await given.host._surroundings.listen()
    await given.host.reconcile()
    expected = {("egress-no-redirect", "eth0"), ("checksums-unfinished", "eth0 02:00:00:00:aa:aa")}
    assert given.told == expected
    given.kernel.senders = {}
    await given.host._surroundings.listen()
    await given.host.reconcile()
    assert given.told == expected, "it was only silent"
    given.kernel.redirects, given.kernel.senders = None, {unfinished: True}
    await given.host._surroundings.listen()
    await given.host.reconcile()
    assert not given.told
