"""`xdplb decap` on interfaces of all names, and of more than one."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from stage import decapsulation_command

from xdplb.lab.hosts import Host
from xdplb.lab.laboratory import Laboratory, Process, Shape

LONG = "the-interface-that-faces-the-gateway"


@pytest.fixture(scope="module")
def lab(able: None, bpf_able: None) -> Iterator[Laboratory]:
    with Laboratory(Shape.ONE_ARMED, backends=1) as made:
        yield made


@pytest.fixture
def host(lab: Laboratory) -> Iterator[Host]:
    """A backend, with eth0 as it was before and no pin at the end."""
    chosen = lab.backends[0]
    chosen.shell(f"ip link property add dev eth0 altname {LONG}")
    yield chosen
    chosen.shell(f"ip link set dev {LONG} name eth0; ip link property del dev eth0 altname {LONG}")
    assert "prog/xdp" not in chosen.shell("ip link show dev eth0")
    assert not list((lab.pins / chosen.name).glob("*"))
    assert not list((chosen.directory / "run").glob("*"))


def decap(lab: Laboratory, host: Host, name: str) -> Process:
    _, env = decapsulation_command(lab, host)
    return host.popen([sys.executable, "-m", "xdplb", "decap", name], env=env)


@pytest.mark.parametrize("name", ["eth0.100", 'a"b', "$x;'y", LONG])
def test_any_name_will_do(lab: Laboratory, host: Host, name: str) -> None:
    if name != LONG:
        host.run(["ip", "link", "set", "dev", "eth0", "name", name])
    running = decap(lab, host, name)
    running.wait_for_line("decapsulating", timeout_s=20)
    second = decap(lab, host, LONG)
    assert second.wait(10) == 1 and f"process {running.pid}" in second.log(), "by its other name it is the same one"
    assert running.stop() == 0


@pytest.mark.parametrize("killed", [False, True])
def test_one_that_is_renamed_is_the_same_one(lab: Laboratory, host: Host, killed: bool) -> None:
    running = decap(lab, host, "eth0")
    running.wait_for_line("decapsulating", timeout_s=20)
    host.run(["ip", "link", "set", "dev", "eth0", "name", "wan.7"])
    if killed:
        running.kill()
        running = decap(lab, host, "wan.7")
        running.wait_for_line("decapsulating", timeout_s=20)
    else:
        assert decap(lab, host, "wan.7").wait(10) == 1
    assert running.stop() == 0
