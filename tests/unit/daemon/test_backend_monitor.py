"""What is known of a backend, put together: checks, next hops, an operator's word, and what an earlier daemon noted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

from edges import BACKEND_MAC, TCP, UNCHECKED, Kernel, config, inside, service

from xdplb.checks.attempt import Verdict
from xdplb.checks.coroutines import open_coroutines
from xdplb.checks.endpoint import Endpoint
from xdplb.core.health import AgentWord
from xdplb.core.status import AgentState
from xdplb.daemon.backend_monitor import BackendMonitor
from xdplb.daemon.overrides import Overrides
from xdplb.dataplane.manifest import Manifest, ServiceRecord
from xdplb.model import Admin, BackendKey, CheckType, HealthState
from xdplb.net.next_hop_watcher import DEBOUNCE_S

A, B = BackendKey("web", "a"), BackendKey("web", "b")
ALIVE, DEAD = Verdict(True, "L4OK"), Verdict(False, "L4CON", "connection refused")


class House:
    """A monitor whose checks end as `answers` says, by address; None: never. `changed` is who was told of, in order."""

    def __init__(self, tmp_path: Path) -> None:
        self.answers: dict[str, Verdict | None] = {}
        self.changed: list[BackendKey] = []
        self.heard = asyncio.Event()
        self.overrides = Overrides(tmp_path / "overrides.json")
        self.kernel = Kernel()
        self.monitor = BackendMonitor(
            self.kernel,
            self.overrides,
            self._on_change,
            lambda event: None,
            open_checker=open_coroutines(self._perform),
        )

    async def _perform(self, endpoint: Endpoint) -> Verdict:
        answer = self.answers.get(str(endpoint.address), ALIVE)
        if answer is None:
            await asyncio.get_running_loop().create_future()
        assert answer is not None
        return answer

    def _on_change(self, key: BackendKey) -> None:
        self.changed.append(key)
        self.heard.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            self.heard.clear()
            await self.heard.wait()


in_house = inside(House)


@in_house
async def test_first_verdicts_are_waited_for_with_the_way_there(house: House) -> None:
    house.answers["10.0.0.2"] = DEAD
    two = config(service("a", "b"))
    house.monitor.follow(two)
    assert house.monitor.statuses.get(A).health is HealthState.UNKNOWN
    await house.monitor.first_verdicts()
    assert [house.monitor.statuses.get(key).health for key in (A, B)] == [HealthState.UP, HealthState.DOWN]
    next_hop = house.monitor.statuses.get(A).next_hop
    assert next_hop is not None and next_hop.dest_mac == BACKEND_MAC
    assert house.monitor.health[B].reason == "L4CON"


@in_house
async def test_a_status_is_told_once_for_each_change_and_after_it_holds(house: House) -> None:
    one = config(service("a", check=replace(TCP, interval_s=0.01)))
    house.monitor.follow(one)
    await house.monitor.first_verdicts()
    house.changed.clear()
    house.answers["10.0.0.1"] = DEAD
    await house.until(lambda: house.monitor.statuses.get(A).health is HealthState.DOWN)
    assert house.changed == [A]


@in_house
async def test_an_operators_word_holds_over_verdicts(house: House) -> None:
    one = config(service("a"))
    house.monitor.follow(one)
    await house.monitor.first_verdicts()
    house.monitor.override(A, Admin.DRAIN, 5)
    status = house.monitor.statuses.get(A)
    assert (status.admin, status.weight, status.health) == (Admin.DRAIN, 5, HealthState.UP)
    assert house.changed[-1] == A


@in_house
async def test_what_was_set_by_hand_comes_back_with_the_configuration(house: House) -> None:
    two = config(service("a", "b", check=UNCHECKED))
    house.overrides.set(B, two.services[0].backends[1], Admin.MAINT, None)
    house.monitor.follow(two)
    assert [house.monitor.statuses.get(key).admin for key in (A, B)] == [Admin.ACTIVE, Admin.MAINT]


@in_house
async def test_the_health_that_an_earlier_daemon_noted_holds_until_there_is_a_verdict(house: House) -> None:
    house.answers |= {"10.0.0.1": None, "10.0.0.2": None}
    left = Manifest(["eth0"], "/pins", {}, {})
    left.services["web"] = ServiceRecord(1, 0, 128, "dsr", {"a": 1, "b": 2})
    left.health = {"web/a": ["up", "L4OK", 17.0], "web/b": ["down", "L4CON", 18.0]}
    house.monitor.follow(config(service("a", "b")), left)
    assert [house.monitor.statuses.get(key).health for key in (A, B)] == [HealthState.UP, HealthState.DOWN]
    assert (house.monitor.health[B].reason, house.monitor.health[B].since) == ("L4CON", 18.0)


@in_house
async def test_the_noted_health_of_another_address_says_nothing(house: House) -> None:
    house.answers["10.0.0.1"] = None
    left = Manifest(["eth0"], "/pins", {}, {})
    left.services["web"] = ServiceRecord(1, 0, 128, "dsr", {"a": 1})
    left.health = {"web/a": ["up", "L4OK", 17.0, "10.0.0.99 80"]}
    house.monitor.follow(config(service("a")), left)
    assert house.monitor.statuses.get(A).health is HealthState.UNKNOWN


@in_house
async def test_what_is_noted_is_what_the_next_daemon_takes_for_known(house: House) -> None:
    house.monitor.follow(config(service("a")))
    await house.monitor.first_verdicts()
    notes = Manifest(["eth0"], "/pins", {}, {})
    house.monitor.as_it_is()(notes)
    assert notes.health["web/a"][:2] == ["up", "L4OK"] and notes.health["web/a"][3] == "10.0.0.1 80"


@in_house
async def test_a_candidate_is_checked_and_nothing_of_it_acts_until_it_is_followed(house: House) -> None:
    one, two = config(service("a")), config(service("a", "b"))
    house.answers["10.0.0.2"] = DEAD
    house.monitor.follow(one)
    await house.monitor.first_verdicts()
    house.changed.clear()
    await house.monitor.look_ahead(two)
    assert set(house.monitor.health) == {A} == set(map(BackendKey, ["web"], house.monitor.statuses.by_service["web"]))
    assert house.changed == []
    house.monitor.follow(two)
    assert house.monitor.statuses.get(B).health is HealthState.DOWN


@in_house
async def test_a_backend_that_moves_is_what_it_was_until_the_configuration_is_in_force(house: House) -> None:
    """The same name, another address: neither its verdict nor its next hop acts on the one in force."""
    before = config(service("a"))
    moved = config(replace(service("a"), backends=(replace(service("a").backends[0], address=ip_address("10.0.0.7")),)))
    house.answers["10.0.0.7"] = DEAD
    house.monitor.follow(before)
    await house.monitor.first_verdicts()
    house.changed.clear()
    await house.monitor.look_ahead(moved)
    house.monitor.look_back()
    assert house.changed == [] and house.monitor.statuses.get(A).health is HealthState.UP
    await house.monitor.look_ahead(moved)
    house.monitor.follow(moved)
    assert house.monitor.statuses.get(A).health is HealthState.DOWN


@in_house
async def test_a_verdict_counts_until_the_changed_check_has_one(house: House) -> None:
    """`http` in place of `tcp`, and the first answer takes its time: nobody is unknown meanwhile."""
    house.monitor.follow(config(service("a")))
    await house.monitor.first_verdicts()
    house.answers["10.0.0.1"] = None
    house.monitor.follow(config(service("a", check=replace(TCP, timeout_s=60.0))))
    assert house.monitor.statuses.get(A).health is HealthState.UP


@in_house
async def test_a_backend_that_the_file_drops_is_forgotten(house: House) -> None:
    house.monitor.follow(config(service("a", "b", check=UNCHECKED)))
    house.monitor.follow(config(service("a", check=UNCHECKED)))
    assert set(house.monitor.health) == {A} and set(house.monitor.statuses.by_service["web"]) == {"a"}


AGENT = replace(TCP, type=CheckType.AGENT, interval_s=0.01)


@in_house
async def test_a_silent_backend_has_its_next_hop_asked_for_once(house: House) -> None:
    silent = Verdict(False, "L4TOUT", "no connection within 1s")
    house.kernel.fixed = False
    house.monitor.follow(config(service("a", check=replace(TCP, interval_s=0.01, fall=2))))
    await house.monitor.first_verdicts()
    assert not house.kernel.log
    house.answers["10.0.0.1"] = silent
    await house.until(lambda: house.monitor.statuses.get(A).health is HealthState.DOWN)
    await asyncio.sleep(2 * DEBOUNCE_S)
    assert house.kernel.log == ["ask for 10.0.0.1 in the name of 10.0.0.254"]


def says(admin: Admin | None, percent: int | None = None, ok: bool = True) -> Verdict:
    return Verdict(ok, "L7OK" if ok else "L7STS/down", "", AgentWord(admin, percent))


@in_house
async def test_an_agent_drains_its_backend_and_gives_it_a_share(house: House) -> None:
    house.answers["10.0.0.1"] = says(Admin.DRAIN, 50)
    house.monitor.follow(config(service("a", "b", check=AGENT)))
    await house.monitor.first_verdicts()
    status = house.monitor.statuses.get(A)
    assert (status.standing, status.admin, status.agent.percent) == (Admin.DRAIN, Admin.ACTIVE, 50)
    house.changed.clear()
    house.answers["10.0.0.1"] = says(Admin.ACTIVE)
    await house.until(lambda: house.monitor.statuses.get(A).standing is Admin.ACTIVE)
    assert (house.changed, house.monitor.statuses.get(A).agent.percent) == ([A], 50)


@in_house
async def test_what_an_agent_said_outlives_a_reload_but_not_its_check(house: House) -> None:
    house.answers["10.0.0.1"] = says(Admin.MAINT)
    house.monitor.follow(config(service("a", check=AGENT)))
    await house.monitor.first_verdicts()
    house.monitor.follow(config(service("a", check=replace(AGENT, fall=7))))
    assert house.monitor.statuses.get(A).standing is Admin.MAINT
    house.monitor.follow(config(service("a")))
    assert house.monitor.statuses.get(A).agent == AgentState()


@in_house
async def test_what_the_agent_of_a_candidate_says_acts_with_its_configuration(house: House) -> None:
    house.answers["10.0.0.2"] = says(Admin.DRAIN)
    house.monitor.follow(config(service("a", check=AGENT)))
    await house.monitor.first_verdicts()
    await house.monitor.look_ahead(config(service("a", "b", check=AGENT)))
    house.monitor.follow(config(service("a", "b", check=AGENT)))
    assert house.monitor.statuses.get(B).standing is Admin.DRAIN


@in_house
async def test_what_routers_report_of_ways_is_told_and_goes_with_the_report(house: House) -> None:
    two = config(service("a", "b"))
    house.monitor.follow(two)
    await house.monitor.first_verdicts()
    house.changed.clear()
    a, b = (house.monitor._targets[key].address for key in (A, B))
    house.monitor.note_path_mtus({a: 1400, ip_address("10.9.9.9"): 1300})
    assert [house.monitor.statuses.get(key).path_mtu for key in (A, B)] == [1400, None]
    house.monitor.follow(two)
    house.monitor.note_path_mtus({b: 1450})
    assert [house.monitor.statuses.get(key).path_mtu for key in (A, B)] == [None, 1450]
    assert house.changed == [A, A, B] or house.changed == [A, B, A]
