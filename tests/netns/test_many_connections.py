"""Two thousand connections and a UDP flow, through everything that an operator may do to a balancer in a bad night."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from crowd import Crowd, datagrams, watched
from stage import FAST_CHECK, NO_CHECK, VIP, Balancer, at, backends_of, balancing, service

from xdplb.lab.laboratory import Laboratory, Shape, UdpEcho, WebServer
from xdplb.model import Forward

CONNECTIONS = 2000
RELOADS = 50
STALL_S = 0.25
ECHO = 5300


@pytest.fixture(scope="module")
def lab(able: None, bpf_able: None) -> Iterator[Laboratory]:
    with Laboratory(Shape.ONE_ARMED, backends=5) as laboratory:
        laboratory.prepare(Forward.NAT)
        for host in laboratory.backends:
            WebServer(host).start()
            UdpEcho(host, ECHO).start()
        yield laboratory


def services(lab: Laboratory, scheduler: str, count: int = 4, **weights: int) -> list[dict[str, Any]]:
    backends = [{**b, "weight": weights.get(b["name"], 10)} for b in backends_of(lab)[:count]]
    return [
        service("web", at(VIP[4], 80), backends, check=FAST_CHECK, scheduler=scheduler),
        service("echo", at(VIP[4], f"{ECHO}/udp"), backends, check=NO_CHECK, scheduler=scheduler),
    ]


def steer(balancer: Balancer, action: str, backend: str) -> None:
    for name in ("web", "echo"):
        balancer.ask("backend", action=action, service=name, backend=backend)


@pytest.mark.alone
@pytest.mark.parametrize("scheduler", ["maglev", "lc"])
def test_nobody_notices(lab: Laboratory, scheduler: str) -> None:
    with balancing(lab, *services(lab, scheduler)) as balancer, ExitStack() as stack:
        balancer.await_all("web", "up")
        crowd = Crowd(lab.client, VIP[4], CONNECTIONS, stack)
        with watched(crowd) as seen, datagrams(lab.client, VIP[4], ECHO) as answered:
            steer(balancer, "drain", "backend1")
            balancer.reload(*services(lab, scheduler, count=5))
            balancer.reload(*services(lab, scheduler, count=5, backend2=30, backend3=5))
            steer(balancer, "ready", "backend1")
            balancer.kill()
            balancer.up()
            for number in range(RELOADS):
                balancer.reload(*services(lab, scheduler, count=5, backend4=10 + number % 7))
            steer(balancer, "drain", "backend4")
            balancer.reload(*services(lab, scheduler, count=4))  # backend5, which came later, has none of these
        for watching in (seen, answered):
            assert watching.wrong == []
            assert watching.answers > RELOADS
            assert watching.slowest_s < STALL_S
        crowd.unchanged(silent_too=True)
