"""A server that comes back gets its share little by little; the others do not notice."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from stage import VIP, Balancer, at, backends_of, balancing, errors, service

from xdplb.lab.laboratory import HttpLoad, HttpResult, Laboratory, Shape, WebServer, await_until
from xdplb.model import Forward

SLOW_START_S = 6
RATE = 500
"""Requests a second: of so many a fair share misses the bounds below with a chance of 1 in a billion."""


@pytest.fixture(scope="module")
def lab(able: None, bpf_able: None) -> Iterator[Laboratory]:
    with Laboratory(Shape.ONE_ARMED) as laboratory:
        laboratory.prepare(Forward.NAT)
        yield laboratory


@pytest.fixture(scope="module")
def servers(lab: Laboratory) -> list[WebServer]:
    servers = [WebServer(host) for host in lab.backends]
    for server in servers:
        server.start()
    return servers


def web(lab: Laboratory, count: int = 3, **more: Any) -> dict[str, Any]:
    some = [{**backend, "weight": 10} for backend in backends_of(lab)[:count]]
    return service("web", at(VIP[4], 80), some, **{"slow_start": f"{SLOW_START_S}s", **more})


def share(results: list[HttpResult], backend: str) -> float:
    return [result.backend for result in results].count(backend) / len(results)


def ramp(balancer: Balancer, backend: str) -> float:
    """Of its weight; 1 where it is not in slow start."""
    entry = balancer.backend("web", backend)
    assert entry["effective_weight"] == -(-entry["weight"] * round(20 * entry.get("slow_start", 1)) // 20)
    return float(entry.get("slow_start", 1))


@pytest.mark.alone
def test_the_share_of_one_that_comes_back_grows(lab: Laboratory, servers: list[WebServer]) -> None:
    victim = servers[0]
    with balancing(lab, web(lab)) as balancer, HttpLoad(lab.client, f"http://{VIP[4]}/", rate=RATE) as load:
        assert {ramp(balancer, server.name) for server in servers} == {1}, "a service starts as a whole"
        victim.kill()
        balancer.await_state("web", victim.name, "down")
        victim.start()
        balancer.await_state("web", victim.name, "up")
        up = time.monotonic()
        seen = [ramp(balancer, victim.name)]
        load.drain()
        begin = load.collect_until(lambda results: len(results) >= RATE * 1.5, "it has begun", 5)
        assert 0 < share(begin, victim.name) < 0.12
        assert "slow start: at " in balancer.cli("status").stdout
        while seen[-1] < 1:
            seen.append(ramp(balancer, victim.name))
            time.sleep(0.05)
        assert SLOW_START_S - 1 < time.monotonic() - up < SLOW_START_S + 3
        steps = sorted(set(seen))
        assert seen == sorted(seen) and len(steps) >= SLOW_START_S
        assert all(after - before <= 0.2 for before, after in pairwise(steps))
        load.drain()
        full = load.collect_until(lambda results: len(results) >= RATE * 3, "it is full", 10)
        assert 0.25 < share(full, victim.name) < 0.42
        assert errors(begin + full) == []


@pytest.mark.parametrize("scheduler", ["wrr", "wlc"])
def test_schedulers_that_choose_go_by_it_too(lab: Laboratory, servers: list[WebServer], scheduler: str) -> None:
    name = servers[1].name
    with balancing(lab, web(lab, scheduler=scheduler, slow_start="1h")) as balancer:
        with HttpLoad(lab.client, f"http://{VIP[4]}/", rate=200) as load:
            balancer.cli("backend", "maint", f"web/{name}")
            balancer.cli("backend", "ready", f"web/{name}")
            assert ramp(balancer, name) == 0.05
            load.drain()
            begin = load.collect_until(lambda results: len(results) >= 400, "it has begun", 5)
        if scheduler == "wrr":
            assert share(begin, name) == pytest.approx(1 / 41, abs=0.02)
        else:
            assert share(begin, name) < 0.25


def test_who_grows_and_who_does_not(lab: Laboratory, servers: list[WebServer]) -> None:
    one, two, three = (server.name for server in servers)
    with balancing(lab, web(lab, 2, slow_start="1h")) as balancer:
        balancer.reload(web(lab, 3, slow_start="1h"))
        assert [ramp(balancer, name) for name in (one, two, three)] == [1, 1, 0.05]
        for action in ("drain", "maint"):
            balancer.cli("backend", action, f"web/{one}")
            assert balancer.backend("web", one)["effective_weight"] == 0
            balancer.cli("backend", "ready", f"web/{one}")
            assert ramp(balancer, one) == 0.05
        balancer.kill()
        balancer.up()
        assert {ramp(balancer, name) for name in (one, two, three)} == {1}, "the packet path served all along"
        balancer.cli("backend", "maint", f"web/{one}")
        balancer.cli("backend", "ready", f"web/{one}")
        balancer.reload(web(lab, 3))
        await_until(lambda: ramp(balancer, one) == 1, "it takes the shorter time", SLOW_START_S + 3)
