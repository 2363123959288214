"""What the stories are told with: a gateway whose xdplb can be started, asked, killed, and clients with few words."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import yaml

from xdplb.errors import XdplbError
from xdplb.lab.hosts import Host
from xdplb.lab.laboratory import (
    VIP4,
    VIP6,
    HttpLoad,
    HttpResult,
    Laboratory,
    Process,
    Shape,
    WebServer,
    await_until,
)
from xdplb.model import Address, Forward
from xdplb.paths import replace_file

FAST_CHECK = {"type": "http", "path": "/healthz", "interval": "300ms", "fast_interval": "100ms", "timeout": "500ms"}
NO_CHECK = {"type": "none"}
VIP = {4: VIP4, 6: VIP6}
FOREIGN_PROGRAM = "int foreign(struct xdp_md *ctx) { return XDP_PASS; }"
HASH_KEY = "the-one-of-all-laboratories"
ATTEMPTS = 64
"""Enough flows to hit each of three backends of the same weight: the chance to miss one is 2 in 100 billion."""

SERVICE_DEFAULTS: dict[str, Any] = {"forward": "nat", "check": FAST_CHECK}


def at(address: Address | str, ports: int | str) -> str:
    """ADDRESS:PORT as configurations and URLs have it."""
    address = ip_address(address)
    return f"[{address}]:{ports}" if address.version == 6 else f"{address}:{ports}"


def backends_of(lab: Laboratory, version: int = 4) -> list[dict[str, Any]]:
    return [{"name": host.name, "address": str(host.address(version))} for host in lab.backends]


def service(name: str, listen: str, backends: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {**SERVICE_DEFAULTS, "name": name, "listen": listen, "backends": list(backends), **more}


def web_laboratory(shape: Shape, **options: Any) -> Any:
    """The fixture `lab` of a module: a web server on each backend, and what nat needs."""

    @pytest.fixture(scope="module", name="lab")
    def make(able: None, bpf_able: None) -> Iterator[Laboratory]:
        with Laboratory(shape, **options) as lab:
            lab.prepare(Forward.NAT)
            for host in lab.backends:
                WebServer(host).start()
            yield lab

    return make


class Balancer:
    """xdplb on a laboratory's gateway. What the command line is not the point of goes over the control socket."""

    def __init__(self, lab: Laboratory, *interfaces: str) -> None:
        self.lab = lab
        self.interfaces = interfaces or lab.gateway.interfaces
        self.file = lab.gateway.directory / f"{self.interfaces[0]}.yaml"
        self.runtime = Path(lab.gateway.environment["XDPLB_RUNTIME_DIRECTORY"]) / self.interfaces[0]
        self.state = Path(lab.gateway.environment["XDPLB_STATE_DIRECTORY"])
        self.pins = lab.pins / self.interfaces[0]
        self._keep_hash_key()
        self.process: Process
        self.wrapper: Sequence[str] = ()
        """A command that runs xdplb in surroundings of its own."""

    def _keep_hash_key(self) -> None:
        """One that all laboratories have: with a key of its own, each would compile a program of its own."""
        path = self.state / "hash_key"
        if not path.exists():
            replace_file(path, HASH_KEY, mode=0o600)

    def write(self, *services: dict[str, Any], **more: Any) -> None:
        self.file.write_text(yaml.safe_dump({"services": list(services), **more}))

    def begin(self, *options: str, env: dict[str, str] | None = None) -> Process:
        """Starts it in the foreground and does not wait."""
        command = [*self.wrapper, sys.executable, "-m", "xdplb", "up", *self.interfaces, "-c", str(self.file), *options]
        self.process = self.lab.gateway.popen(command, death_signal="TERM", env=env)
        return self.process

    def up(self, *services: dict[str, Any], options: Sequence[str] = (), env: dict[str, str] | None = None) -> None:
        """Returns once it answers."""
        if services:
            self.write(*services)
        process = self.begin(*options, env=env)
        await_until(lambda: self.answers() or not process.running, "xdplb answers", timeout_s=30)
        assert process.running, process.log()

    def refuses_to_start(self, *options: str) -> tuple[int, str]:
        """Exit code and last words of a start that must fail."""
        process = self.begin(*options)
        return process.wait(20), process.log()

    def answers(self) -> bool:
        with suppress(OSError, ValueError):
            return bool(self.ask("status")["services"])
        return False

    def ask(self, command: str, **params: Any) -> Any:
        """One request over the control socket; XdplbError where it is refused."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(20)
            connection.connect(str(self.runtime / "control.sock"))
            connection.sendall(json.dumps({"command": command, **params}).encode() + b"\n")
            with connection.makefile() as answers:
                answer = json.loads(answers.readline())
        if not answer["ok"]:
            raise XdplbError(answer["error"]["message"])
        return answer["result"]

    def cli(self, *args: str, check: bool = True) -> CompletedProcess[str]:
        return self.lab.gateway.run([*self.wrapper, sys.executable, "-m", "xdplb", *args], check=check)

    def reload(self, *services: dict[str, Any]) -> Any:
        self.write(*services)
        return self.ask("reload")

    def kill(self) -> None:
        """kill -9"""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def down(self) -> str:
        return self.cli("down", self.interfaces[0]).stdout

    def stats(self) -> Any:
        return json.loads(self.cli("stats", "--interface", self.interfaces[0], "-o", "json").stdout)

    def service_stats(self, name: str) -> Any:
        return next(entry for entry in self.stats()["services"] if entry["name"] == name)

    def backend(self, service: str, backend: str) -> Any:
        entries = self.ask("status", service=service)["services"][0]["backends"]
        return next(entry for entry in entries if entry["name"] == backend)

    def states(self, service: str) -> dict[str, str]:
        return {b["name"]: b["state"] for b in self.ask("status", service=service)["services"][0]["backends"]}

    def await_state(self, service: str, backend: str, state: str, timeout_s: float = 10.0) -> None:
        await_until(lambda: self.states(service)[backend] == state, f"{backend} is {state}", timeout_s)

    def await_all(self, service: str, state: str) -> None:
        await_until(lambda: set(self.states(service).values()) == {state}, f"all of {service} are {state}")

    def attached(self) -> dict[str, Any]:
        """The XDP program on each interface of the gateway, as `ip` shows it; absent where there is none."""
        links = json.loads(self.lab.gateway.run(["ip", "-j", "link"]).stdout)
        return {link["ifname"]: link["xdp"] for link in links if "xdp" in link}


@contextmanager
def balancing(
    lab: Laboratory, *services: dict[str, Any], options: Sequence[str] = (), interfaces: Sequence[str] = ()
) -> Iterator[Balancer]:
    """xdplb on all interfaces of the gateway, or on those given, taken down at the end."""
    balancer = Balancer(lab, *interfaces)
    balancer.up(*services, options=options)
    try:
        yield balancer
    finally:
        if not balancer.process.running or balancer.process.stop(signal.SIGINT, grace_s=10) != 0:
            balancer.down()


def attach_foreign_program(lab: Laboratory, interface: str) -> int:
    """Puts somebody else's XDP program on the gateway's interface, in place of any other. Its id."""
    script = "from pathlib import Path\nfrom xdplb.dataplane import syscall\n"
    script += "from xdplb.dataplane.loader import load_programs\n"
    script += f"programs = load_programs({FOREIGN_PROGRAM!r}, [], ['foreign']).programs\n"
    script += f"syscall.pin(programs['foreign'], Path({str(lab.pins / 'foreign')!r}))"
    lab.pins.mkdir(exist_ok=True)
    lab.gateway.run([sys.executable, "-c", script])
    lab.gateway.shell(f"ip link set dev {interface} xdp off")
    lab.gateway.shell(f"ip link set dev {interface} xdp pinned {lab.pins / 'foreign'}")
    (lab.pins / "foreign").unlink()
    links = json.loads(lab.gateway.run(["ip", "-j", "link", "show", interface]).stdout)
    return int(links[0]["xdp"]["prog"]["id"])


def decapsulation_command(lab: Laboratory, host: Host, *options: str) -> tuple[list[str], dict[str, str]]:
    """With directories of its own, as a host has them, and its environment."""
    env = {
        "PYTHONPATH": lab.gateway.environment["PYTHONPATH"],
        "XDPLB_PIN_DIRECTORY": str(lab.pins / host.name),
        "XDPLB_RUNTIME_DIRECTORY": str(host.directory / "run"),
    }
    return [sys.executable, "-m", "xdplb", "decap", "eth0", *options], env


def start_decapsulation(lab: Laboratory, *options: str) -> list[Process]:
    """`xdplb decap eth0` on each backend."""
    processes = []
    for host in lab.backends:
        command, env = decapsulation_command(lab, host, *options)
        processes.append(host.popen(command, env=env))
    for process in processes:
        process.wait_for_line("decapsulating", timeout_s=30)
    return processes


def family_of(address: Address | str) -> int:
    return socket.AF_INET if ip_address(address).version == 4 else socket.AF_INET6


def fetch(host: Host, address: Address | str, port: int, path: str = "/", timeout_s: float = 2.0) -> str:
    """One HTTP request on a connection of its own: the body. OSError where there is no whole answer."""
    with host.socket(family_of(address), socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        connection.connect((str(address), port))
        connection.sendall(f"GET {path} HTTP/1.0\r\nHost: xdplb\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise ConnectionError(f"{address}:{port} answered {head[:40]!r}")
    return body.decode().strip()


def fetch_many(host: Host, address: Address | str, port: int = 80, count: int = ATTEMPTS) -> set[str]:
    """Who answered; every request must be answered."""
    return {fetch(host, address, port) for _ in range(count)}


def ask_udp(host: Host, address: Address | str, port: int, payload: bytes = b"ping", timeout_s: float = 2.0) -> bytes:
    """A datagram's answer. TimeoutError, or ConnectionRefusedError where an ICMP error says so."""
    with host.socket(family_of(address), socket.SOCK_DGRAM) as question:
        question.settimeout(timeout_s)
        question.connect((str(address), port))
        question.send(payload)
        return question.recv(65536)


def ask_udp_many(host: Host, address: Address | str, port: int, count: int = ATTEMPTS) -> set[str]:
    """Who answered; every question must be answered."""
    answers = set()
    for number in range(count):
        name, _, echoed = ask_udp(host, address, port, b"question %d" % number).partition(b":")
        assert echoed == b"question %d" % number
        answers.add(name.decode())
    return answers


def errors(results: Iterable[HttpResult]) -> list[str]:
    return [result.error for result in results if result.error]


@contextmanager
def traffic(host: Host, url: str, rate: float = 200.0, timeout_s: float = 2.0) -> Iterator[HttpLoad]:
    """New connections at a steady rate, none of which may fail: asserted at the end."""
    load = HttpLoad(host, url, rate=rate, timeout_s=timeout_s)
    with load:
        yield load
        continues(load)
    rest = load.drain()
    assert errors(rest) == []


def continues(load: HttpLoad, requests: int = 40) -> None:
    """All requests up to now, and so many from now on, are answered."""
    done = load.drain()
    done += load.collect_until(lambda results: len(results) >= requests, f"{requests} requests are done", 20)
    assert errors(done) == []


def serves(load: HttpLoad, requests: int = 40) -> None:
    """All requests from now on are answered, whatever became of those under way: slots that moved may break these."""
    now = time.monotonic()
    done = load.collect_until(lambda results: sum(r.started_s > now for r in results) >= requests, "they are done", 20)
    assert errors(result for result in done if result.started_s > now) == []


@contextmanager
def kept_connection(host: Host, address: Address | str, port: int = 80) -> Iterator[KeptConnection]:
    """A connection that is opened before something happens, and used again after it."""
    with host.socket(family_of(address), socket.SOCK_STREAM) as connection:
        connection.settimeout(3)
        connection.connect((str(address), port))
        yield KeptConnection(connection)


class KeptConnection:
    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    @property
    def source(self) -> str:
        """The client's end, as ADDRESS:PORT."""
        address, port = self._connection.getsockname()[:2]
        return at(address, port)

    def ask(self) -> str:
        """Who answers at its other end."""
        self._connection.sendall(b"GET / HTTP/1.1\r\nHost: xdplb\r\n\r\n")
        answer = self._connection.recv(65536)
        if not answer:
            raise ConnectionResetError("closed")
        return answer.partition(b"\r\n\r\n")[2].decode().strip()


def traces(lab: Laboratory) -> dict[str, str]:
    """Everything on the gateway that xdplb may change."""
    shell = lab.gateway.shell
    return {
        "addresses": shell("ip -o address | sed 's/ valid_lft.*//'"),
        "links and their programs": shell("ip -d -o link | sed 's/ state [A-Z]*//'"),
        "sysctls": shell(
            "grep -rs . /proc/sys/net/ipv4/conf /proc/sys/net/ipv6/conf /proc/sys/net/ipv4/ip_forward | sort"
        ),
        "pins": shell(f"find {lab.pins} 2>/dev/null || true"),
        "runtime": shell(f"find {lab.gateway.environment['XDPLB_RUNTIME_DIRECTORY']} 2>/dev/null || true"),
        "offloads": "".join(shell(f"ethtool -k {name}") for name in lab.gateway.interfaces),
        "routes": shell("{ ip route show table all; ip -6 route show table all; } | sort"),
        "neighbours": shell("ip neigh | grep -c -e managed -e 'proto xdplb' || true"),
    }


def alive(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False
