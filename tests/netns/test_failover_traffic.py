"""Backends fail in every way they can; clients notice as little as can be."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest
from stage import (
    FAST_CHECK,
    VIP,
    Balancer,
    ask_udp,
    ask_udp_many,
    at,
    backends_of,
    balancing,
    fetch,
    fetch_many,
    kept_connection,
    serves,
    service,
)

from xdplb.lab.laboratory import HttpLoad, Laboratory, Shape, UdpEcho, WebServer, await_until
from xdplb.model import Forward

IMPATIENT_NEIGHBOURS = "echo 500 >base_reachable_time_ms; echo 100 >retrans_time_ms; echo 1 >delay_first_probe_time"
PORT = {"web": 80, "echo": 5300, "open": 82, "spare": 83}


@pytest.fixture(scope="module")
def lab(able: None, bpf_able: None) -> Iterator[Laboratory]:
    with Laboratory(Shape.TWO_ARMED) as laboratory:
        laboratory.prepare(Forward.NAT)
        laboratory.gateway.shell(f"cd /proc/sys/net/ipv4/neigh/eth1; {IMPATIENT_NEIGHBOURS}; ip neigh flush all")
        yield laboratory


@pytest.fixture(scope="module")
def servers(lab: Laboratory) -> list[WebServer]:
    return [WebServer(host) for host in lab.backends]


@pytest.fixture(scope="module")
def running(lab: Laboratory, servers: list[WebServer]) -> Iterator[Balancer]:
    for server in servers:
        server.start()
        UdpEcho(server.host, PORT["echo"]).start()
    with balancing(lab, *services(lab)) as balancer:
        yield balancer


@pytest.fixture
def balancer(running: Balancer, servers: list[WebServer]) -> Iterator[Balancer]:
    """Everything works before each test."""
    yield running
    for server in servers:
        server.recover()
        if not server.running:
            server.start()
    running.await_all("web4", "up")


def services(lab: Laboratory) -> list[dict[str, object]]:
    all_services = []
    for version in (4, 6):
        some = [{"name": b["name"], "address": at(b["address"], 80)} for b in backends_of(lab, version)]
        *first, last = some
        all_services += [
            service(f"web{version}", at(VIP[version], PORT["web"]), some),
            service(
                f"echo{version}",
                at(VIP[version], f"{PORT['echo']}/udp"),
                backends_of(lab, version),
                check={**FAST_CHECK, "port": 80},
            ),
            service(f"open{version}", at(VIP[version], PORT["open"]), some, on_all_down="fail-open"),
            service(f"spare{version}", at(VIP[version], PORT["spare"]), [*first, {**last, "backup": True}]),
        ]
    return all_services


def names(lab: Laboratory) -> set[str]:
    return {host.name for host in lab.backends}


@pytest.mark.alone
def test_requests_go_on_when_a_server_is_killed_and_it_gets_its_share_back(
    lab: Laboratory, balancer: Balancer, servers: list[WebServer]
) -> None:
    victim = servers[0]
    load = HttpLoad(lab.client, f"http://{VIP[4]}/", rate=200)
    with load:
        load.collect_until(lambda results: {r.backend for r in results} == names(lab), "all of them serve")
        killed = time.monotonic()
        victim.kill()
        balancer.await_state("web4", victim.name, "down")
        noticed = time.monotonic() - killed
        serves(load, requests=100)
        assert noticed < 1.5  # fall 3, at most one interval and two fast ones and their time
        assert balancer.backend("web4", victim.name)["reason"] == "L4CON"
        assert balancer.backend("web4", victim.name)["effective_weight"] == 0
        victim.start()
        balancer.await_state("web4", victim.name, "up")
        load.collect_until(lambda results: victim.name in {r.backend for r in results}, "it serves again")
        serves(load)


def test_a_server_that_says_it_is_ill_gets_no_new_connections(
    lab: Laboratory, balancer: Balancer, servers: list[WebServer]
) -> None:
    ill = servers[1]
    with HttpLoad(lab.client, f"http://{at(VIP[6], 80)}/", rate=200) as load:
        ill.fail()
        balancer.await_state("web6", ill.name, "down")
        assert balancer.backend("web6", ill.name)["reason"] == "L7STS/500"
        serves(load)
        assert ill.name not in fetch_many(lab.client, VIP[6])
        ill.recover()
        balancer.await_state("web6", ill.name, "up")
        assert ill.name in fetch_many(lab.client, VIP[6])


def test_a_server_that_hangs(lab: Laboratory, balancer: Balancer, servers: list[WebServer]) -> None:
    hanging = servers[2]
    workers = lab.backends[2].run(["pgrep", "-P", str(hanging.process.pid)]).stdout.split()
    lab.backends[2].run(["kill", "-STOP", *workers])
    try:
        balancer.await_state("web4", hanging.name, "down")
        assert balancer.backend("web4", hanging.name)["reason"] in ("L7TOUT", "L4TOUT")
        assert hanging.name not in fetch_many(lab.client, VIP[4])
    finally:
        lab.backends[2].run(["kill", "-CONT", *workers])
    balancer.await_state("web4", hanging.name, "up")


def test_a_flapping_server_does_not_take_connections_of_others_with_it(
    lab: Laboratory, balancer: Balancer, servers: list[WebServer]
) -> None:
    with HttpLoad(lab.client, f"http://{VIP[4]}/", rate=200) as load:
        for _ in range(3):
            with kept_connection(lab.client, VIP[4]) as connection:
                served_by = connection.ask()
                flapping = next(server for server in servers if server.name != served_by)
                flapping.fail()
                balancer.await_state("web4", flapping.name, "down")
                assert connection.ask() == served_by
                serves(load)
                assert connection.ask() == served_by
            flapping.recover()
            balancer.await_state("web4", flapping.name, "up")
            serves(load)


def test_a_backend_whose_link_is_down(lab: Laboratory, balancer: Balancer) -> None:
    gone = lab.backends[0]
    gone.shell("ip link set eth0 down")
    try:
        balancer.await_state("web4", gone.name, "down", timeout_s=15)
        assert gone.name not in fetch_many(lab.client, VIP[4])
        await_until(lambda: not balancer.backend("echo4", gone.name)["reachable"], "its neighbour has failed", 15)
        assert gone.name not in ask_udp_many(lab.client, VIP[4], PORT["echo"])
    finally:
        gone.shell(
            "ip link set eth0 up; ip -6 addr add fd00::11/64 dev eth0 nodad; ip -6 route replace ::/0 via fd00::1"
        )
        gone.shell("ip route replace 0.0.0.0/0 via 10.0.0.1")
    for name in ("web4", "web6"):
        balancer.await_state(name, gone.name, "up", timeout_s=15)
        assert gone.name in fetch_many(lab.client, VIP[4 if name == "web4" else 6])


def test_a_backup_serves_only_when_the_others_are_down(
    lab: Laboratory, balancer: Balancer, servers: list[WebServer]
) -> None:
    spare = servers[2].name
    assert fetch_many(lab.client, VIP[4], PORT["spare"]) == names(lab) - {spare}
    for server in servers[:2]:
        server.fail()
    for server in servers[:2]:
        balancer.await_state("spare4", server.name, "down")
    assert fetch_many(lab.client, VIP[4], PORT["spare"]) == {spare}
    servers[0].recover()
    balancer.await_state("spare4", servers[0].name, "up")
    assert fetch_many(lab.client, VIP[4], PORT["spare"]) == {servers[0].name}


@pytest.mark.alone
@pytest.mark.parametrize("version", [4, 6])
def test_all_are_down(lab: Laboratory, balancer: Balancer, servers: list[WebServer], version: int) -> None:
    for server in servers:
        server.fail()
    for name in ("web", "echo", "open"):
        balancer.await_all(f"{name}{version}", "down")
    started = time.monotonic()
    with pytest.raises(ConnectionRefusedError):
        fetch(lab.client, VIP[version], PORT["web"])
    with pytest.raises(ConnectionRefusedError):
        ask_udp(lab.client, VIP[version], PORT["echo"])
    assert time.monotonic() - started < 0.5
    assert balancer.service_stats(f"web{version}")["drops"]["rejected"] >= 1
    assert balancer.service_stats(f"echo{version}")["drops"]["rejected"] >= 1
    assert fetch_many(lab.client, VIP[version], PORT["open"]) == names(lab)  # fail-open
    servers[1].recover()
    balancer.await_state(f"web{version}", servers[1].name, "up")
    assert fetch_many(lab.client, VIP[version]) == {servers[1].name}


def test_operators_steer_backends_and_are_remembered(lab: Laboratory, balancer: Balancer) -> None:
    one, two, three = (host.name for host in lab.backends)
    assert "drains" in balancer.cli("backend", "drain", f"web4/{one}", "--interface", "eth0").stdout
    balancer.cli("backend", "maint", f"web4/{two}")
    balancer.cli("backend", "weight", f"web4/{three}", "7")
    assert fetch_many(lab.client, VIP[4]) == {three}
    for end in (signal.SIGKILL, signal.SIGTERM):
        balancer.process.send_signal(end)
        balancer.process.wait()
        balancer.up()
        assert balancer.backend("web4", one)["admin"] == "drain"
        assert balancer.backend("web4", two)["admin"] == "maint"
        assert balancer.backend("web4", three)["weight"] == balancer.backend("web4", three)["effective_weight"] == 7
        assert fetch_many(lab.client, VIP[4]) == {three}
    assert balancer.cli("backend", "drain", "web4/nobody", check=False).returncode == 2
    changed = services(lab)
    changed[0]["backends"][0]["weight"] = 2  # type: ignore[index]
    balancer.reload(*changed)
    assert balancer.backend("web4", one)["admin"] == "active", "the file changed that backend: it says otherwise"
    for name in (two, three):
        balancer.cli("backend", "ready", f"web4/{name}")
    a_tenth = 240  # is the share of the lightest; they all miss it with a chance of 1 in 100 billion
    assert fetch_many(lab.client, VIP[4], count=a_tenth) == names(lab)


def test_a_dead_neighbour_is_checked_at_once(lab: Laboratory, running: Balancer) -> None:
    """Its next check is half a minute away; the neighbour table knows earlier, here within seconds."""
    slow = {"type": "tcp", "interval": "30s", "fast_interval": "100ms", "timeout": "200ms", "port": 80}
    running.reload(*services(lab), service("slow", "203.0.113.77:80", backends_of(lab), check=slow))
    gone = lab.backends[1]
    lab.hosts["switch"].shell(f"ip link set to-{gone.name} down")
    try:
        running.process.wait_for_line("checking it now", timeout_s=20)
        running.await_state("slow", gone.name, "down", timeout_s=5)
    finally:
        lab.hosts["switch"].shell(f"ip link set to-{gone.name} up")
    await_until(lambda: running.backend("web4", gone.name)["state"] == "up", "it is back", 15)
