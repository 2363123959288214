"""Who is checked when: against real servers where the wire matters, against a gate of our own where it does not."""

from __future__ import annotations

import asyncio
import errno
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from probing import NEVER_S, Watch, in_loop, probing, serving, silent, target

from xdplb.checks.attempt import Verdict
from xdplb.checks.coroutines import open_coroutines
from xdplb.checks.endpoint import Endpoint
from xdplb.checks.scheduler import FIRST_CHECKS_PER_S, FIRST_CHECKS_WITHIN_S, first_checks_within_s, next_start
from xdplb.checks.targets import Target
from xdplb.core.health import CheckResult
from xdplb.model import BackendKey, Check, CheckType

SOON = Check(interval_s=0.01, fast_interval_s=0.005, timeout_s=10)
LOCALHOST = ip_address("127.0.0.1")

phases = st.floats(0, 1, exclude_max=True)
intervals = st.floats(0.05, 3600)


class Gate:
    """Instead of the wire: checks wait until the test lets them through, and are counted."""

    def __init__(self, *, opened: bool = False) -> None:
        self.open = asyncio.Event()
        if opened:
            self.open.set()
        self.arrived: asyncio.Queue[int] = asyncio.Queue()
        self.inside = 0
        self.most_inside = 0
        self.trouble: dict[int, list[Exception]] = {}

    def ports(self) -> list[int]:
        """Of the checks so far that the test has not yet seen arrive."""
        return [self.arrived.get_nowait() for _ in range(self.arrived.qsize())]

    async def __call__(self, endpoint: Endpoint) -> Verdict:
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        self.arrived.put_nowait(endpoint.port)
        try:
            await self.open.wait()
            if self.trouble.get(endpoint.port):
                raise self.trouble[endpoint.port].pop(0)
            return Verdict(True, "L4OK")
        finally:
            self.inside -= 1


def gated(port: int, name: str | None = None, check: Check = SOON) -> Target:
    return target(name or f"b{port}", "127.0.0.1", port, check)


@given(st.floats(0, 1e7), intervals, phases)
def test_steady_checks_are_never_further_apart_than_the_interval(
    started: float, interval_s: float, phase: float
) -> None:
    gap = next_start(started, interval_s, Check(interval_s=interval_s), phase) - started
    assert 0 < gap <= interval_s * 1.0011


@given(st.floats(0, 1e6), intervals, phases, st.lists(st.floats(-0.0005, 0.1), max_size=20))
def test_steady_checks_do_not_drift_when_timers_are_late(
    started: float, interval_s: float, phase: float, lateness: list[float]
) -> None:
    check = Check(interval_s=interval_s)
    first = due = next_start(started, interval_s, check, phase)
    for late in lateness:
        due = next_start(due + late * interval_s, interval_s, check, phase)
    assert due - first == pytest.approx(len(lateness) * interval_s, rel=1e-6, abs=1e-6)


@given(st.floats(0, 1e7), st.floats(0.05, 100), phases)
def test_a_pending_verdict_is_checked_exactly_after_the_fast_interval(
    started: float, fast_interval_s: float, phase: float
) -> None:
    check = Check(interval_s=200.0, fast_interval_s=fast_interval_s)
    assert next_start(started, fast_interval_s, check, phase) == started + fast_interval_s


def test_endpoints_that_start_together_part_over_the_whole_interval() -> None:
    check = Check(interval_s=2.0)
    endpoints = [Endpoint(ip_address(f"10.0.{i // 250}.{i % 250}"), 80, check) for i in range(1000)]
    due = [next_start(50.0, 2.0, check, endpoint.phase) for endpoint in endpoints]
    tenths = Counter(int((at - 50.0) / 0.2) for at in due)
    assert set(tenths) <= set(range(11))
    assert all(60 <= tenths[tenth] <= 140 for tenth in range(10))  # 100 ± 4 standard deviations


def test_phases_are_the_same_in_every_process() -> None:
    program = (
        "import ipaddress, xdplb.checks.endpoint as c, xdplb.model as m;"
        "print(c.Endpoint(ipaddress.ip_address('127.0.0.1'), 80, m.Check()).phase)"
    )
    there = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert float(there) == Endpoint(LOCALHOST, 80, Check()).phase


@given(st.integers(1, 100_000), intervals)
def test_first_checks_come_soon_but_no_faster_than_the_limit(count: int, interval_s: float) -> None:
    within_s = first_checks_within_s(count, interval_s)
    assert within_s <= interval_s
    if count <= FIRST_CHECKS_PER_S * FIRST_CHECKS_WITHIN_S:
        assert within_s <= FIRST_CHECKS_WITHIN_S
    elif within_s < interval_s:
        assert count / within_s == pytest.approx(FIRST_CHECKS_PER_S)


@in_loop
async def test_targets_with_the_same_endpoint_share_one_probe() -> None:
    connections = 0

    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await silent(reader, writer)

    watch = Watch()
    async with serving(count) as port:
        shared = [target(f"s{i}", "127.0.0.1", port, SOON) for i in range(3)]
        other = target("other", "127.0.0.1", port, replace(SOON, fall=7))
        async with probing(watch, [*shared, other]):
            assert await watch.names(4) == ["other", "s0", "s1", "s2"]
    assert connections == 2


@in_loop
async def test_the_shared_probe_serves_its_most_hurried_target() -> None:
    class Uneven(Watch):
        def next_interval(self, key: BackendKey) -> float:
            return 0.005 if key.backend == "hurried" else super().next_interval(key)

    watch = Uneven()
    async with probing(watch, [gated(1, "calm"), gated(1, "hurried")], open_checker=open_coroutines(Gate(opened=True))):
        assert await watch.names(6) == ["calm"] * 3 + ["hurried"] * 3


@in_loop
async def test_checks_repeat_as_the_owner_wants() -> None:
    watch = Watch(interval_s=SOON.interval_s)
    async with serving(silent) as port, probing(watch, [target("a", "127.0.0.1", port, SOON)]):
        results = [await watch.result() for _ in range(5)]
    assert [(result.ok, result.reason) for result in results] == [(True, "L4OK")] * 5


@in_loop
async def test_no_check_is_no_probe() -> None:
    watch, gate = Watch(), Gate(opened=True)
    unchecked = gated(1, "unchecked", replace(SOON, type=CheckType.NONE))
    async with probing(watch, [unchecked, gated(2)], open_checker=open_coroutines(gate)) as prober:
        prober.burst(LOCALHOST)
        assert await watch.names(1) == ["b2"]
    assert gate.arrived.qsize() == 1


@in_loop
async def test_a_burst_checks_everything_at_the_address_at_once() -> None:
    """Whose next check by itself would be in an hour."""
    watch = Watch()
    elsewhere = target("elsewhere", "127.0.0.2", 1, SOON)
    async with probing(
        watch, [gated(1), gated(2), elsewhere], open_checker=open_coroutines(Gate(opened=True))
    ) as prober:
        assert await watch.names(3) == ["b1", "b2", "elsewhere"]
        for _ in range(3):
            prober.burst(LOCALHOST)
            assert await watch.names(2) == ["b1", "b2"]
        assert watch.heard.empty()


@in_loop
async def test_a_burst_is_followed_by_fast_checks_until_the_owner_has_its_verdict() -> None:
    class Owner(Watch):
        doubts = 0

        def next_interval(self, key: BackendKey) -> float:
            self.doubts -= 1
            return SOON.fast_interval_s if self.doubts > 0 else super().next_interval(key)

    owner = Owner()
    async with probing(owner, [gated(1)], open_checker=open_coroutines(Gate(opened=True))) as prober:
        await owner.result()
        owner.doubts = 3
        prober.burst(LOCALHOST)
        assert await owner.names(3) == ["b1"] * 3
        assert owner.heard.empty()


@in_loop
async def test_a_burst_does_not_double_a_check_in_flight_but_repeats_it() -> None:
    """The one in flight may have been answered before whatever caused the burst."""
    watch, gate = Watch(), Gate()
    async with probing(watch, [gated(1)], open_checker=open_coroutines(gate)) as prober:
        await gate.arrived.get()
        prober.burst(LOCALHOST)
        prober.burst(LOCALHOST)
        gate.open.set()
        assert await watch.names(2) == ["b1", "b1"]
    assert (gate.most_inside, gate.arrived.qsize(), watch.heard.qsize()) == (1, 1, 0)


@in_loop
async def test_a_removed_target_is_let_go_in_the_middle_of_its_check() -> None:
    gone = asyncio.Event()

    async def wait_for_the_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        arrived.set()
        try:
            await silent(reader, writer)
        finally:
            gone.set()

    arrived, watch = asyncio.Event(), Watch()
    async with serving(wait_for_the_end) as port, serving(silent) as other_port:
        slow = target("slow", "127.0.0.1", port, replace(SOON, type=CheckType.HTTP, timeout_s=NEVER_S))
        async with probing(watch, [slow]) as prober:
            await arrived.wait()
            prober.set_targets([target("other", "127.0.0.1", other_port, SOON)])
            await gone.wait()
            prober.burst(LOCALHOST)
            assert (await watch.names(1)) == ["other"]
    while not watch.heard.empty():
        assert watch.heard.get_nowait()[0].backend == "other"


@in_loop
async def test_targets_that_stay_are_not_disturbed() -> None:
    watch, gate = Watch(), Gate()
    async with probing(watch, [gated(1)], open_checker=open_coroutines(gate)) as prober:
        await gate.arrived.get()
        prober.set_targets([gated(1), gated(2)])
        assert await gate.arrived.get() == 2
        prober.set_targets([gated(1)])
        gate.open.set()
        assert await watch.names(1) == ["b1"]
        prober.set_targets([gated(1), gated(3)])
        assert await watch.names(1) == ["b3"]
    assert (gate.arrived.get_nowait(), gate.arrived.empty(), watch.heard.empty()) == (3, True, True)


@in_loop
async def test_a_target_that_joins_a_probe_need_not_wait_for_its_next_turn() -> None:
    watch = Watch()
    async with probing(watch, [gated(1, "old")], open_checker=open_coroutines(Gate(opened=True))) as prober:
        assert await watch.names(1) == ["old"]
        prober.set_targets([gated(1, "old"), gated(1, "new")])
        assert await watch.names(2) == ["new", "old"]


@pytest.mark.parametrize(
    ("left", "heard"),
    [([gated(1, "a"), gated(2)], {"a", "b2"}), ([gated(2)], {"b2"})],
    ids=["one less", "all gone"],
)
@in_loop
async def test_an_owner_may_change_the_targets_from_within(left: list[Target], heard: set[str]) -> None:
    """Here at its very first result, with that of the same probe's second target still to come."""

    class Owner(Watch):
        def on_result(self, key: BackendKey, result: CheckResult) -> None:
            super().on_result(key, result)
            prober.set_targets(left)

    owner, gate = Owner(interval_s=0.005), Gate(opened=True)
    async with probing(owner, [gated(1, "a"), gated(1, "b")], open_checker=open_coroutines(gate)) as prober:
        assert await owner.names(1) == ["a"]
        assert set(await owner.names(10)) == heard
    assert (gate.ports().count(1) > 1) is ("a" in heard)


@in_loop
async def test_removed_before_its_first_step_a_check_gives_its_place_back() -> None:
    watch, gate = Watch(), Gate()
    async with probing(watch, [], open_checker=open_coroutines(gate), max_in_flight=1) as prober:
        for port in range(1, 50):
            prober.set_targets([gated(port, check=replace(SOON, interval_s=0.0001))])
            await asyncio.sleep(0)
        gate.open.set()
        prober.set_targets([gated(99)])
        while (await watch.names(1)) != ["b99"]:
            pass


@in_loop
async def test_what_waits_for_its_turn_waits_once_and_not_beyond_its_removal() -> None:
    watch, gate = Watch(), Gate()
    async with probing(watch, [gated(1)], open_checker=open_coroutines(gate), max_in_flight=1) as prober:
        assert await gate.arrived.get() == 1
        prober.set_targets([gated(1), gated(2), gated(3)])
        prober.burst(LOCALHOST)
        prober.burst(LOCALHOST)
        prober.set_targets([gated(1), gated(3)])
        gate.open.set()
        assert await watch.names(3) == ["b1", "b1", "b3"]
        prober.burst(LOCALHOST)
        assert await watch.names(2) == ["b1", "b3"]
    assert sorted(gate.ports()) == [1, 1, 3, 3]


@in_loop
async def test_no_more_checks_in_flight_than_allowed() -> None:
    watch, gate = Watch(), Gate()
    async with probing(watch, [gated(port) for port in range(20)], open_checker=open_coroutines(gate), max_in_flight=3):
        assert len({await gate.arrived.get() for _ in range(3)}) == 3
        gate.open.set()
        assert await watch.names(20) == sorted(f"b{port}" for port in range(20))
    assert gate.most_inside == 3


@in_loop
async def test_two_thousand_targets_each_get_their_verdict() -> None:
    watch, turns = Watch(), 0

    async def other_work() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with serving(silent) as port:
        targets = [target(f"b{i}", "127.0.0.1", port, replace(SOON, host=f"h{i}")) for i in range(2000)]
        working = asyncio.create_task(other_work())
        async with probing(watch, targets):
            results = [await watch.heard.get() for _ in targets]
        working.cancel()
    assert {key for key, _ in results} == {target.key for target in targets}
    assert {result.reason for _, result in results} == {"L4OK"}
    assert turns >= 2000 / 16


@in_loop
async def test_what_goes_wrong_inside_one_check_fails_that_check_alone(caplog: pytest.LogCaptureFixture) -> None:
    watch, gate = Watch(interval_s=0.005), Gate(opened=True)
    gate.trouble = {1: [ZeroDivisionError("one"), ZeroDivisionError("two"), KeyError("three")]}
    async with probing(watch, [gated(1), gated(2)], open_checker=open_coroutines(gate)):
        heard: dict[str, list[str]] = {"b1": [], "b2": []}
        while min(len(heard["b1"]), len(heard["b2"])) < 4:
            key, result = await watch.heard.get()
            heard[key.backend].append(result.reason)
    assert heard["b1"][:4] == ["L4CON", "L4CON", "L4CON", "L4OK"]
    assert set(heard["b2"]) == {"L4OK"}
    odd = [record.message.strip().splitlines()[-1] for record in caplog.records]
    assert odd == ["ZeroDivisionError: one", "KeyError: 'three'"]


@in_loop
async def test_this_hosts_own_trouble_is_nobodys_verdict(caplog: pytest.LogCaptureFixture) -> None:
    watch, gate = Watch(), Gate(opened=True)
    gate.trouble = {1: [OSError(errno.EMFILE, "Too many open files"), OSError(errno.ENFILE, "File table overflow")]}
    async with probing(watch, [gated(1)], open_checker=open_coroutines(gate)) as prober:
        assert (await watch.result()).reason == "L4OK"
        assert prober.trouble is None
    assert gate.arrived.qsize() == 3
    told = "health checks are left out, and say nothing about backends: too many open files"
    assert [record.message.partition(" (")[0] for record in caplog.records] == [
        f"{told} in this process",
        f"{told} on this host",
    ]


@in_loop
async def test_trouble_is_told_once_for_all_checks_that_have_it_and_when_it_is_over() -> None:
    watch, gate = Watch(interval_s=0.005), Gate(opened=True)
    told: list[str | None] = []
    gate.trouble = {port: [OSError(errno.EADDRNOTAVAIL, "x")] * port for port in range(1, 20)}
    options = {"open_checker": open_coroutines(gate), "on_trouble": told.append}
    async with probing(watch, [gated(port) for port in range(1, 20)], **options) as prober:
        seen = set()
        while len(seen) < 19:
            seen |= set(await watch.names(1))
            assert prober.trouble is None or prober.trouble.endswith("no local port or address is left to connect from")
    assert told == ["no local port or address is left to connect from", None]


@in_loop
async def test_an_owner_that_fails_for_one_backend_hears_of_the_others(caplog: pytest.LogCaptureFixture) -> None:
    class Owner(Watch):
        def on_result(self, key: BackendKey, result: CheckResult) -> None:
            if key.backend == "bad":
                raise LookupError(key)
            super().on_result(key, result)

    owner = Owner()
    async with probing(
        owner, [gated(1, "bad"), gated(1, "good"), gated(2)], open_checker=open_coroutines(Gate(opened=True))
    ) as prober:
        assert await owner.names(2) == ["b2", "good"]
        prober.burst(LOCALHOST)
        assert await owner.names(2) == ["b2", "good"]
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [LookupError]


@in_loop
async def test_the_time_limit_holds_for_whatever_a_check_does() -> None:
    watch = Watch()
    async with probing(watch, [gated(1, check=replace(SOON, timeout_s=0.02))], open_checker=open_coroutines(Gate())):
        result = await watch.result()
    assert (result.ok, result.reason) == (False, "L4TOUT")
    assert result.duration_s >= 0.02
