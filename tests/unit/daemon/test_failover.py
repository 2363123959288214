"""From a status to the maps: the flag of a backend that cannot serve goes at once, slots follow, one plan for all."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from edges import UNCHECKED, Plane, Writing, config, engine, service

from xdplb.abi import BackendFlag
from xdplb.core.operations import PutBackend, PutSlots
from xdplb.core.status import BackendStatus, NextHop, Statuses
from xdplb.daemon.engine import Engine
from xdplb.daemon.failover import Failover
from xdplb.model import Admin, BackendKey, Check, HealthState, OnAllDown, OnDown

A, B = BackendKey("web", "a"), BackendKey("web", "b")
NEXT_HOP = NextHop(2, bytes.fromhex("020000000002"), bytes.fromhex("0200000000aa"), None, 1500)
UP = BackendStatus(HealthState.UP, next_hop=NEXT_HOP)


class House:
    """A service of two backends that are up, in the maps already; `did` is what was written since."""

    def __init__(self, check: Check = UNCHECKED, **settings: object) -> None:
        self.statuses = Statuses()
        self.writing = Writing()
        self.saved = 0
        self.engine: Engine | None = engine(
            Plane("maps", []), config(service("a", "b", check=check, **settings)), self.statuses, self.writing
        )
        for key in (A, B):
            self.statuses.set(key, UP)
        self.engine.apply_all()
        self.writing.done.clear()
        self.failover = Failover(self.statuses, lambda: self.engine, self._save)

    def _save(self) -> None:
        self.saved += 1

    def change(self, key: BackendKey, **status: object) -> None:
        self.statuses.set(key, replace(self.statuses.get(key), **status))
        self.failover.on_change(key)

    def flags(self, key: BackendKey) -> BackendFlag:
        assert self.engine is not None
        return self.engine.applied.backends[key][1].flags

    @property
    def slots(self) -> set[int]:
        assert self.engine is not None
        return set(self.engine.applied.services["web"].table.tolist())


def in_loop(house: House, *changes: tuple[BackendKey, dict[str, object]]) -> None:
    """All changes within one turn of the event loop; back when the next one is over."""

    async def turn() -> None:
        for key, status in changes:
            house.change(key, **status)
        await asyncio.sleep(0)

    asyncio.run(turn())


@pytest.mark.parametrize(
    "status",
    [{"health": HealthState.DOWN}, {"admin": Admin.MAINT}, {"next_hop": None}],
    ids=["down", "maint", "no way"],
)
def test_the_flag_goes_before_the_call_returns_and_the_slots_when_the_turn_is_over(status: dict[str, object]) -> None:
    house = House()

    async def turn() -> None:
        house.change(A, **status)
        assert BackendFlag.UP not in house.flags(A)
        assert [type(done) for done in house.writing.done] == [PutBackend]
        assert house.slots == {1, 2}
        await asyncio.sleep(0)
        assert house.slots == {2}

    asyncio.run(turn())
    assert house.saved == 1


def test_one_that_drains_keeps_its_flag_and_gives_its_slots() -> None:
    house = House()
    in_loop(house, (A, {"admin": Admin.DRAIN}))
    assert BackendFlag.UP in house.flags(A) and house.slots == {2}


@pytest.mark.parametrize(
    ("status", "keeps"),
    [({"health": HealthState.DOWN}, True), ({"admin": Admin.MAINT}, False), ({"next_hop": None}, False)],
    ids=["down", "maint", "no way"],
)
def test_on_down_keep_holds_for_one_that_is_down_and_for_no_other(status: dict[str, object], keeps: bool) -> None:
    """Its flows are its own while it is down; one in maintenance takes no packet at all, from that moment on."""
    house = House(on_down=OnDown.KEEP)
    assert BackendFlag.KEEP in house.flags(A)

    async def turn() -> None:
        house.change(A, **status)
        at_once = house.flags(A)
        assert (BackendFlag.UP in at_once, BackendFlag.KEEP in at_once) == (False, keeps)
        await asyncio.sleep(0)
        assert (BackendFlag.KEEP in house.flags(A)) is keeps

    asyncio.run(turn())


def test_several_changes_of_one_turn_share_a_plan() -> None:
    house = House()
    in_loop(house, (A, {"health": HealthState.DOWN}), (A, {"health": HealthState.UP}), (B, {"weight": 3}))
    assert (house.saved, house.slots) == (1, {1, 2})
    assert [type(done) for done in house.writing.done].count(PutSlots) == 1


def test_who_serves_although_all_are_down_is_a_matter_of_all() -> None:
    house = House(on_all_down=OnAllDown.FAIL_OPEN)
    in_loop(house, (A, {"health": HealthState.DOWN}), (B, {"health": HealthState.DOWN}))
    assert house.slots == {1, 2} and BackendFlag.UP in house.flags(A) & house.flags(B)


def test_repair_does_it_now() -> None:
    house = House()

    async def turn() -> None:
        house.change(A, health=HealthState.DOWN)
        house.failover.repair("web")
        assert house.slots == {2} and house.saved == 1
        await asyncio.sleep(0)
        assert house.saved == 1

    asyncio.run(turn())


def test_before_the_start_there_is_nothing_to_do() -> None:
    house = House()
    house.engine = None
    in_loop(house, (A, {"health": HealthState.DOWN}))
    house.failover.repair("web")
    assert (house.writing.done, house.saved) == ([], 0)


def test_a_service_that_went_meanwhile_is_passed_over() -> None:
    house = House()

    async def turn() -> None:
        house.change(A, health=HealthState.DOWN)
        house.statuses.by_service.clear()
        house.failover.repair("web")

    asyncio.run(turn())
    assert house.saved == 1
