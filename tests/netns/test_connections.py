"""The pool changes, the daemon is killed: open connections do not notice, also those that are silent meanwhile."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
from crowd import Crowd
from stage import NO_CHECK, VIP, at, backends_of, balancing, fetch, service, web_laboratory

from xdplb.errors import XdplbError
from xdplb.lab.laboratory import Laboratory, Shape

CONNECTIONS = 240
ON_EACH = 3
"""A backend must have at least so many of them: 5 backends, 48 on average."""


lab = web_laboratory(Shape.ONE_ARMED, backends=6)


@pytest.fixture(params=[4, 6], ids=["ipv4", "ipv6"])
def version(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def web(lab: Laboratory, version: int, count: int = 5, **weights: int) -> dict[str, Any]:
    backends: list[dict[str, Any]] = [
        {**backend, "weight": weights.get(backend["name"], 10)} for backend in backends_of(lab, version)[:count]
    ]
    return service("web", at(VIP[version], 80), backends, check=NO_CHECK)


def test_no_change_of_the_pool_and_no_death_of_the_daemon_breaks_a_connection(lab: Laboratory, version: int) -> None:
    with balancing(lab, web(lab, version)) as balancer, ExitStack() as stack:
        crowd = Crowd(lab.client, VIP[version], CONNECTIONS, stack)
        assert all(crowd.on(host.name) >= ON_EACH for host in lab.backends[:5])

        balancer.cli("backend", "drain", "web/backend1")
        crowd.unchanged()
        assert "backend1" not in {fetch(lab.client, VIP[version], 80) for _ in range(40)}

        balancer.reload(web(lab, version, backend2=40, backend3=5))
        crowd.unchanged()
        balancer.reload(web(lab, version, count=6))
        crowd.unchanged()
        balancer.cli("backend", "ready", "web/backend1")
        crowd.unchanged()

        balancer.kill()
        crowd.unchanged()
        balancer.up()
        crowd.unchanged()

        for number in range(10):
            balancer.reload(web(lab, version, backend4=10 + 10 * (number % 2)))
            crowd.unchanged()
        crowd.unchanged(silent_too=True)


def test_only_the_connections_of_a_backend_that_is_taken_out_end(lab: Laboratory, version: int) -> None:
    with balancing(lab, web(lab, version)) as balancer, ExitStack() as stack:
        crowd = Crowd(lab.client, VIP[version], CONNECTIONS, stack)
        balancer.cli("backend", "maint", "web/backend1")
        lost = [connection for connection, owner in crowd.owners.items() if owner == "backend1"]
        for connection in lost:
            with pytest.raises(OSError):
                connection.ask()
            del crowd.owners[connection]
        kept = {c: c.ask() for c in crowd.owners}
        assert kept == crowd.owners
        balancer.cli("backend", "ready", "web/backend1")
        assert {c: c.ask() for c in crowd.owners} == crowd.owners


@pytest.mark.parametrize("scheduler", ["maglev", "lc"])
def test_drain_waits_for_the_last_connection_to_end(lab: Laboratory, scheduler: str) -> None:
    with balancing(lab, {**web(lab, 4), "scheduler": scheduler}) as balancer:
        with ExitStack() as stack:
            crowd = Crowd(lab.client, VIP[4], CONNECTIONS, stack)
            key, count = "web/backend1", crowd.on("backend1")
            balancer.cli("backend", "drain", key)
            crowd.unchanged(silent_too=True)
            late = balancer.cli("backend", "drain", key, "--wait", "--timeout", "1500ms", check=False)
            assert late.returncode == 1 and f"{key} still has {count} flows after 1.5 s" in late.stderr
            assert late.stdout.splitlines()[1:] == [f"{key}: {count} flows left"]
        done = balancer.cli("backend", "drain", key, "--wait")
        assert done.stdout.splitlines()[-1 if scheduler == "lc" else -2] == f"{key}: no flow left"
        assert ("silent" in done.stdout) is (scheduler == "maglev")
        balancer.cli("backend", "ready", key)


def test_diff_counts_the_flows_on_what_goes(lab: Laboratory) -> None:
    def lost(new: dict[str, Any]) -> tuple[int, int | None]:
        balancer.write(new)
        told = json.loads(balancer.cli("diff", str(balancer.file), "-o", "json", check=False).stdout)
        (of_web,) = told["services"]
        assert all(of_web[field] == told[field] for field in ("flows_on_removed", "flows_broken"))
        return told["flows_on_removed"], told["flows_broken"]

    remembers = {**web(lab, 4), "flows": "all"}
    with balancing(lab, remembers) as balancer, ExitStack() as stack:
        crowd = Crowd(lab.client, VIP[4], CONNECTIONS, stack)
        fewer = {**remembers, "backends": remembers["backends"][1:]}
        assert lost(fewer) == (crowd.on("backend1"), 0)
        moved = [{**remembers["backends"][0], "address": "10.0.0.99"}, *remembers["backends"][1:]]
        assert lost({**remembers, "backends": moved}) == (crowd.on("backend1"), 0)
        assert lost({**fewer, "scheduler": "source-hash"}) == (crowd.on("backend1"), None)
        said = balancer.reload(fewer)
        assert said["flows_on_removed"] == crowd.on("backend1") and said["flows_broken"] == 0


def broken(crowd: Crowd) -> int:
    """How many of them do not get on with the backend that they have."""
    lost = 0
    for connection, owner in crowd.owners.items():
        try:
            lost += connection.ask() != owner
        except OSError:
            lost += 1
    return lost


Services = Callable[[Laboratory], list[dict[str, Any]]]


def on_range(lab: Laboratory) -> dict[str, Any]:
    return {**web(lab, 4), "listen": at(VIP[4], "80-89")}


def on_exact_port(lab: Laboratory) -> dict[str, Any]:
    return service("exact", at(VIP[4], 80), backends_of(lab)[5:], check=NO_CHECK)


CHANGES: list[tuple[Services, Services, str]] = [
    (
        lambda lab: [web(lab, 4)],
        lambda lab: [{**web(lab, 4), "backends": backends_of(lab)[1:5]}],
        "backend web/backend1",
    ),
    (lambda lab: [on_range(lab)], lambda lab: [on_range(lab), on_exact_port(lab)], "web"),
    (lambda lab: [on_range(lab), on_exact_port(lab)], lambda lab: [on_range(lab)], "service exact"),
    (lambda lab: [on_range(lab)], lambda lab: [{**on_range(lab), "listen": at(VIP[4], "81-89")}], "web"),
]


@pytest.mark.parametrize(
    ("before", "after", "named"), CHANGES, ids=["backend-goes", "exact-port", "exact-port-goes", "narrower"]
)
def test_a_reload_names_what_breaks_flows_that_are_not_remembered(
    lab: Laboratory, before: Services, after: Services, named: str
) -> None:
    with balancing(lab, *before(lab)) as balancer, ExitStack() as stack:
        crowd = Crowd(lab.client, VIP[4], 24, stack)
        told = balancer.reload(*after(lab))
        assert broken(crowd) > 0
        unsure = [entry["name"] for entry in told["services"] if entry["flows_broken"] is None]
        assert [*unsure, *told["uncounted"]] == [named], told


def test_maps_that_grow_take_all_connections_along(lab: Laboratory) -> None:
    with balancing(lab, web(lab, 4)) as balancer, ExitStack() as stack:
        crowd = Crowd(lab.client, VIP[4], CONNECTIONS, stack)
        balancer.cli("backend", "drain", "web/backend1")
        crowd.unchanged()
        before = set(balancer.pins.iterdir())
        balancer.reload(web(lab, 4), _crowded())
        assert set(balancer.pins.iterdir()) != before
        crowd.unchanged(silent_too=True)


def _crowded() -> dict[str, Any]:
    """A service of more backends than the first maps hold; none of them has to exist."""
    backends = [{"address": f"10.0.{4 + (n >> 8)}.{n & 255}"} for n in range(1200)]
    return service("crowded", at("203.0.113.77", 80), backends, check=NO_CHECK)


def test_a_mistake_in_the_file_breaks_nothing(lab: Laboratory) -> None:
    with balancing(lab, web(lab, 4)) as balancer, ExitStack() as stack:
        crowd = Crowd(lab.client, VIP[4], CONNECTIONS, stack)
        with pytest.raises(XdplbError):
            balancer.reload({**web(lab, 4), "schedular": "maglev"})
        crowd.unchanged(silent_too=True)
