"""Configuration changes while traffic flows: who is not concerned does not notice, a mistake changes nothing."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from stage import (
    NO_CHECK,
    VIP,
    Balancer,
    ask_udp_many,
    at,
    attach_foreign_program,
    backends_of,
    balancing,
    continues,
    fetch,
    fetch_many,
    kept_connection,
    service,
    traffic,
)

from xdplb.errors import XdplbError
from xdplb.lab.laboratory import Laboratory, Shape, UdpEcho, WebServer, await_until
from xdplb.model import Forward

OTHER_VIP = "203.0.113.99"


@pytest.fixture(scope="module")
def lab(able: None, bpf_able: None) -> Iterator[Laboratory]:
    with Laboratory(Shape.ONE_ARMED) as laboratory:
        laboratory.prepare(Forward.NAT)
        for host in laboratory.backends:
            WebServer(host, ports=(80, 8080)).start()
            UdpEcho(host, 5300).start()
        yield laboratory


@pytest.fixture(scope="module")
def running(lab: Laboratory) -> Iterator[Balancer]:
    with balancing(lab, web(lab)) as balancer:
        yield balancer


@pytest.fixture
def balancer(lab: Laboratory, running: Balancer) -> Balancer:
    running.reload(web(lab))
    return running


def web(lab: Laboratory, **more: Any) -> dict[str, Any]:
    return service("web", at(VIP[4], 80), backends_of(lab), **more)


def other(lab: Laboratory, count: int = 3, **more: Any) -> dict[str, Any]:
    return service("other", at(OTHER_VIP, 80), backends_of(lab)[:count], **more)


def what_lasts(status: str) -> Any:
    """A status without the times that checks took."""
    services = json.loads(status)["services"]
    for entry in services:
        for backend in entry["backends"]:
            del backend["check"]
    return services


def names(lab: Laboratory, count: int = 3) -> set[str]:
    return {host.name for host in lab.backends[:count]}


def test_services_and_backends_come_and_go_without_disturbing_others(lab: Laboratory, balancer: Balancer) -> None:
    with traffic(lab.client, f"http://{VIP[4]}/"), kept_connection(lab.client, VIP[4]) as connection:
        served_by = connection.ask()
        balancer.reload(web(lab), other(lab, 2))
        assert fetch_many(lab.client, OTHER_VIP) == names(lab, 2)
        counted = balancer.service_stats("other")["packets"]
        balancer.reload(web(lab), other(lab, 3))
        assert fetch_many(lab.client, OTHER_VIP) == names(lab, 3)
        balancer.reload(web(lab), other(lab, 1))
        assert fetch_many(lab.client, OTHER_VIP) == names(lab, 1)
        assert balancer.service_stats("other")["packets"] > counted, "what removed backends counted stays"
        heavier = other(lab, 2)
        heavier["backends"][0]["weight"] = 100
        balancer.reload(web(lab), heavier)
        answers = [fetch(lab.client, OTHER_VIP, 80) for _ in range(30)]
        assert answers.count("backend1") > 20
        moved = other(lab, 1)
        moved["listen"] = at(OTHER_VIP, 8080)
        balancer.reload(web(lab), moved)
        assert fetch_many(lab.client, OTHER_VIP, 8080) == names(lab, 1)
        with pytest.raises(ConnectionRefusedError):
            fetch(lab.client, OTHER_VIP, 80)
        assert OTHER_VIP in lab.gateway.shell("ip address show dev eth0")
        balancer.reload(web(lab))
        assert OTHER_VIP not in lab.gateway.shell("ip address show dev eth0")
        assert [entry["name"] for entry in balancer.stats()["services"]] == ["web"]
        assert connection.ask() == served_by


def test_another_program_and_larger_maps_take_over_without_a_lost_packet(lab: Laboratory, balancer: Balancer) -> None:
    unreachable = [{"name": f"b{n}", "address": f"198.51.{n // 200}.{n % 200}"} for n in range(600)]
    dsr = service("dsr", at("203.0.113.98", 80), unreachable[:3], forward="dsr", check=NO_CHECK)
    big = service("big", at(OTHER_VIP, 80), [*backends_of(lab), *unreachable], check=NO_CHECK)
    with traffic(lab.client, f"http://{VIP[4]}/") as load, kept_connection(lab.client, VIP[4]) as connection:
        served_by = connection.ask()
        program = balancer.attached()["eth0"]["prog"]["id"]
        balancer.reload(web(lab), dsr)
        assert balancer.attached()["eth0"]["prog"]["id"] != program
        continues(load)
        pins = {path.name for path in balancer.pins.iterdir() if path.is_dir()}
        before = balancer.service_stats("web")
        balancer.reload(web(lab), big)
        assert {path.name for path in balancer.pins.iterdir() if path.is_dir()}.isdisjoint(pins)
        continues(load)
        after = balancer.service_stats("web")
        assert after["packets"] >= before["packets"] and after["new_flows"] > before["new_flows"]
        assert fetch_many(lab.client, OTHER_VIP) == names(lab)
        balancer.reload(web(lab), service("udp", at(VIP[6], "5300/udp"), backends_of(lab, 6), check=NO_CHECK))
        assert ask_udp_many(lab.client, VIP[6], 5300) == names(lab)
        continues(load)
        assert connection.ask() == served_by


def test_a_mistake_changes_nothing(lab: Laboratory, balancer: Balancer) -> None:
    before = balancer.cli("status", "-o", "json").stdout
    good = balancer.file.read_text()
    with traffic(lab.client, f"http://{VIP[4]}/") as load:
        balancer.file.write_text(good.replace("nat", "teleport") + "hash_kye: x\n")
        refused = balancer.cli("reload", check=False)
        assert refused.returncode == 3
        assert "teleport" in refused.stderr and "hash_kye" in refused.stderr and str(balancer.file) in refused.stderr
        balancer.process.send_signal(signal.SIGHUP)
        balancer.process.wait_for_line("not reloaded")
        assert balancer.cli("diff", str(balancer.file), check=False).returncode == 3
        balancer.file.unlink()
        assert balancer.cli("reload", check=False).returncode == 3
        continues(load)
    assert what_lasts(balancer.cli("status", "-o", "json").stdout) == what_lasts(before)


def test_diff_says_what_a_reload_would_do(lab: Laboratory, balancer: Balancer) -> None:
    assert balancer.cli("diff", str(balancer.file), check=False).returncode == 0
    reduced = web(lab)
    reduced["backends"] = reduced["backends"][:2]
    balancer.write(reduced, other(lab))
    diff = balancer.cli("diff", str(balancer.file), "-o", "json", check=False)
    assert diff.returncode == 10
    changes = {(change["kind"], change["what"]) for change in json.loads(diff.stdout)["changes"]}
    assert changes == {("remove", "backend web/backend3"), ("add", "service other")}
    (moved,) = json.loads(diff.stdout)["services"]
    assert moved["name"] == "web" and 33 <= moved["slots_moved_percent"] <= 34
    balancer.process.send_signal(signal.SIGHUP)
    await_until(lambda: "other" in {s["name"] for s in balancer.ask("status")["services"]}, "the reload is done")
    assert balancer.cli("diff", str(balancer.file), check=False).returncode == 0


def test_a_reload_that_cannot_attach_leaves_what_is_in_force(lab: Laboratory, balancer: Balancer) -> None:
    """Somebody took our program off. The check of `web` changes as well: the health that is known must stay known."""
    dsr = service("dsr", at("203.0.113.98", 80), backends_of(lab), forward="dsr", check=NO_CHECK)
    blind = web(lab, check={"type": "tcp", "port": 81, "timeout": "100ms", "interval": "10s", "fast_interval": "10s"})
    foreign = attach_foreign_program(lab, "eth0")
    with pytest.raises(XdplbError, match="not ours"):
        balancer.reload(blind, dsr)
    assert set(balancer.states("web").values()) == {"up"}
    assert [entry["name"] for entry in balancer.ask("status")["services"]] == ["web"]
    assert balancer.attached()["eth0"]["prog"]["id"] == foreign
    lab.gateway.shell("ip link set dev eth0 xdp off")
    balancer.reload(web(lab), dsr)
    assert fetch_many(lab.client, VIP[4]) == names(lab)


def test_moving_a_backend_to_another_port(lab: Laboratory, balancer: Balancer) -> None:
    moved = [{**backend, "address": at(backend["address"], 8080)} for backend in backends_of(lab)]
    with traffic(lab.client, f"http://{VIP[4]}/"):
        balancer.reload(web(lab), service("other", at(OTHER_VIP, 80), moved))
        assert fetch_many(lab.client, OTHER_VIP) == names(lab)
