"""A full disk, a kernel that refuses, a daemon that hangs: packets flow on, nothing is half applied, all is said."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from stage import NO_CHECK, VIP, Balancer, at, backends_of, fetch_many, service, traces, web_laboratory

from xdplb.errors import XdplbError
from xdplb.lab.hosts import await_until
from xdplb.lab.laboratory import Laboratory, Shape, WebServer
from xdplb.model import Forward

lab = web_laboratory(Shape.TWO_ARMED, backends=2)


@pytest.fixture
def balancer(lab: Laboratory) -> Iterator[Balancer]:
    before, made = traces(lab), Balancer(lab)
    yield made
    made.down()
    assert traces(lab) == before


@contextlib.contextmanager
def small_disk(directory: Path) -> Iterator[Path]:
    """A file system of 128 KiB at `directory`. Yields the file to fill it with."""
    directory.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k,mode=755", "tmpfs", directory], check=True)
    try:
        yield directory / "filler"
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


@contextlib.contextmanager
def ended(balancer: Balancer) -> Iterator[None]:
    """What the disk notes is undone before the disk is gone, however the test ends."""
    try:
        yield
    finally:
        balancer.down()


def fill(filler: Path) -> None:
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def web(lab: Laboratory, *names: str, port: int = 80, **more: object) -> dict[str, object]:
    chosen = [backend for backend in backends_of(lab) if not names or backend["name"] in names]
    return service(f"web{port}", at(VIP[4], port), chosen, check=NO_CHECK, **more)


def names(balancer: Balancer) -> set[str]:
    return {service["name"] for service in balancer.ask("status")["services"]}


@pytest.mark.parametrize("by_signal", [False, True], ids=["reload", "SIGHUP"])
def test_a_reload_on_a_full_disk_changes_nothing_and_the_next_one_succeeds(
    lab: Laboratory, balancer: Balancer, by_signal: bool
) -> None:
    with small_disk(balancer.runtime.parent) as filler, ended(balancer):
        balancer.up(web(lab))
        fill(filler)
        balancer.write(web(lab), web(lab, port=8080))
        if by_signal:
            balancer.process.send_signal(signal.SIGHUP)
            await_until(lambda: "No space left on device" in balancer.process.log(), "the refusal is logged")
        else:
            with pytest.raises(XdplbError, match=r"\.json cannot be written: No space left on device"):
                balancer.ask("reload")
        assert names(balancer) == {"web80"} and balancer.cli("diff", str(balancer.file), check=False).returncode == 10
        fetch_many(lab.client, VIP[4], 80, 20)
        filler.unlink()
        balancer.ask("reload")
        assert names(balancer) == {"web80", "web8080"}
    assert "Traceback" not in balancer.process.log()


def test_what_cannot_be_remembered_is_refused_and_stays_refused(lab: Laboratory, balancer: Balancer) -> None:
    with small_disk(balancer.state) as filler:
        balancer.up(web(lab))
        fill(filler)
        refused = balancer.cli("backend", "drain", "web80/backend1", check=False)
        assert refused.returncode == 1 and "No space left on device" in refused.stderr
        filler.unlink()
        balancer.reload(web(lab, port=80, slow_start="1s"))
        assert balancer.backend("web80", "backend1")["admin"] == "active"


def test_an_address_that_the_kernel_refuses_leaves_the_old_configuration_wholly_in_force(
    two_armed: Callable[..., Laboratory], bpf_able: None
) -> None:
    """The new one would need another program too: what is loaded for it must not take the place of the running one.

    In a laboratory of its own: the kernel forgets the addresses of an interface without IPv6.
    """
    lab = two_armed(backends=2)
    lab.prepare(Forward.NAT)
    for host in lab.backends:
        WebServer(host).start()
    balancer = Balancer(lab)
    balancer.up(web(lab))
    lab.gateway.run(["sysctl", "-qw", "net.ipv6.conf.eth0.disable_ipv6=1"])
    six = service("six", at(VIP[6], 80), backends_of(lab, 6), check=NO_CHECK)
    with pytest.raises(XdplbError, match="cannot add the address"):
        balancer.reload(web(lab), six, web(lab, port=8080, scheduler="rr"))
    assert names(balancer) == {"web80"}
    assert balancer.cli("diff", str(balancer.file), check=False).returncode == 10
    aborted = balancer.stats()["verdicts"]["aborted"]
    fetch_many(lab.client, VIP[4], 80, 50)
    assert balancer.stats()["verdicts"]["aborted"] == aborted
    balancer.reload(web(lab), web(lab, port=8080, scheduler="rr"))
    assert names(balancer) == {"web80", "web8080"}
    fetch_many(lab.client, VIP[4], 80, 20)
    balancer.down()


@pytest.mark.alone
def test_status_answers_from_the_first_moment_and_down_ends_a_start(lab: Laboratory, balancer: Balancer) -> None:
    slow = {"type": "tcp", "interval": "1s", "timeout": "900ms", "port": 9}
    balancer.write(service("web80", at(VIP[4], 80), [{"name": "x", "address": "10.255.255.1"}], check=slow))
    balancer.begin()
    await_until(lambda: (balancer.runtime / "control.sock").exists(), "there is a socket")
    answer = balancer.ask("status")
    assert (answer["starting"], answer["services"]) == (True, [])
    checked = balancer.cli("status", "--check", check=False)
    assert (checked.returncode, checked.stdout) == (1, "xdplb is still starting\n")
    with pytest.raises(XdplbError, match="still starting"):
        balancer.ask("reload")
    begun = time.monotonic()
    balancer.down()
    assert time.monotonic() - begun < 8
    assert balancer.process.wait(10) == 0


@pytest.mark.alone
def test_a_daemon_that_hangs_is_ended_by_down(lab: Laboratory, balancer: Balancer) -> None:
    balancer.up(web(lab))
    balancer.process.send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    said = balancer.down()
    assert time.monotonic() - begun < 10
    assert "did not end within 4 s" in said and "detached from eth0" in said


def test_all_is_well_with_exit_code_0_and_a_service_that_cannot_serve_with_1(
    lab: Laboratory, balancer: Balancer
) -> None:
    balancer.up(web(lab))
    well = balancer.cli("status", "--check")
    assert (well.returncode, well.stdout) == (0, "ok\n")
    for name in ("backend1", "backend2"):
        balancer.cli("backend", "maint", f"web80/{name}")
    ill = balancer.cli("status", "--check", check=False)
    assert (ill.returncode, ill.stdout) == (1, "service web80: no backend takes new flows\n")
    status = json.loads(balancer.cli("status", "-o", "json").stdout)
    assert (status["alarms"], status["starting"]) == ([], False) and status["loop_lag_ms"] >= 0
    for name in ("backend1", "backend2"):
        balancer.cli("backend", "ready", f"web80/{name}")


def test_a_daemon_outlives_its_interface_and_takes_it_back(lab: Laboratory, balancer: Balancer) -> None:
    def plug() -> None:
        lab.gateway.run(["ip", "link", "add", "spare0", "type", "veth", "peer", "name", "spare1"])
        for end in ("spare0", "spare1"):
            lab.gateway.run(["ip", "link", "set", end, "up"])

    def alarms() -> set[str]:
        return {alarm["name"] for alarm in spare.ask("status")["alarms"]}

    plug()
    spare = Balancer(lab, "spare0")
    spare.up(web(lab))
    lab.gateway.run(["ip", "link", "del", "spare0"])
    await_until(lambda: "interface-gone" in alarms(), "the loss is an alarm")
    assert spare.cli("status", "--interface", "spare0", "--check", check=False).returncode == 1
    plug()
    await_until(lambda: "spare0" in spare.attached() and "interface-gone" not in alarms(), "it is taken back")
    assert "Traceback" not in spare.process.log()
    spare.down()
    lab.gateway.run(["ip", "link", "del", "spare0"])
