"""Checks that go the way of clients' packets: a backend that cannot take those is down."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from stage import VIP, Balancer, at, backends_of, balancing, fetch_many, service, start_decapsulation, traces

from xdplb.lab.laboratory import Laboratory, Shape, UdpEcho, WebServer, await_until
from xdplb.model import Forward

QUICK = {"via": "vip", "interval": "200ms", "fast_interval": "100ms", "timeout": "300ms", "fall": 2, "rise": 1}
CHECK = {**QUICK, "type": "http", "path": "/healthz"}


@pytest.fixture(scope="module")
def lab(able: None, bpf_able: None) -> Iterator[Laboratory]:
    with laboratory(Shape.TWO_ARMED) as made:
        yield made


@contextmanager
def laboratory(shape: Shape) -> Iterator[Laboratory]:
    with Laboratory(shape) as made:
        for host in made.backends:
            WebServer(host).start()
            UdpEcho(host, 5300).start()
        yield made


def web(lab: Laboratory, forward: str, **check: Any) -> list[dict[str, object]]:
    whole = {**CHECK, **check}
    return [service(f"web{v}", at(VIP[v], 80), backends_of(lab, v), forward=forward, check=whole) for v in (4, 6)]


def test_a_dsr_backend_without_the_services_address_is_down(lab: Laboratory) -> None:
    follows_the_services_address(lab)


def test_a_gateway_with_one_arm_checks_through_the_services_address(able: None, bpf_able: None) -> None:
    with laboratory(Shape.ONE_ARMED) as lab:
        follows_the_services_address(lab)


def follows_the_services_address(lab: Laboratory) -> None:
    lab.prepare(Forward.DSR)
    before = traces(lab)
    silent, *others = lab.backends
    echo = service("echo", at(VIP[4], "5300/udp"), backends_of(lab), forward="dsr", check={**QUICK, "type": "udp"})
    with balancing(lab, *web(lab, "dsr"), echo) as balancer:
        for version, name in ((4, "web4"), (4, "echo"), (6, "web6")):
            vip = f"{VIP[version]}/{32 if version == 4 else 128}"
            balancer.await_all(name, "up")
            assert set(balancer.service_stats(name)["drops"].values()) == {0}
            silent.shell(f"ip address del {vip} dev lo")
            balancer.await_state(name, silent.name, "down")
            assert {balancer.states(name)[host.name] for host in others} == {"up"}
            silent.shell(f"ip address add {vip} dev lo nodad" if version == 6 else f"ip address add {vip} dev lo")
            balancer.await_state(name, silent.name, "up")
            if name != "echo":
                assert fetch_many(lab.client, VIP[version]) == {host.name for host in lab.backends}
    assert traces(lab) == before


def test_a_backend_that_takes_off_no_outer_header_is_down(lab: Laboratory) -> None:
    lab.prepare(Forward.IPIP)
    before = traces(lab)
    tunnels = [*web(lab, "ipip")[:1], *web(lab, "gue")[1:]]
    with balancing(lab, *tunnels) as balancer:
        for version in (4, 6):
            balancer.await_all(f"web{version}", "down")
        silent, *others = start_decapsulation(lab)
        for version in (4, 6):
            balancer.await_all(f"web{version}", "up")
            assert fetch_many(lab.client, VIP[version]) == {host.name for host in lab.backends}
        assert silent.stop(signal.SIGINT, grace_s=10) == 0
        for version in (4, 6):
            balancer.await_state(f"web{version}", lab.backends[0].name, "down")
        for process in others:
            process.stop(signal.SIGINT, grace_s=10)
    assert traces(lab) == before


def test_a_reload_leads_checks_by_the_address_and_back(lab: Laboratory) -> None:
    """A backend that answers at its own address alone is up by that, and down by the service's."""
    lab.prepare(Forward.DSR)
    silent, *_ = lab.backends
    silent.shell(f"ip address del {VIP[4]}/32 dev lo")
    with balancing(lab, *web(lab, "dsr", via="backend")[:1]) as balancer:
        balancer.await_all("web4", "up")
        balancer.reload(*web(lab, "dsr"))
        balancer.await_state("web4", silent.name, "down")
        balancer.await_all("web6", "up")
        balancer.reload(*web(lab, "dsr", via="backend")[:1])
        balancer.await_all("web4", "up")
        assert set(interfaces(lab)) == {"lo", "eth0", "eth1"}


def test_checks_by_the_address_go_on_over_a_kill(lab: Laboratory) -> None:
    lab.prepare(Forward.DSR)
    before = traces(lab)
    with balancing(lab, *web(lab, "dsr")) as balancer:
        balancer.await_all("web4", "up")
        await_until(lambda: noted_as_up(balancer) >= {host.name for host in lab.backends}, "their states are noted")
        balancer.kill()
        balancer.up(*web(lab, "dsr"))
        assert balancer.states("web4") == {host.name: "up" for host in lab.backends}
        lab.backends[0].shell(f"ip address del {VIP[4]}/32 dev lo")
        balancer.await_state("web4", lab.backends[0].name, "down")
        balancer.kill()
        balancer.down()
    assert traces(lab) == before


def noted_as_up(balancer: Balancer) -> set[str]:
    notes = json.loads((balancer.runtime / "manifest.json").read_text())["health"]
    return {key.removeprefix("web4/") for key, (state, *_) in notes.items() if state == "up"}


def test_interfaces_of_checks_are_made_again(lab: Laboratory) -> None:
    lab.prepare(Forward.DSR)
    with balancing(lab, *web(lab, "dsr")) as balancer:
        balancer.await_all("web4", "up")
        device = next(name for name in interfaces(lab) if name.startswith("xdplb-p"))
        changes = ("ip link del {}", "ip link set {} down", "ip link set {peer} xdp off")
        for number, change in enumerate(changes, 1):
            lab.gateway.shell(change.format(device, peer=device.replace("-p", "-q")))
            await_until(lambda number=number: balancer.process.log().count("made again") == number, "it is mended")  # type: ignore[misc]
        lab.backends[0].shell(f"ip address del {VIP[4]}/32 dev lo")
        balancer.await_state("web4", lab.backends[0].name, "down")
        balancer.await_all("web6", "up")


def interfaces(lab: Laboratory) -> list[str]:
    return [str(link["ifname"]) for link in json.loads(lab.gateway.shell("ip -j link"))]
