"""What xdplb refuses to do: it says why and what to do, with the exit code of its kind, and leaves all as it was."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from stage import (
    NO_CHECK,
    VIP,
    Balancer,
    at,
    attach_foreign_program,
    backends_of,
    decapsulation_command,
    fetch_many,
    service,
    start_decapsulation,
    traces,
    web_laboratory,
)

from xdplb.lab.laboratory import Laboratory, Shape

GENERIC, NATIVE = 2, 1


lab = web_laboratory(Shape.TWO_ARMED)


@pytest.fixture
def idle(lab: Laboratory) -> Balancer:
    """One with a configuration that works, for tests that never get it to run."""
    balancer = Balancer(lab)
    balancer.write(service("web", at(VIP[4], 80), backends_of(lab), check=NO_CHECK))
    return balancer


@pytest.fixture
def balancer(lab: Laboratory, idle: Balancer) -> Iterator[Balancer]:
    before = traces(lab)
    yield idle
    idle.down()
    assert traces(lab) == before


def test_a_foreign_program_stays_unless_it_may_be_replaced(lab: Laboratory, balancer: Balancer) -> None:
    foreign = attach_foreign_program(lab, "eth1")
    code, said = balancer.refuses_to_start()
    assert code == 6 and str(foreign) in said and "--replace" in said
    assert {name: xdp["prog"]["id"] for name, xdp in balancer.attached().items()} == {"eth1": foreign}
    balancer.up(options=["--replace"])
    assert foreign not in {xdp["prog"]["id"] for xdp in balancer.attached().values()}
    assert fetch_many(lab.client, VIP[4]) == {host.name for host in lab.backends}
    balancer.down()
    assert balancer.attached() == {}


def test_an_mtu_above_what_native_xdp_takes(lab: Laboratory, balancer: Balancer) -> None:
    """Only the second interface has it: the first, where the program was already attached, is clean again."""
    before = traces(lab)
    links = [("gateway", "eth1"), ("switch", "to-gateway")]
    for host, name in links:
        lab.hosts[host].shell(f"ip link set {name} mtu 9000")
    try:
        code, said = balancer.refuses_to_start("--mode", "native")
        assert code == 6 and "MTU" in said and "generic" in said and "Traceback" not in said
        assert balancer.attached() == {}
        balancer.up()
        balancer.process.wait_for_line("no native XDP here")
        assert {name: xdp["mode"] for name, xdp in balancer.attached().items()} == {"eth0": NATIVE, "eth1": GENERIC}
        assert fetch_many(lab.client, VIP[4]) == {host.name for host in lab.backends}
        balancer.down()
    finally:
        for host, name in links:
            lab.hosts[host].shell(f"ip link set {name} mtu 1500")
    assert traces(lab) == before


def test_a_second_daemon(lab: Laboratory, balancer: Balancer) -> None:
    balancer.up()
    first = balancer.process
    code, said = Balancer(lab).refuses_to_start()
    assert code == 1 and f"process {first.pid}" in said
    code, said = Balancer(lab).refuses_to_start("--replace")
    assert code == 1 and first.running
    inner = Balancer(lab, "eth1")
    inner.write(service("web", at("203.0.113.66", 80), backends_of(lab), check=NO_CHECK))
    code, said = inner.refuses_to_start()
    assert code == 6 and "eth1 runs an XDP program" in said
    assert fetch_many(lab.client, VIP[4]) == {host.name for host in lab.backends}


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["eht0"], 6, "did you mean 'eth0'"),
        (["eth0", "eth7"], 6, "no interface is named 'eth7'"),
        (["eth0", "eth0"], 2, "named twice"),
        (["eth0", "--mode", "fast"], 2, "fast"),
        (["eth0", "--listen", "203.0.113.1:80"], 2, "-c"),
    ],
)
def test_arguments_that_make_no_sense(idle: Balancer, arguments: list[str], code: int, words: str) -> None:
    result = idle.cli("up", *arguments, "-c", str(idle.file), check=False)
    assert result.returncode == code and words in result.stderr


def test_a_configuration_with_mistakes(idle: Balancer) -> None:
    broken = service("web", "203.0.113.10:80/sctp", [{"name": "a", "address": "10.0.0.300", "wieght": 1}])
    idle.write(broken, interfaces=["eth0"])
    for command in (["up"], ["up", "eth0", "-d"], ["check"]):
        option = [str(idle.file)] if command == ["check"] else ["-c", str(idle.file)]
        result = idle.cli(*command, *option, check=False)
        assert result.returncode == 3
        assert all(word in result.stderr for word in ("10.0.0.300", "wieght", "weight", "sctp"))
        assert all(line.startswith((f"{idle.file}:", "  hint:")) for line in result.stderr.splitlines())


def test_bcc_is_missing(lab: Laboratory, balancer: Balancer, tmp_path: Path) -> None:
    (tmp_path / "bcc.py").write_text("raise ImportError('hidden')")
    path = os.pathsep.join([str(tmp_path), lab.gateway.environment["PYTHONPATH"]])
    environment = {"PYTHONPATH": path, "XDPLB_CACHE_DIRECTORY": str(tmp_path / "cache")}
    process = balancer.begin(env=environment)
    assert process.wait(15) == 6
    assert "python3-bpfcc" in process.log() and "Traceback" not in process.log()
    (tmp_path / "bcc.py").write_text("")
    process = balancer.begin(env=environment)
    assert process.wait(15) == 6
    assert "not the BPF Compiler Collection" in process.log()
    balancer.up(env={"XDPLB_CACHE_DIRECTORY": str(tmp_path / "cache")})
    balancer.down()
    balancer.up(env=environment)
    balancer.process.wait_for_line("taking what was compiled before")
    assert fetch_many(lab.client, VIP[4]) == {host.name for host in lab.backends}


def test_a_service_that_is_not_there(lab: Laboratory, balancer: Balancer) -> None:
    assert balancer.cli("status", check=False).returncode == 4
    assert balancer.cli("reload", check=False).returncode == 4
    balancer.up()
    unknown = balancer.cli("status", "wbe", check=False)
    assert unknown.returncode == 2 and "web" in unknown.stderr
    assert balancer.cli("status", "--interface", "eth1", check=False).returncode == 4


def test_a_second_decapsulator_is_refused_and_a_killed_one_replaced(lab: Laboratory) -> None:
    host = lab.backends[0]
    command, env = decapsulation_command(lab, host)
    first, *others = start_decapsulation(lab)
    second = host.popen(command, env=env)
    assert second.wait(10) == 1 and f"process {first.pid}" in second.log()
    first.send_signal(9)
    first.wait()
    successor = host.popen(command, env=env)
    successor.wait_for_line("decapsulating", timeout_s=20)
    for process in (successor, *others):
        assert process.stop() == 0
    assert "prog/xdp" not in host.shell("ip link show dev eth0")
    assert not (lab.pins / host.name / "decap-eth0").exists()
