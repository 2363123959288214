"""`xdplb explain` and `xdplb flows`, of connections that are there: told is what happens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from stage import (
    NO_CHECK,
    VIP,
    Balancer,
    at,
    backends_of,
    balancing,
    kept_connection,
    service,
    web_laboratory,
)

from xdplb.lab.laboratory import Laboratory, Shape

CONNECTIONS = 30


lab = web_laboratory(Shape.TWO_ARMED)


def told(balancer: Balancer, source: str, destination: str) -> Any:
    return json.loads(balancer.cli("explain", source, destination, "-o", "json").stdout)


def remembered(balancer: Balancer, *options: str) -> Any:
    return json.loads(balancer.cli("flows", *options, "-o", "json").stdout)


@pytest.mark.parametrize("version", [4, 6])
def test_connections_are_where_they_are_told_to_be(lab: Laboratory, version: int) -> None:
    vip = at(VIP[version], 80)
    web = service("web", vip, backends_of(lab, version), check=NO_CHECK)
    with balancing(lab, web) as balancer, ExitStack() as stack:
        older = [stack.enter_context(kept_connection(lab.client, VIP[version])) for _ in range(CONNECTIONS)]
        owners = {connection: connection.ask() for connection in older}
        assert [told(balancer, c.source, vip)["backend"] for c in older] == list(owners.values())
        assert remembered(balancer)["flows"] == []

        balancer.cli("backend", "drain", "web/backend1")
        silent, *active = [connection for connection, owner in owners.items() if owner == "backend1"]
        younger = stack.enter_context(kept_connection(lab.client, VIP[version]))
        assert [connection.ask() for connection in active] == ["backend1"] * len(active)
        counted = balancer.service_stats("web")

        answer = told(balancer, silent.source, vip)
        assert (answer["backend"], answer["reason"], answer["flow_cache"]) == ("backend1", "previous", "miss")
        assert answer["why"].startswith("backend1 drains, but had the slot before: flows older than the change stay")
        assert answer["new_connection"]["backend"] != "backend1"
        assert (answer["interface"], answer["egress"], answer["verdict"]) == ("eth0", "eth1", "redirect")
        answer = told(balancer, active[0].source, vip)
        assert (answer["backend"], answer["reason"]) == ("backend1", "remembered")
        assert answer["remembered"]["state"] == "established"
        address = str(lab.backends[0].address(version))
        assert answer["after"]["destination"] == answer["address"] == at(address, 80)
        reply = told(balancer, at(address, 80), f"{active[0].source}/tcp")
        assert (reply["reason"], reply["interface"], reply["egress"]) == ("reply", "eth1", "eth0")
        assert (reply["after"]["source"], reply["after"]["destination"]) == (vip, active[0].source)

        assert balancer.service_stats("web") == counted, "questions are not packets"
        flows = remembered(balancer, "--service", "web", "--backend", "backend1")["flows"]
        assert len(flows) == len(active)
        assert {flow["backend"] for flow in flows} == {"backend1"}
        assert told(balancer, active[0].source, vip)["remembered"]["fingerprint"] in {f["fingerprint"] for f in flows}
        assert younger.ask() == told(balancer, younger.source, vip)["backend"]
        assert silent.ask() == "backend1"


def test_without_a_daemon_flows_are_listed_and_questions_refused(lab: Laboratory) -> None:
    with balancing(lab, service("web", at(VIP[4], 80), backends_of(lab), check=NO_CHECK)) as balancer:
        balancer.cli("backend", "drain", "web/backend1")
        with ExitStack() as stack:
            for _ in range(CONNECTIONS):
                stack.enter_context(kept_connection(lab.client, VIP[4])).ask()
            with_daemon = remembered(balancer)
            balancer.kill()
            without = remembered(balancer)
        assert without["flows"] and without["capacity"] == 262_144
        assert [f["fingerprint"] for f in without["flows"]] == [f["fingerprint"] for f in with_daemon["flows"]]
        said = balancer.cli("flows", "--limit", "1").stdout
        assert f"and {len(without['flows']) - 1} more" in said
        assert balancer.cli("explain", "192.0.2.9:40000", at(VIP[4], 80), check=False).returncode == 4


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        ("explain 192.0.2.9 203.0.113.10:80", 2, "'192.0.2.9' is not ADDRESS:PORT"),
        ("explain 192.0.2.9:1 203.0.113.10:80/sctp", 2, "'sctp' is neither tcp nor udp"),
        ("flows --service wep", 2, "there is no service 'wep'\n  hint: there are: web"),
        (
            "flows --service web --backend x",
            2,
            "web has no backend 'x'\n  hint: there are: backend1, backend2, backend3",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(balancer: Balancer, command: str, code: int, words: str) -> None:
    said = balancer.cli(*command.split(), check=False)
    assert (said.returncode, said.stdout) == (code, "")
    assert words in said.stderr


@pytest.fixture(scope="module")
def balancer(lab: Laboratory) -> Iterator[Balancer]:
    with balancing(lab, service("web", at(VIP[4], 80), backends_of(lab), check=NO_CHECK)) as running:
        yield running
