"""What somebody changes on the host while it balances is mended within a second, or is an alarm until it is gone."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from stage import (
    NO_CHECK,
    VIP,
    Balancer,
    at,
    attach_foreign_program,
    backends_of,
    balancing,
    fetch,
    fetch_many,
    service,
    traces,
    web_laboratory,
)

from xdplb.lab.hosts import Host
from xdplb.lab.laboratory import Laboratory, Shape, await_until

SOON_S = 1.0


lab = web_laboratory(Shape.TWO_ARMED)


@pytest.fixture
def balancer(lab: Laboratory) -> Iterator[Balancer]:
    """Balances both families; at the end there is no trace of it."""
    before = traces(lab)
    with balancing(lab, *web(lab)) as made:
        yield made
    assert traces(lab) == before


def web(lab: Laboratory) -> list[dict[str, object]]:
    return [service(f"web{v}", at(VIP[v], 80), backends_of(lab, v), check=NO_CHECK) for v in (4, 6)]


def works(lab: Laboratory, version: int = 4) -> bool:
    with suppress(OSError):
        return bool(fetch(lab.client, VIP[version], 80, timeout_s=0.3))
    return False


def mends(lab: Laboratory, what: Callable[[], bool], within_s: float = SOON_S) -> None:
    """It is right again in time, and clients notice it."""
    begun = time.monotonic()
    await_until(what, "it is mended", timeout_s=10)
    assert time.monotonic() - begun < within_s
    for version in (4, 6):
        await_until(lambda version=version: works(lab, version), f"IPv{version} works")  # type: ignore[misc]


def alarms(balancer: Balancer) -> set[str]:
    return {alarm["name"] for alarm in balancer.ask("status")["alarms"]}


def read(lab: Laboratory, setting: str) -> str:
    return lab.gateway.shell(f"cat /proc/sys/{setting}").strip()


def mac_of(host: Host) -> str:
    return str(json.loads(host.shell("ip -j link show dev eth0"))[0]["address"])


@pytest.mark.parametrize("version", [4, 6])
def test_an_address_that_somebody_deleted_is_added_again(lab: Laboratory, balancer: Balancer, version: int) -> None:
    lab.gateway.shell(f"ip address del {VIP[version]}/{32 if version == 4 else 128} dev eth0")
    mends(lab, lambda: f" {VIP[version]}/" in lab.gateway.shell("ip -o address"))
    balancer.process.wait_for_line(f"{VIP[version]} was missing on eth0: added again")
    await_until(lambda: not alarms(balancer), "no alarm is left")


def test_all_addresses_flushed_at_once_come_back(lab: Laboratory, balancer: Balancer) -> None:
    """As a network manager does that restarts."""
    own = lab.gateway.shell("ip -o address show dev eth0 scope global").splitlines()
    lab.gateway.shell("ip address flush dev eth0 scope global")
    for line in own:
        _, _, _, address, *_ = line.split()
        if not any(address.startswith(str(vip)) for vip in VIP.values()):
            lab.gateway.shell(f"ip address replace {address} dev eth0 nodad")
    mends(lab, lambda: all(f" {vip}/" in lab.gateway.shell("ip -o address") for vip in VIP.values()))


def test_a_link_that_went_down_has_its_addresses_when_it_is_up(lab: Laboratory, balancer: Balancer) -> None:
    """The kernel drops IPv6 addresses with the link."""
    own = lab.gateway.address(6)
    lab.gateway.shell("ip link set eth0 down")
    await_until(lambda: "interface-down" in alarms(balancer), "the alarm is raised")
    assert f" {VIP[6]}/" not in lab.gateway.shell("ip -o address")
    lab.gateway.shell(f"ip link set eth0 up; ip address add {own}/64 dev eth0 nodad")
    mends(lab, lambda: f" {VIP[6]}/" in lab.gateway.shell("ip -o address"))
    await_until(lambda: not alarms(balancer), "no alarm is left")


def test_a_program_that_somebody_took_off_is_attached_again(lab: Laboratory, balancer: Balancer) -> None:
    before = balancer.attached()
    for interface in ("eth0", "eth1"):
        lab.gateway.shell(f"ip link set dev {interface} xdp off")
        mends(lab, lambda: balancer.attached() == before)
        balancer.process.wait_for_line(f"{interface} ran no XDP program: attached again")


def test_a_foreign_program_is_an_alarm_and_is_left_alone(lab: Laboratory, balancer: Balancer) -> None:
    before = balancer.attached()
    balancer.process.send_signal(signal.SIGSTOP)  # or it would be quicker than whoever attaches the other one
    foreign = attach_foreign_program(lab, "eth0")
    balancer.process.send_signal(signal.SIGCONT)
    await_until(lambda: "program-foreign" in alarms(balancer), "the alarm is raised")
    assert balancer.attached()["eth0"]["prog"]["id"] == foreign
    (alarm,) = balancer.ask("status")["alarms"]
    assert f"id {foreign}" in alarm["text"] and "xdp off" in alarm["fix"]
    lab.gateway.shell("ip link set dev eth0 xdp off")
    mends(lab, lambda: balancer.attached() == before)
    await_until(lambda: not alarms(balancer), "no alarm is left")


@pytest.mark.parametrize(
    ("setting", "checked"),
    [
        ("net/ipv4/ip_forward", "net/ipv4/conf/eth0/forwarding"),
        ("net/ipv4/conf/eth1/forwarding", "net/ipv4/conf/eth1/forwarding"),
        ("net/ipv6/conf/all/forwarding", "net/ipv6/conf/eth1/forwarding"),
    ],
)
def test_forwarding_that_somebody_switched_off_is_switched_on(
    lab: Laboratory, balancer: Balancer, setting: str, checked: str
) -> None:
    before = lab.gateway.shell("grep -r . /proc/sys/net/ipv?/conf/*/forwarding")
    lab.gateway.shell(f"echo 0 > /proc/sys/{setting}")
    mends(lab, lambda: read(lab, checked) == "1")
    balancer.down()
    for line in before.splitlines():  # what the test itself changed
        path, _, value = line.partition(":")
        lab.gateway.shell(f"echo {value} > {path}")


def test_what_is_pinned_is_told_and_not_mended(lab: Laboratory) -> None:
    balancer = Balancer(lab)
    balancer.write(*web(lab), host={"addresses": "alarm", "settings": "alarm", "interval": "1s"})
    lab.gateway.shell(f"ip address add {VIP[4]}/32 dev eth0; ip address add {VIP[6]}/128 dev eth0 nodad")
    lab.gateway.shell("for name in eth0 eth1; do echo 1 >/proc/sys/net/ipv4/conf/$name/accept_local; done")
    lab.gateway.shell("echo 1 >/proc/sys/net/ipv6/conf/all/forwarding; echo 1 >/proc/sys/net/ipv4/ip_forward")
    lab.gateway.shell("for name in all eth0 eth1; do echo 0 >/proc/sys/net/ipv4/conf/$name/rp_filter; done")
    before = traces(lab)
    try:
        balancer.up()
        await_until(lambda: works(lab, 4) and works(lab, 6), "it works")
        assert not alarms(balancer)
        lab.gateway.shell(f"ip address del {VIP[4]}/32 dev eth0")
        lab.gateway.shell("echo 0 >/proc/sys/net/ipv4/conf/eth0/accept_local")
        await_until(lambda: alarms(balancer) == {"address-missing", "setting-changed"}, "both alarms are raised")
        fixes = sorted(alarm["fix"] for alarm in balancer.ask("status")["alarms"])
        assert fixes == [f"ip address add {VIP[4]}/32 dev eth0", "sysctl -w net.ipv4.conf.eth0.accept_local=1"]
        for fix in fixes:
            lab.gateway.shell(fix)
        await_until(lambda: not alarms(balancer), "no alarm is left")
    finally:
        balancer.down()
    after = traces(lab)
    lab.gateway.shell(f"ip address del {VIP[4]}/32 dev eth0; ip address del {VIP[6]}/128 dev eth0")
    lab.gateway.shell("for name in eth0 eth1; do echo 0 >/proc/sys/net/ipv4/conf/$name/accept_local; done")
    assert {**after, "addresses": ""} == {**before, "addresses": ""}
    assert sorted(after["addresses"].splitlines()) == sorted(before["addresses"].splitlines())


def test_who_flaps_is_not_fought_without_end(lab: Laboratory, balancer: Balancer) -> None:
    for _ in range(6):
        await_until(lambda: f" {VIP[4]}/" in lab.gateway.shell("ip -o address"), "it is there")
        lab.gateway.shell(f"ip address del {VIP[4]}/32 dev eth0")
    await_until(lambda: "address-missing" in alarms(balancer), "the alarm is raised")
    (alarm,) = balancer.ask("status")["alarms"]
    assert "times within a minute" in alarm["text"]
    await_until(lambda: f" {VIP[4]}/" in lab.gateway.shell("ip -o address"), "it is mended all the same, later")
    assert alarms(balancer) == {"address-missing"}, "not over before it stayed for a while"


def test_an_address_is_announced_when_it_comes(lab: Laboratory) -> None:
    """At `up`, by a reload, and when it is put back: a client that knew it elsewhere is told, unasked."""
    elsewhere = "02:00:00:00:0e:15"
    mac = mac_of(lab.gateway)

    def believe(version: int) -> None:
        lab.client.shell(f"ip neigh replace {VIP[version]} lladdr {elsewhere} nud reachable dev eth0")

    def is_told(version: int) -> None:
        await_until(lambda: mac in lab.client.shell(f"ip neigh show {VIP[version]}"), f"it knows of IPv{version}")

    believe(4)
    four, six = web(lab)
    with balancing(lab, four) as balancer:
        is_told(4)
        believe(6)
        balancer.reload(four, six)
        is_told(6)
        await_until(lambda: works(lab, 4) and works(lab, 6), "it works")
        time.sleep(2.5)  # until the last announcement of these is over
        for version, length in ((4, 32), (6, 128)):
            believe(version)
            lab.gateway.shell(f"ip address del {VIP[version]}/{length} dev eth0")
            is_told(version)
    lab.client.shell("ip neigh flush dev eth0")


def test_an_address_that_another_host_has_is_taken_with_an_alarm(lab: Laboratory) -> None:
    for version, length in ((4, 32), (6, 128)):
        lab.client.shell(f"ip address add {VIP[version]}/{length} dev eth0 nodad")
    mac = mac_of(lab.client)
    try:
        with balancing(lab, *web(lab)) as balancer:
            found = {a["name"]: a["text"] for a in balancer.ask("status")["alarms"]}
            assert found.keys() == {"address-conflict"} and mac in found["address-conflict"]
            assert len(balancer.ask("status")["alarms"]) == 2
            for version, length in ((4, 32), (6, 128)):
                lab.client.shell(f"ip address del {VIP[version]}/{length} dev eth0")
            await_until(lambda: not alarms(balancer), "no alarm is left", timeout_s=15)
            assert fetch_many(lab.client, VIP[4])
    finally:
        lab.client.shell(f"ip address flush to {VIP[4]}; ip -6 address flush to {VIP[6]}")


def test_what_two_need_goes_with_the_last_of_them(lab: Laboratory) -> None:
    """An address, the neighbours and the settings of the whole host; whoever of the two set them."""
    before = traces(lab)
    outer, inner = Balancer(lab, "eth0"), Balancer(lab, "eth1")
    outer.up(*web(lab))
    inner.up(*(service(f"more{v}", at(VIP[v], 81), backends_of(lab, v), check=NO_CHECK) for v in (4, 6)))
    outer.kill()
    assert f"left {VIP[4]} to eth1, which needs it too" in outer.down()
    addresses = lab.gateway.shell("ip -o address")
    assert all(f" {vip}/" in addresses for vip in VIP.values())
    assert read(lab, "net/ipv6/conf/all/forwarding") == "1" and not alarms(inner)
    assert traces(lab)["neighbours"] == "6\n"
    inner.down()
    assert traces(lab) == before


def test_a_neighbour_that_leaves_checksums_unfinished_is_told(lab: Laboratory) -> None:
    """A veth hands packets over as the sender left them to a card. Seen are those that the kernel gets: of clients
    and of backends.
    """
    balancer = Balancer(lab)
    balancer.write(*web(lab), host={"interval": "1s"})
    backend = lab.backends[0]

    def told_while_it_talks(host: Host) -> dict[str, str] | None:
        with suppress(OSError):
            if host is lab.client:
                fetch(host, lab.gateway.address(4), 81, timeout_s=0.1)
            else:
                fetch(lab.gateway, host.address(4), 80, timeout_s=0.1)
        return next((a for a in balancer.ask("status")["alarms"] if mac_of(host) in a["text"]), None)

    lab.hosts["switch"].shell("ethtool -K to-gateway tx on")  # or it would finish those of backends
    balancer.up()
    try:
        for host, interface, on in (
            (lab.client, "eth0", "tx on"),
            (backend, "eth1", "tx on"),
            (lab.client, "eth0", "tx on tso on gso on"),
        ):
            host.shell(f"ethtool -K eth0 {on}")
            await_until(lambda host=host: told_while_it_talks(host) is not None, "the alarm is raised", 30)  # type: ignore[misc]
            alarm = told_while_it_talks(host)
            assert alarm is not None and alarm["name"] == "checksums-unfinished"
            assert interface in alarm["text"] and "tx off" in alarm["fix"]
            balancer.process.wait_for_line(f"{mac_of(host)} sends packets to {interface} with unfinished checksums")
            host.shell("ethtool -K eth0 tx off tso off gso off")
            await_until(lambda host=host: told_while_it_talks(host) is None, "the alarm is over", 30)  # type: ignore[misc]
    finally:
        for host in (lab.client, backend):
            host.shell("ethtool -K eth0 tx off tso off gso off")
        lab.hosts["switch"].shell("ethtool -K to-gateway tx off")
        balancer.down()


@pytest.mark.alone
@pytest.mark.parametrize("version", [4, 6])
def test_a_backend_that_changed_its_mac_without_a_word_is_found_by_its_check(lab: Laboratory, version: int) -> None:
    """The kernel would trust its neighbour entry for another 20 seconds."""
    backend, *_ = lab.backends
    check = {"type": "tcp", "interval": "500ms", "timeout": "500ms", "fall": 1}
    before = mac_of(backend)
    with balancing(lab, service("web", at(VIP[version], 80), backends_of(lab, version)[:1], check=check)) as balancer:
        time.sleep(1.1)  # the kernel takes no answer within a second of the last change (locktime)
        begun = time.monotonic()
        backend.shell("ip link set dev eth0 address 02:00:00:00:00:77")
        try:
            await_until(lambda: not works(lab, version), "the old address leads nowhere")
            await_until(lambda: works(lab, version), "the new address is known")
            assert time.monotonic() - begun < 2.0
            assert balancer.states("web") == {backend.name: "up"}
        finally:
            backend.shell(f"ip link set dev eth0 address {before}")
            lab.gateway.shell("ip neigh flush all")
