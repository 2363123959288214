"""Service addresses: added where this host lacks them, noted first, and only the own ones taken back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import pytest
from edges import FRONT, Kernel, config, service

from xdplb.daemon.addresses import Addresses
from xdplb.daemon.alarms import Alarms
from xdplb.daemon.ledger import Ledger
from xdplb.daemon.ports import Ports
from xdplb.errors import XdplbError
from xdplb.model import Forward, HostUpkeep, Listen, Protocol, Upkeep

VIP, SIX, POOL = IPv4Address("203.0.113.1"), IPv6Address("2001:db8::1"), IPv4Address("10.0.0.100")
WEB = service("a")
WEB6 = replace(WEB, name="web6", listen=Listen(SIX, 80, 80, Protocol.TCP))
ELSEWHERE = bytes.fromhex("02000000ee15")


class Given:
    """Addresses of a host with one interface."""

    def __init__(self, directory: Path, kernel: Kernel | None = None) -> None:
        self.kernel = kernel or Kernel()
        self.alarms = Alarms()
        self.ledger = Ledger(directory / "host.json")
        self.ports = Ports(self.kernel, [FRONT], self.ledger)
        self.addresses = Addresses(self.kernel, self.ports, self.ledger, self.alarms)

    def run(self, *steps: Coroutine[Any, Any, object]) -> list[Any]:
        """Without the announcements, which would take their time."""

        async def one_after_the_other() -> list[object]:
            done = [await step for step in steps]
            self.addresses.close()
            return done

        return asyncio.run(one_after_the_other())

    @property
    def noted(self) -> list[list[str]]:
        return list(json.loads(self.ledger.path.read_text())["addresses"])


def test_what_is_missing_is_added_and_what_was_there_is_nobodys_business(tmp_path: Path) -> None:
    given = Given(tmp_path, Kernel(addresses={VIP}))
    full_nat = replace(WEB, name="full", forward=Forward.FULL_NAT)
    given.run(given.addresses.add(replace(config(full_nat, WEB6), source_pool=(POOL,))))
    assert given.kernel.log == [f"add {SIX}", f"add {POOL}"]
    assert given.noted == [["eth0", str(SIX)], ["eth0", str(POOL)]]
    given.run(given.addresses.remove(None))
    assert given.kernel.present == {VIP} and given.ledger.addresses == []


def test_only_what_a_configuration_needs_no_more_goes(tmp_path: Path) -> None:
    given = Given(tmp_path)
    given.run(given.addresses.add(config(WEB, WEB6)), given.addresses.remove(config(WEB)))
    assert given.kernel.present == {VIP} and given.noted == [["eth0", str(VIP)]]


def test_what_was_about_to_be_added_is_noted_before_the_kernel_refuses(tmp_path: Path) -> None:
    given = Given(tmp_path)
    given.kernel.refuses = {f"add {SIX}": XdplbError(f"cannot add the address {SIX}")}
    with pytest.raises(XdplbError):
        given.run(given.addresses.add(config(WEB, WEB6)))
    assert ["eth0", str(SIX)] in given.noted and given.kernel.log == [f"add {VIP}"]


def test_nothing_is_added_that_cannot_be_noted(tmp_path: Path) -> None:
    given = Given(tmp_path)
    given.ledger.path.mkdir()
    with pytest.raises(XdplbError, match="cannot be written"):
        given.run(given.addresses.add(config(WEB)))
    assert given.kernel.log == [] and given.ledger.addresses == []


def test_asking_twice_notes_it_once(tmp_path: Path) -> None:
    given = Given(tmp_path)
    for _ in range(2):
        given.run(given.addresses.add(config(WEB)))
        given.kernel.present.clear()
    assert given.noted == [["eth0", str(VIP)]]


def test_an_address_is_announced_three_times_once_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xdplb.daemon.addresses.ANNOUNCE_AFTER_S", (0.0, 0.01, 0.02))
    given = Given(tmp_path)
    given.run(given.addresses.add(config(WEB)), asyncio.sleep(0.1))
    assert given.kernel.log == [f"add {VIP}", *[f"announce {VIP} on eth0"] * 3]


def test_an_address_that_another_host_answers_for_is_taken_with_an_alarm(tmp_path: Path) -> None:
    given = Given(tmp_path)
    given.kernel.elsewhere[VIP] = ELSEWHERE
    given.run(given.addresses.add(config(WEB)))
    (alarm,) = given.alarms
    assert (alarm.name, alarm.about) == ("address-conflict", str(VIP)) and "02:00:00:00:ee:15" in alarm.text
    (told,) = given.run(given.addresses.differences(config(WEB)))
    assert [difference.alarm for difference in told] == ["address-conflict"]
    given.kernel.elsewhere.clear()
    assert given.run(given.addresses.look_at_owners(config(WEB)), given.addresses.differences(config(WEB)))[1] == []


def missing(given: Given, **host: Any) -> Any:
    """The one difference there is, with `host` as the file has it."""
    wanted = replace(config(WEB), host=HostUpkeep(**host))
    _, found = given.run(given.ports.look(), given.addresses.differences(wanted))
    (difference,) = found
    return difference


def test_one_that_went_is_put_back(tmp_path: Path) -> None:
    given = Given(tmp_path)
    given.run(given.addresses.add(config(WEB)))
    given.kernel.present.clear()
    given.run(missing(given).mend())
    assert given.kernel.present == {VIP} and given.noted == [["eth0", str(VIP)]]


def test_one_that_others_gave_this_host_is_not_put_back_where_another_host_has_it_now(tmp_path: Path) -> None:
    """So do keepalived and its like: the address has moved, and that is no mistake."""
    given = Given(tmp_path)
    difference = missing(given)
    given.kernel.elsewhere[VIP] = ELSEWHERE
    with pytest.raises(XdplbError, match="02:00:00:00:ee:15 answers for it"):
        given.run(difference.mend())
    assert given.kernel.present == set()
    given.kernel.elsewhere.clear()
    given.run(difference.mend())
    assert given.kernel.present == {VIP}


def test_what_is_not_to_be_mended_is_told_with_the_command_that_would(tmp_path: Path) -> None:
    difference = missing(Given(tmp_path), addresses=Upkeep.ALARM)
    assert difference.mend is None and difference.fix == f"ip address add {VIP}/32 dev eth0"
    untouched = Given(tmp_path)
    untouched.run(untouched.addresses.add(replace(config(WEB), host=HostUpkeep(addresses=Upkeep.ALARM))))
    assert untouched.kernel.log == []


@pytest.mark.parametrize(("up", "vip", "possible"), [(False, VIP, True), (False, SIX, False), (True, SIX, True)])
def test_ipv6_addresses_come_back_with_the_link(tmp_path: Path, up: bool, vip: Any, possible: bool) -> None:
    given = Given(tmp_path)
    given.kernel.links = [replace(FRONT, up=up)]
    wanted = config(WEB if vip is VIP else WEB6)
    _, (difference,) = given.run(given.ports.look(), given.addresses.differences(wanted))
    assert (difference.mend is not None) == possible
