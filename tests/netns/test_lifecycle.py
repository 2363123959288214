"""What starts, ends, is killed and comes back: no packet is lost that need not be, and nothing is left behind."""

from __future__ import annotations

import json
import shutil
import signal
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from nobody import AS_NOBODY
from stage import (
    FAST_CHECK,
    NO_CHECK,
    VIP,
    Balancer,
    alive,
    at,
    backends_of,
    balancing,
    continues,
    fetch,
    fetch_many,
    kept_connection,
    service,
    traces,
    traffic,
)

from xdplb.lab.laboratory import Laboratory, Process, Shape, UdpEcho, WebServer, await_until
from xdplb.model import Forward

URL = f"http://{VIP[4]}/"
FRESH_HOST = """
cd /proc/sys/net
echo 0 > ipv6/conf/all/forwarding
echo 1 > ipv6/conf/eth1/forwarding
echo 1 > ipv6/conf/eth0/accept_ra
echo 1 > ipv4/conf/all/rp_filter
"""
"""Settings of a machine that never was a router."""


def build(shape: Shape) -> Iterator[Laboratory]:
    with Laboratory(shape) as lab:
        lab.prepare(Forward.NAT)
        for host in lab.backends:
            WebServer(host).start()
            UdpEcho(host, 5300).start()
        yield lab


@pytest.fixture(scope="module")
def lab(able: None, bpf_able: None) -> Iterator[Laboratory]:
    yield from build(Shape.ONE_ARMED)


@pytest.fixture(scope="module")
def two_arms(able: None, bpf_able: None) -> Iterator[Laboratory]:
    yield from build(Shape.TWO_ARMED)


@pytest.fixture
def balancer(lab: Laboratory) -> Iterator[Balancer]:
    """Down again at the end, whatever the test did to it, with no trace."""
    yield from leaving_no_trace(lab)


@pytest.fixture
def two_armed_balancer(two_arms: Laboratory) -> Iterator[Balancer]:
    yield from leaving_no_trace(two_arms)


def leaving_no_trace(lab: Laboratory) -> Iterator[Balancer]:
    before = traces(lab)
    balancer = Balancer(lab)
    yield balancer
    lab.gateway.xdplb("down", "eth0")
    assert traces(lab) == before


def web(lab: Laboratory, version: int = 4, **more: object) -> dict[str, object]:
    return service(f"web{version}", at(VIP[version], 80), backends_of(lab, version), **more)


def test_killed_daemon_packets_flow_on_and_the_next_one_takes_over(lab: Laboratory, balancer: Balancer) -> None:
    balancer.up(web(lab), web(lab, 6))
    with traffic(lab.client, URL) as load, kept_connection(lab.client, VIP[4]) as connection:
        served_by = connection.ask()
        balancer.kill()
        continues(load, requests=400)
        before = balancer.stats()
        manifest = json.loads((balancer.runtime / "manifest.json").read_text())
        assert balancer.cli("status", check=False).returncode == 4
        balancer.up()
        balancer.process.wait_for_line("took over")
        continues(load)
        after, now = balancer.stats(), json.loads((balancer.runtime / "manifest.json").read_text())
        for name in ("id", "first_slot", "backends"):
            assert now["services"]["web4"][name] == manifest["services"]["web4"][name]
        for old, new in zip(before["services"][0]["backends"], after["services"][0]["backends"], strict=True):
            assert new["packets"] >= old["packets"]
        assert after["services"][0]["packets"] > before["services"][0]["packets"]
        assert connection.ask() == served_by
        balancer.process.send_signal(signal.SIGUSR1)
        assert balancer.process.wait() == 0
        continues(load)
        balancer.up()
        assert connection.ask() == served_by


def refused(lab: Laboratory) -> bool:
    """Whether the gateway's own kernel answers, where nobody listens. Not yet if it comes in half-way: it resets the
    request then, or the client waits for an answer in vain.
    """
    try:
        fetch(lab.client, VIP[4], 80)
    except (ConnectionError, TimeoutError) as error:
        return isinstance(error, ConnectionRefusedError)
    return False


@contextmanager
def stopped(process: Process) -> Iterator[None]:
    """As one whose event loop is stuck."""
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def test_on_control_loss_pass_leaves_packets_to_the_kernel_until_a_daemon_is_back(
    lab: Laboratory, balancer: Balancer
) -> None:
    balancer.write(web(lab), on_control_loss={"pass": {"after": "3s"}})
    balancer.up()
    with traffic(lab.client, URL) as load:
        continues(load, requests=1000)  # 5 s

    with stopped(balancer.process):
        assert not refused(lab)
        await_until(lambda: refused(lab), "packets are passed on", timeout_s=20)
    await_until(lambda: not refused(lab), "it is trusted again")

    balancer.kill()
    assert not refused(lab)
    await_until(lambda: refused(lab), "packets are passed on", timeout_s=20)
    balancer.up()
    assert fetch_many(lab.client, VIP[4]) == {host.name for host in lab.backends}

    balancer.reload(web(lab))
    balancer.kill()
    with traffic(lab.client, URL) as load:
        continues(load, requests=1000)  # 5 s


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_without_a_trace(two_arms: Laboratory, number: signal.Signals) -> None:
    two_arms.gateway.shell(FRESH_HOST)
    before = traces(two_arms)
    balancer = Balancer(two_arms)
    balancer.up(web(two_arms), web(two_arms, 6))
    assert fetch_many(two_arms.client, VIP[4]) == fetch_many(two_arms.client, VIP[6])
    assert traces(two_arms) != before
    balancer.process.send_signal(number)
    assert balancer.process.wait() == 0
    assert traces(two_arms) == before
    assert balancer.down() == "eth0: nothing to do\n"


def test_a_signal_while_it_starts_leaves_no_trace(lab: Laboratory, balancer: Balancer) -> None:
    before = traces(lab)
    balancer.write(web(lab, check={**FAST_CHECK, "port": 81}))
    for number in (signal.SIGTERM, signal.SIGINT):
        process = balancer.begin()
        process.wait_until(lambda: "unknown -> down" in process.log(), "it checks backends")  # noqa: B023
        process.send_signal(number)
        process.wait(10)
        assert traces(lab) == before


@pytest.mark.alone
def test_down_ends_a_daemon_that_is_still_starting(lab: Laboratory, balancer: Balancer) -> None:
    balancer.write(web(lab))
    process = balancer.begin()
    process.wait_until(lambda: "unknown -> up" in process.log(), "it checks backends")
    balancer.down()
    assert process.wait() == 0


def test_down_after_a_kill_and_twice(lab: Laboratory, balancer: Balancer) -> None:
    before = traces(lab)
    balancer.up(web(lab), web(lab, 6))
    balancer.kill()
    assert "detached from eth0" in balancer.down()
    assert traces(lab) == before
    assert balancer.down() == "eth0: nothing to do\n"
    assert balancer.cli("stats", check=False).returncode == 4


def test_in_the_background(lab: Laboratory, balancer: Balancer) -> None:
    balancer.write(web(lab))
    assert "attached" in balancer.cli("up", "eth0", "-d", "-c", str(balancer.file)).stderr
    pid = int((balancer.runtime / "lock").read_text())
    assert fetch(lab.client, VIP[4], 80)
    again = balancer.cli("up", "eth0", "-d", "-c", str(balancer.file), check=False)
    assert again.returncode == 1 and str(pid) in again.stderr and "down eth0" in again.stderr
    assert fetch(lab.client, VIP[4], 80)
    socket_mode = (balancer.runtime / "control.sock").stat().st_mode
    assert stat.S_IMODE(socket_mode) == 0o660
    assert balancer.down() == "stopped balancing on eth0\n"
    await_until(lambda: not alive(pid), "the daemon is gone")


def test_only_root_and_the_group_may_talk_to_it(lab: Laboratory, balancer: Balancer) -> None:
    balancer.up(web(lab))
    for path in (lab.directory, lab.gateway.directory):
        path.chmod(0o755)
    as_nobody = [*AS_NOBODY, sys.executable, "-m", "xdplb"]
    refused = lab.gateway.run([*as_nobody, "status"], check=False)
    assert refused.returncode == 5 and "sudo" in refused.stderr
    refused = lab.gateway.run([*as_nobody, "up", "eth0", "-c", str(balancer.file)], check=False)
    assert refused.returncode == 5
    assert lab.gateway.run([*as_nobody, "check", str(balancer.file)], check=False).returncode == 0


def test_a_corrupt_manifest_is_said_and_stops_nothing(lab: Laboratory, balancer: Balancer) -> None:
    balancer.up(web(lab))
    balancer.kill()
    manifest = balancer.runtime / "manifest.json"
    whole = manifest.read_text()
    for broken in ("{", '{"version": 1}', whole.replace('"geometry": {', '"geometry": {"unheard_of": 1, ')):
        manifest.write_text(broken)
        if broken != whole and "unheard_of" not in broken:
            code, said = balancer.refuses_to_start()
            assert code == 1 and "down eth0" in said and "Traceback" not in said
        assert fetch(lab.client, VIP[4], 80)
    with traffic(lab.client, URL) as load:
        continues(load, requests=400)
        before = balancer.service_stats("web4")["packets"]
        balancer.up()
        assert balancer.service_stats("web4")["packets"] >= before, "the old maps' pins were replaced"
        continues(load)


def test_lost_pins_and_lost_manifest(lab: Laboratory, balancer: Balancer) -> None:
    balancer.up(web(lab))
    with traffic(lab.client, URL) as load:
        balancer.kill()
        for pin in sorted(next(p for p in balancer.pins.iterdir() if p.is_dir()).iterdir())[::2]:
            pin.unlink()
        balancer.up()
        continues(load)
        balancer.kill()
        shutil.rmtree(balancer.pins)
        balancer.up()
        continues(load)
        balancer.kill()
        manifest = balancer.runtime / "manifest.json"
        only_it_knew_what_to_undo = manifest.read_text()
        manifest.unlink()
        balancer.up()
        continues(load)
        balancer.kill()
        manifest.write_text(only_it_knew_what_to_undo)


def test_maps_of_another_abi_are_replaced_in_one_step(lab: Laboratory, balancer: Balancer) -> None:
    """Another hash key means other maps. The backends of flows change, so this has the same one everywhere."""
    only = [backends_of(lab)[0]]
    balancer.up(service("web4", at(VIP[4], 80), only))
    with traffic(lab.client, URL) as load, kept_connection(lab.client, VIP[4]) as connection:
        assert connection.ask()
        balancer.kill()
        before = balancer.service_stats("web4")
        balancer.write(service("web4", at(VIP[4], 80), only), hash_key="another secret of some length")
        balancer.up()
        balancer.process.wait_for_line("building new ones")
        continues(load)
        assert connection.ask()
        assert balancer.service_stats("web4")["packets"] >= before["packets"]
        assert len([path for path in balancer.pins.iterdir() if path.is_dir()]) == 1


def test_what_cannot_be_taken_over_stays_as_it_is(lab: Laboratory, balancer: Balancer) -> None:
    balancer.up(web(lab))
    balancer.kill()
    code, said = balancer.refuses_to_start("--mode", "generic")
    assert code == 6 and "generic" in said, said
    assert fetch_many(lab.client, VIP[4]) == {host.name for host in lab.backends}
    assert balancer.attached()["eth0"]["mode"] == 1
    balancer.up()


def test_a_second_arm_comes_and_goes(two_arms: Laboratory, two_armed_balancer: Balancer) -> None:
    narrow = Balancer(two_arms, "eth0")
    two_armed_balancer.up(web(two_arms))
    assert set(two_armed_balancer.attached()) == {"eth0", "eth1"}
    two_armed_balancer.kill()
    narrow.up(web(two_arms))
    assert set(narrow.attached()) == {"eth0"}
    narrow.kill()
    two_armed_balancer.up()
    assert set(two_armed_balancer.attached()) == {"eth0", "eth1"}
    assert fetch_many(two_arms.client, VIP[4]) == {host.name for host in two_arms.backends}
    two_armed_balancer.kill()
    manifest = two_armed_balancer.runtime / "manifest.json"
    only_it_knew_what_to_undo = manifest.read_text()
    manifest.write_text("{")
    two_armed_balancer.down()
    assert two_armed_balancer.attached() == {}
    manifest.parent.mkdir(parents=True)
    manifest.write_text(only_it_knew_what_to_undo)


@pytest.mark.alone
def test_kill_in_the_middle_of_a_reload(lab: Laboratory, balancer: Balancer) -> None:
    balancer.up(web(lab, check=NO_CHECK))
    unreachable = [{"name": f"b{n}", "address": f"198.51.{n // 200}.{n % 200}"} for n in range(597)]
    many = [*backends_of(lab), *unreachable]
    with traffic(lab.client, URL) as load:
        balancer.write(service("web4", at(VIP[4], 80), many, check=NO_CHECK), web(lab, 6))
        fresh_pins = balancer.pins / "program_new"
        generations = len(list(balancer.pins.iterdir()))
        balancer.process.send_signal(signal.SIGHUP)
        await_until(
            lambda: fresh_pins.exists() or len(list(balancer.pins.iterdir())) > generations, "the reload changes things"
        )
        balancer.kill()
        continues(load)
        balancer.up()
        continues(load)
        assert len(balancer.states("web4")) == 600
        assert fetch_many(lab.client, VIP[6]) == {host.name for host in lab.backends}
        assert len([path for path in balancer.pins.iterdir() if path.is_dir()]) == 1


def test_state_that_cannot_be_kept(lab: Laboratory, balancer: Balancer) -> None:
    balancer.write(web(lab))
    a_file = lab.directory / "a-file"
    a_file.touch()
    for nowhere in (a_file / "state", Path("/proc/xdplb")):
        process = balancer.begin(env={"XDPLB_STATE_DIRECTORY": str(nowhere)})
        assert process.wait(10) == 1
        assert str(nowhere) in process.log() and "Traceback" not in process.log()


def test_two_instances_side_by_side(two_arms: Laboratory) -> None:
    """Each on its own interface; clients of the outer one do not notice that the inner one comes and goes."""
    two_arms.prepare(Forward.DSR)
    two_arms.gateway.shell("cd /proc/sys/net; echo 0 >ipv6/conf/all/forwarding; echo 0 >ipv4/conf/all/rp_filter")
    before = traces(two_arms)
    outside = [service("outside", at(VIP[4], 80), backends_of(two_arms), forward="dsr"), web(two_arms, 6)]
    inside = service("inside", "[2001:db8::20]:80", backends_of(two_arms, 6))
    with (
        balancing(two_arms, inside, interfaces=["eth1"]) as inner,
        balancing(two_arms, *outside, interfaces=["eth0"]) as outer,
    ):
        ambiguous = outer.cli("status", check=False)
        assert ambiguous.returncode == 2 and "--interface" in ambiguous.stderr
        assert "outside" in outer.cli("status", "--interface", "eth0").stdout
        assert "inside" in inner.cli("status", "--interface", "eth1").stdout
        with traffic(two_arms.client, URL) as load:
            inner.process.send_signal(signal.SIGTERM)
            inner.process.wait()
            continues(load)
            assert set(outer.attached()) == {"eth0"} and outer.answers()
        forwarding = two_arms.gateway.shell("cat /proc/sys/net/ipv6/conf/all/forwarding")
        assert forwarding == "1\n", "the outer one needs it, too"
    assert traces(two_arms) == before
    two_arms.prepare(Forward.NAT)
