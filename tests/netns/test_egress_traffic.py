"""Interfaces that take no frames of XDP: the kernel forwards what leaves by them, and the operator is told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from stage import (
    FAST_CHECK,
    NO_CHECK,
    VIP,
    Balancer,
    at,
    backends_of,
    fetch,
    service,
    start_decapsulation,
    traces,
)

from xdplb.lab.hosts import Host
from xdplb.lab.laboratory import Laboratory, Shape, WebServer, await_until
from xdplb.model import Forward

PORTS = {Forward.NAT: 80, Forward.IPIP: 81, Forward.GUE: 82, Forward.DSR: 83}
VERSIONS = (4, 6)
ALSO = {4: "10.3.0.{}", 6: "fd00:3::{}"}
"""Of a second cable between gateway and client."""


@pytest.fixture(scope="module")
def lab(able: None, bpf_able: None) -> Iterator[Laboratory]:
    with Laboratory(Shape.TWO_ARMED) as lab:
        lab.prepare(Forward.IPIP)
        for host in lab.backends:
            WebServer(host, ports=tuple(PORTS.values())).start()
        start_decapsulation(lab)
        # replies of tunnels come from the service's address; elsewhere only xdplb may switch that on
        lab.gateway.shell("cd /proc/sys/net/ipv4/conf; echo 0 >all/accept_local; echo 1 >eth1/accept_local")
        yield lab


def web(lab: Laboratory, forward: Forward, version: int) -> dict[str, Any]:
    name, listen = f"{forward}{version}", at(VIP[version], PORTS[forward])
    check = FAST_CHECK if forward is Forward.NAT else NO_CHECK
    return service(name, listen, backends_of(lab, version), forward=str(forward), check=check)


@contextmanager
def balancing(
    lab: Laboratory, *modes: Forward, interfaces: Sequence[str] = (), options: Sequence[str] = ()
) -> Iterator[Balancer]:
    """Looks at the host every second, and leaves it as it was."""
    before = traces(lab)
    balancer = Balancer(lab, *interfaces)
    balancer.write(*(web(lab, mode, version) for mode in modes for version in VERSIONS), host={"interval": "1s"})
    balancer.up(options=options)
    try:
        yield balancer
    finally:
        balancer.down()
    assert traces(lab) == before


def serves(lab: Laboratory, *modes: Forward) -> None:
    """Every flow of them, over both families."""
    for mode in modes:
        for version in VERSIONS:
            for _ in range(8):
                assert fetch(lab.client, VIP[version], PORTS[mode]).startswith("backend")


def alarms(balancer: Balancer) -> dict[str, str]:
    return {alarm["name"]: alarm["text"] for alarm in balancer.ask("status")["alarms"]}


def verdicts(balancer: Balancer) -> dict[str, int]:
    return dict(balancer.stats()["verdicts"])


@contextmanager
def second_way_to_the_client(lab: Laboratory) -> Iterator[None]:
    """The gateway's route to the client leads over f2, whose other end has no GRO; the client's leads by eth0."""
    client, gateway = lab.client, lab.gateway
    gateway.shell(f"ip link add f2 type veth peer name c2 netns {client.namespace.name}; ip link set f2 up")
    client.shell("ethtool -K c2 gro off tx off tso off gso off; ip link set c2 up")
    gateway.shell("ethtool -K f2 tx off tso off gso off")
    for version in VERSIONS:
        length, nodad = (24, "") if version == 4 else (64, "nodad")
        gateway.shell(f"ip address add {ALSO[version].format(1)}/{length} dev f2 {nodad}")
        client.shell(f"ip address add {ALSO[version].format(2)}/{length} dev c2 {nodad}")
        gateway.shell(f"ip route add {client.address(version)} via {ALSO[version].format(2)}")
    try:
        yield
    finally:
        gateway.shell("ip link del f2")


@contextmanager
def without_gro(host: Host, interface: str) -> Iterator[None]:
    """What redirects to the other end of this veth is lost."""
    host.shell(f"ethtool -K {interface} gro off")
    try:
        yield
    finally:
        host.shell(f"ethtool -K {interface} gro on")


@pytest.mark.parametrize("mode", ["native", "generic"])
def test_replies_whose_way_leads_over_another_interface(lab: Laboratory, mode: str) -> None:
    """It is none of xdplb's, and takes no frames."""
    with second_way_to_the_client(lab), balancing(lab, Forward.NAT, options=("--mode", mode)) as balancer:
        before = verdicts(balancer)
        serves(lab, Forward.NAT)
        after = verdicts(balancer)
        if mode == "native":
            await_until(lambda: set(alarms(balancer)) == {"egress-no-redirect"}, "the alarm is raised")
            assert alarms(balancer)["egress-no-redirect"].startswith("f2 takes no frames from XDP")
            assert after["pass"] - before["pass"] >= 40, "replies count as what they are"
        else:
            assert not alarms(balancer)
        lab.client.shell("ethtool -K c2 gro on")
        await_until(lambda: not alarms(balancer), "no alarm is left")
        serves(lab, Forward.NAT)


def test_backends_behind_an_interface_that_takes_no_frames(lab: Laboratory) -> None:
    """All modes but dsr work; its backends take no traffic until the interface does."""
    accept_local = "cat /proc/sys/net/ipv4/conf/eth0/accept_local"
    with balancing(lab, *PORTS) as balancer:
        serves(lab, *PORTS)
        assert not alarms(balancer)
        with without_gro(lab.hosts["switch"], "to-gateway"):
            await_until(lambda: "egress-no-redirect" in alarms(balancer), "the alarm is raised")
            text = alarms(balancer)["egress-no-redirect"]
            assert text.startswith("eth1 takes no frames from XDP") and "backends of dsr" in text
            assert lab.gateway.shell(accept_local) == "1\n"
            serves(lab, *(mode for mode in PORTS if mode is not Forward.DSR))
            for version in VERSIONS:
                with pytest.raises(ConnectionRefusedError):
                    fetch(lab.client, VIP[version], PORTS[Forward.DSR])
                assert not balancer.backend(f"dsr{version}", "backend1")["reachable"]
        await_until(lambda: not alarms(balancer), "no alarm is left")
        serves(lab, *PORTS)
        with without_gro(lab.client, "eth0"):
            await_until(lambda: "egress-no-redirect" in alarms(balancer), "the alarm is raised")
            (alarm,) = balancer.ask("status")["alarms"]
            assert alarm["text"].startswith("eth0 takes no frames") and "gro on" in alarm["fix"]
            serves(lab, *PORTS)
        await_until(lambda: not alarms(balancer), "no alarm is left")


def test_backends_behind_an_interface_that_was_not_named(lab: Laboratory) -> None:
    """No program runs there: tunnels work, and of nat it is said that nobody translates the replies."""
    with without_gro(lab.hosts["switch"], "to-gateway"):
        with balancing(lab, Forward.IPIP, Forward.GUE, interfaces=("eth0",)) as balancer:
            await_until(lambda: set(alarms(balancer)) == {"egress-no-redirect"}, "the alarm is raised")
            serves(lab, Forward.IPIP, Forward.GUE)
        with balancing(lab, Forward.NAT, interfaces=("eth0",)) as balancer:
            await_until(lambda: "replies-untranslated" in alarms(balancer), "the alarm is raised")
            (alarm,) = (a for a in balancer.ask("status")["alarms"] if a["name"] == "replies-untranslated")
            assert "eth1" in alarm["text"] and alarm["fix"].endswith("xdplb up eth0 eth1")
