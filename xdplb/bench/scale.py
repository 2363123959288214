"""Measures a large gateway: 1000 services of 50 backends each, 50,000 addresses on one link, in a laboratory.

The backends are one namespace that answers for all of these addresses, so that each is a neighbour of its own. The
greatest lag of the daemon's event loop is what the daemon itself measures, while `status` is asked ten times a second,
backends are set to maintenance and back, and configurations are reloaded.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, cast

from rich.table import Table

from xdplb.api import client
from xdplb.errors import XdplbError
from xdplb.lab.laboratory import Laboratory, Process, Shape, WebServer
from xdplb.model import Forward

SERVICES, BACKENDS = 1000, 50
CHECK_INTERVAL_S = 30
IDLE_S, BUSY_S = 10.0, 10.0
ROUNDS = 5
_FIRST_VIP, _FIRST_BACKEND = IPv4Address("198.18.0.1"), IPv4Address("10.64.0.2")
_NEIGHBOURS = Path("/proc/sys/net/ipv4/neigh/default")
_QUEUE = Path("/proc/sys/net/core/netdev_max_backlog")
_NONE, _TCP = "{type: none}", f"{{type: tcp, interval: {CHECK_INTERVAL_S}s, timeout: 2s}}"


def configuration(check: str, services: int = SERVICES, backends: int = BACKENDS) -> str:
    """The text of such a file."""
    addresses = itertools.count(int(_FIRST_BACKEND))
    lines = [f"defaults: {{forward: nat, check: {check}}}", "services:"]
    for service in range(services):
        lines += [f"- name: s{service}", f"  listen: {_FIRST_VIP + service}:80", "  backends:"]
        lines += [f"  - {{name: b{n}, address: {IPv4Address(next(addresses))}}}" for n in range(backends)]
    return "\n".join(lines) + "\n"


@contextmanager
def laboratory() -> Iterator[Laboratory]:
    """Two-armed. The machine's neighbour table is made large enough meanwhile, and so is the queue in which a virtual
    link puts frames: that of a card holds the answers of many neighbours that are asked at once.
    """
    paths = (_NEIGHBOURS / "gc_thresh2", _NEIGHBOURS / "gc_thresh3", _QUEUE)
    sizes = {path: path.read_text() for path in paths}
    try:
        for path in reversed(sizes):
            path.write_text("200000")
        with Laboratory(Shape.TWO_ARMED, backends=1) as lab:
            lab.prepare(Forward.NAT)
            lab.gateway.shell("ip address add 10.64.0.1/14 dev eth1")
            (backends,) = lab.backends
            backends.shell("for name in all eth0; do echo 0 >/proc/sys/net/ipv4/conf/$name/arp_ignore; done")
            backends.shell("ip route add 10.64.0.1 dev eth0; ip route add local 10.64.0.0/14 dev lo table main")
            WebServer(backends).start()
            yield lab
    finally:
        for path, size in sizes.items():
            path.write_text(size)


class Gateway:
    """xdplb with that many services, as the bench starts and asks it."""

    def __init__(self, lab: Laboratory, check: str) -> None:
        self._lab = lab
        self._file = lab.gateway.directory / "scale.yaml"
        self._text = configuration(check)
        self._instance = lab.gateway.instance()
        self.lag_ms = 0.0

    def start(self) -> dict[str, float]:
        """In seconds from the start of the command."""
        self._file.write_text(self._text, encoding="utf-8")
        command = [sys.executable, "-m", "xdplb", "up", *self._lab.gateway.interfaces, "-c", str(self._file)]
        began = time.monotonic()
        self.process: Process = self._lab.gateway.popen(command, death_signal="TERM")
        found = {}
        for name, reached in (
            ("attached_s", lambda: "attached in" in self.process.log()),
            ("first_packet_s", self._answers),
            ("next_hops_s", self._knows_all),
        ):
            self.process.wait_until(reached, name, 120)
            found[name] = time.monotonic() - began
        found["next_hops_s"] -= found["attached_s"]
        return found

    def _answers(self) -> bool:
        """Whether a request through the first service is answered."""
        with self._lab.client.socket(socket.AF_INET, socket.SOCK_STREAM) as connection:
            connection.settimeout(0.1)
            with suppress(OSError):
                connection.connect((str(_FIRST_VIP), 80))
                connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
                return bool(connection.recv(1))
        return False

    def _knows_all(self) -> bool:
        with suppress(XdplbError):
            services = self.status()["services"]
            return bool(services) and all(b["reachable"] for s in services for b in s["backends"])
        return False

    def status(self, **params: Any) -> dict[str, Any]:
        answer = cast(dict[str, Any], client.call(self._instance, "status", timeout_s=30, **params))
        self.lag_ms = max(self.lag_ms, answer["loop_lag_ms"])
        return answer

    def time_status(self) -> float:
        """Of the whole command."""
        return _seconds(lambda: self._command("status", "-o", "json"))

    def time_reload(self) -> float:
        """With one backend's weight changed, as the daemon answers it."""
        self._change()
        return _seconds(lambda: client.call(self._instance, "reload", timeout_s=30))

    def _change(self) -> None:
        weight = int(time.monotonic() * 1000) % 1000 + 2
        line = f"{{name: b7, address: {_FIRST_BACKEND + 7}"
        self._file.write_text(self._text.replace(f"{line}}}", f"{line}, weight: {weight}}}"), encoding="utf-8")

    def busy(self, duration_s: float) -> float:
        """The greatest lag of the loop, in ms, while it has all sorts of things to do."""
        time.sleep(10.1)  # what it measured before is forgotten then
        self.lag_ms = 0.0
        until = time.monotonic() + duration_s
        for turn in itertools.count():
            due = time.monotonic() + 0.1
            self.status()
            service = f"s{turn * 37 % SERVICES}"
            for action in ("maint", "ready"):
                client.call(self._instance, "backend", service=service, backend=f"b{turn % BACKENDS}", action=action)
            if turn % 20 == 10:
                self._change()
                client.call(self._instance, "reload", timeout_s=30)
            if time.monotonic() > until:
                return self.lag_ms
            time.sleep(max(0.0, due - time.monotonic()))
        raise AssertionError

    def idle_cores(self) -> float:
        before = _cpu_s(self.pid)
        time.sleep(IDLE_S)
        return (_cpu_s(self.pid) - before) / IDLE_S

    @property
    def pid(self) -> int:
        """Of the daemon itself."""
        return self.process.pid

    @property
    def memory_mb(self) -> float:
        lines = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii").splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmRSS"))) / 1000

    def stop(self) -> None:
        self.process.stop(grace_s=30)

    def _command(self, *args: str) -> subprocess.CompletedProcess[str]:
        return self._lab.gateway.xdplb(*args, timeout_s=60)


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _seconds(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def measure(machine: dict[str, Any]) -> dict[str, Any]:
    """The JSON of `scripts/bench scale -o json`. Raises NotCapable where there can be no laboratory."""
    WebServer.check_able()
    with laboratory() as lab:
        cases = [_case(lab, "no checks", _NONE), _case(lab, f"a tcp check each {CHECK_INTERVAL_S} s", _TCP)]
    return {"machine": machine, "cases": cases}


def _case(lab: Laboratory, name: str, check: str) -> dict[str, Any]:
    gateway = Gateway(lab, check)
    try:
        found: dict[str, Any] = {"name": name, **gateway.start()}
        found["start_lag_ms"] = gateway.status(service="s0") and gateway.lag_ms
        found["status_s"] = statistics.median(gateway.time_status() for _ in range(ROUNDS))
        found["reload_s"] = statistics.median(gateway.time_reload() for _ in range(ROUNDS))
        found["busy_lag_ms"] = gateway.busy(BUSY_S)
        found["idle_cores"] = gateway.idle_cores()
        found["memory_mb"] = gateway.memory_mb
        return found
    except XdplbError as error:
        raise XdplbError(error.message, gateway.process.log()[-2000:]) from error
    finally:
        gateway.stop()


_ROWS = {
    "attached_s": ("from the command to the program attached, s", "{:.1f}"),
    "first_packet_s": ("to the first answer through it, s", "{:.1f}"),
    "next_hops_s": ("from attached to all next hops known, s", "{:.1f}"),
    "status_s": ("`status -o json`, s", "{:.2f}"),
    "reload_s": ("`reload` with one backend changed, s", "{:.2f}"),
    "memory_mb": ("memory of the daemon, MB", "{:.0f}"),
    "idle_cores": ("the daemon while nothing happens, cores", "{:.3f}"),
    "start_lag_ms": ("greatest lag of the event loop at the start, ms", "{:.0f}"),
    "busy_lag_ms": ("the same while everything happens, ms", "{:.0f}"),
}


def show(result: dict[str, Any]) -> Table:
    here = result["machine"]
    table = Table(title=f"{SERVICES} services of {BACKENDS} backends: {here['cpu']}, {here['cpus']} cores")
    table.add_column("what")
    for case in result["cases"]:
        table.add_column(case["name"], justify="right")
    for key, (words, form) in _ROWS.items():
        table.add_row(words, *(form.format(case[key]) for case in result["cases"]))
    return table


if __name__ == "__main__":
    json.dump(measure({}), sys.stdout, indent=2)
