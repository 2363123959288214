"""Names of interfaces are labels: dots and quotes in them, long ones, new ones; and interfaces that go and come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from stage import NO_CHECK, VIP, Balancer, at, backends_of, balancing, fetch, fetch_many, service, traces

from xdplb.lab.hosts import Host
from xdplb.lab.laboratory import Laboratory, Shape, WebServer, await_until
from xdplb.model import Forward

LONG = "the-interface-that-faces-the-clients"


@pytest.fixture(scope="module")
def lab(able: None, bpf_able: None) -> Iterator[Laboratory]:
    with Laboratory(Shape.TWO_ARMED) as made:
        made.prepare(Forward.NAT)
        made.gateway.shell("cd /proc/sys/net; echo 0 >ipv4/conf/all/forwarding; echo 0 >ipv6/conf/all/forwarding")
        for host in made.backends:
            WebServer(host).start()
        yield made


@pytest.fixture(autouse=True)
def untouched(lab: Laboratory) -> Iterator[None]:
    """Whatever it was called meanwhile, there is no trace left."""
    before = traces(lab)
    yield
    assert traces(lab) == before


def web(lab: Laboratory) -> list[dict[str, object]]:
    return [service(f"web{v}", at(VIP[v], 80), backends_of(lab, v), check=NO_CHECK) for v in (4, 6)]


def works(lab: Laboratory) -> bool:
    return all(len(fetch_many(lab.client, VIP[version])) == len(lab.backends) for version in (4, 6))


def rename(lab: Laboratory, old: str, new: str) -> None:
    lab.gateway.run(["ip", "link", "set", "dev", old, "name", new])


@pytest.mark.parametrize("name", ["eth0.100", 'a"b', "~!@#?*", "ä.ö", "a\\b", "$x;'y"])
def test_names_of_all_kinds(lab: Laboratory, name: str) -> None:
    rename(lab, "eth0", name)
    try:
        with balancing(lab, *web(lab), interfaces=[name, "eth1"]) as balancer:
            assert works(lab)
            assert balancer.stats()["services"][0]["packets"] > 0
            balancer.kill()
            balancer.up()
            balancer.process.wait_for_line("took over")
    finally:
        rename(lab, name, "eth0")


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("which", ["eth0", "wan.7", LONG])
def test_one_that_is_renamed_is_found_by_its_old_and_its_new_names(lab: Laboratory, killed: bool, which: str) -> None:
    lab.gateway.shell(f"ip link property add dev eth0 altname {LONG}")
    balancer = Balancer(lab)
    balancer.up(*web(lab))
    if killed:
        balancer.kill()
    rename(lab, "eth0", "wan.7")
    rename(lab, "eth1", "lan")
    try:
        assert works(lab)
        if not killed:
            await_until(lambda: "eth0 is called wan.7 now" in balancer.process.log(), "it has noticed")
            assert balancer.cli("status", "--interface", "wan.7").returncode == 0
        done = balancer.cli("down", which).stdout
        assert "eth0" in done or "wan.7" in done
    finally:
        lab.gateway.shell("ip link set dev wan.7 name eth0; ip link set dev lan name eth1")
        lab.gateway.shell(f"ip link property del dev eth0 altname {LONG}")


def test_the_next_one_takes_over_under_the_new_name(lab: Laboratory) -> None:
    balancer = Balancer(lab)
    balancer.up(*web(lab))
    balancer.kill()
    rename(lab, "eth0", "wan")
    try:
        balancer.interfaces = ("wan", "eth1")
        balancer.up()
        balancer.process.wait_for_line("took over")
        assert works(lab)
        balancer.cli("down", "wan")
        assert balancer.attached() == {}
    finally:
        rename(lab, "wan", "eth0")


def test_a_long_alternative_name_is_a_name(lab: Laboratory) -> None:
    lab.gateway.shell(f"ip link property add dev eth0 altname {LONG}")
    try:
        balancer = Balancer(lab)
        balancer.interfaces = (LONG, "eth1")
        balancer.up(*web(lab))
        assert works(lab) and set(balancer.attached()) == {"eth0", "eth1"}
        assert balancer.cli("down", LONG).stdout == "stopped balancing on eth0\n"
        twice = balancer.cli("up", "eth0", LONG, "-c", str(balancer.file), check=False)
        assert twice.returncode == 2 and "named twice" in twice.stderr
    finally:
        lab.gateway.shell(f"ip link property del dev eth0 altname {LONG}")


def alarms(balancer: Balancer) -> set[str]:
    return {alarm["name"] for alarm in balancer.ask("status")["alarms"]}


def furnish(host: Host, address4: object, address6: object, *routes: str) -> None:
    """An interface eth0 as the laboratory makes it."""
    host.shell(
        f"ip link set eth0 up; ip address add {address4}/24 dev eth0; ip address add {address6}/64 dev eth0 nodad"
    )
    host.shell("ethtool -K eth0 tx off tso off gso off gro on")
    for route in routes:
        host.shell(f"ip route add {route}")


@pytest.fixture
def short_lived(two_armed: Callable[..., Laboratory]) -> Laboratory:
    """Whose cables may be cut."""
    made = two_armed()
    made.prepare(Forward.NAT)
    for host in made.backends:
        WebServer(host).start()
    return made


def test_one_that_moves_away_is_an_alarm_and_works_when_it_is_back(short_lived: Laboratory) -> None:
    lab, client = short_lived, short_lived.client
    with balancing(lab, *web(lab)) as balancer:
        program = balancer.attached()["eth0"]
        lab.gateway.run(["ip", "link", "set", "eth0", "netns", client.namespace.name, "name", "moved"])
        await_until(lambda: "interface-gone" in alarms(balancer), "the alarm is raised")
        client.run(["ip", "link", "set", "moved", "netns", lab.gateway.namespace.name, "name", "eth0"])
        furnish(lab.gateway, lab.gateway.address(4), lab.gateway.address(6))
        await_until(lambda: not alarms(balancer), "no alarm is left")
        await_until(lambda: reached(lab), "clients reach it")
        assert balancer.attached()["eth0"] == program


def test_one_that_moved_away_is_told_by_down(short_lived: Laboratory) -> None:
    """From here nothing reaches it."""
    lab, client = short_lived, short_lived.client
    balancer = Balancer(lab)
    balancer.up(*web(lab))
    balancer.kill()
    lab.gateway.run(["ip", "link", "set", "eth0", "netns", client.namespace.name, "name", "moved"])
    said = balancer.down()
    assert "detached from eth1" in said and "eth0 is gone; where it was moved" in said
    client.shell("ip link set dev moved xdp off")


def test_one_that_is_deleted_and_made_again_is_attached_to_again(short_lived: Laboratory) -> None:
    lab, client, gateway = short_lived, short_lived.client, short_lived.gateway
    own = {host: (host.address(4), host.address(6)) for host in (client, gateway)}
    with balancing(lab, *web(lab)) as balancer:
        gateway.shell("ip link del eth0")
        await_until(lambda: "interface-gone" in alarms(balancer), "the alarm is raised")
        assert balancer.process.running and "eth1" in balancer.attached()
        gateway.shell(f"ip link add eth0 type veth peer name eth0 netns {client.namespace.name}")
        furnish(client, *own[client], *(f"default via {address}" for address in own[gateway]))
        furnish(gateway, *own[gateway])
        await_until(lambda: not alarms(balancer), "no alarm is left")
        await_until(lambda: reached(lab), "clients reach it")
        assert set(balancer.attached()) == {"eth0", "eth1"}
        balancer.down()
        assert balancer.attached() == {} and str(VIP[4]) not in gateway.shell("ip -o address")


def reached(lab: Laboratory) -> bool:
    with suppress(OSError):
        return all(fetch(lab.client, VIP[version], 80, timeout_s=0.5) for version in (4, 6))
    return False
