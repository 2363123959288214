"""Service addresses: added where this host lacks them, noted first, and only the own ones taken back."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest
from edges import FRONT, Kernel, config, service

from xdplb.daemon.addresses import Addresses
from xdplb.dataplane.manifest import Manifest
from xdplb.errors import XdplbError
from xdplb.model import Forward, Listen, Protocol
from xdplb.paths import Instance

VIP, SIX, POOL = IPv4Address("203.0.113.1"), IPv6Address("2001:db8::1"), IPv4Address("10.0.0.100")
WEB = service("a")
WEB6 = replace(WEB, name="web6", listen=Listen(SIX, 80, 80, Protocol.TCP))


@pytest.fixture
def instance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Instance:
    monkeypatch.setenv("XDPLB_RUNTIME_DIRECTORY", str(tmp_path))
    made = Instance("eth0")
    made.runtime.mkdir()
    return made


def noted(instance: Instance) -> list[list[str]]:
    return list(json.loads(instance.manifest.read_text())["addresses"])


def test_what_is_missing_is_added_and_what_was_there_is_nobodys_business(instance: Instance) -> None:
    kernel, notes = Kernel(addresses={VIP}), Manifest([], "", {}, {})
    addresses = Addresses(kernel, instance, [FRONT], notes)
    full_nat = replace(WEB, name="full", forward=Forward.FULL_NAT)
    asyncio.run(addresses.add(replace(config(full_nat, WEB6), source_pool=(POOL,))))
    assert kernel.log == [f"add {SIX}", f"add {POOL}"]
    assert noted(instance) == [["eth0", str(SIX)], ["eth0", str(POOL)]]
    asyncio.run(addresses.remove(None))
    assert kernel.present == {VIP} and notes.addresses == []


def test_only_what_a_configuration_needs_no_more_goes(instance: Instance) -> None:
    kernel, notes = Kernel(), Manifest([], "", {}, {})
    addresses = Addresses(kernel, instance, [FRONT], notes)
    asyncio.run(addresses.add(config(WEB, WEB6)))
    asyncio.run(addresses.remove(config(WEB)))
    assert kernel.present == {VIP} and notes.addresses == [["eth0", str(VIP)]]


def test_what_was_about_to_be_added_is_noted_before_the_kernel_refuses(instance: Instance) -> None:
    kernel, notes = Kernel(), Manifest([], "", {}, {})
    kernel.refuses = {f"add {SIX}": XdplbError(f"cannot add the address {SIX}")}
    with pytest.raises(XdplbError):
        asyncio.run(Addresses(kernel, instance, [FRONT], notes).add(config(WEB, WEB6)))
    assert ["eth0", str(SIX)] in noted(instance) and kernel.log == [f"add {VIP}"]


def test_asking_twice_notes_it_once(instance: Instance) -> None:
    kernel, notes = Kernel(), Manifest([], "", {}, {})
    addresses = Addresses(kernel, instance, [FRONT], notes)
    for _ in range(2):
        asyncio.run(addresses.add(config(WEB)))
        kernel.present.clear()
    assert notes.addresses == [["eth0", str(VIP)]]
