"""A laboratory of network namespaces on this machine: client, gateway and backends, with real traffic between them.

It is taken down at the end of its `with` block, whatever ends that: an exception, Ctrl-C or SIGTERM at any moment,
set-up and taking down included. After a `kill -9` its guard does that (remains.py), and where that was killed as well,
the next laboratory.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from types import FrameType
from typing import ClassVar, Self

from xdplb.errors import NotCapable, NotPrivileged, XdplbError
from xdplb.lab import remains
from xdplb.lab.hosts import CommandFailed, Host, Process, await_until, uninterrupted
from xdplb.lab.network import VIP4, VIP6, VIPS, Shape, Topology
from xdplb.lab.services import BIG_BYTES, HttpLoad, HttpResult, Service, UdpEcho, WebServer
from xdplb.model import Address, Forward
from xdplb.paths import Instance

__all__ = [
    "BIG_BYTES",
    "VIP4",
    "VIP6",
    "VIPS",
    "CommandFailed",
    "Gateway",
    "Host",
    "HttpLoad",
    "HttpResult",
    "Laboratory",
    "Process",
    "Service",
    "Shape",
    "Topology",
    "UdpEcho",
    "WebServer",
    "await_until",
    "remove_stale",
]

_TOOLS = {"ip": "iproute2", "nsenter": "util-linux", "setpriv": "util-linux", "ethtool": "ethtool"}
_FATAL = (signal.SIGTERM, signal.SIGHUP)
"""Signals that end a process without any clean-up unless it handles them."""


@dataclass(frozen=True, slots=True)
class _GatewayInstance(Instance):
    """An instance under directories of its own rather than this process's."""

    runtimes: Path
    pinned: Path

    @property
    def runtime(self) -> Path:
        return self.runtimes / self.name

    @property
    def pins(self) -> Path:
        return self.pinned / self.name


class Gateway(Host):
    """The host that runs xdplb, with a runtime, a state and a pin directory of its own."""

    @property
    def interfaces(self) -> tuple[str, ...]:
        """eth0, and eth1 towards the backends if it is two-armed."""
        return tuple(self.ports)

    def instance(self, interface: str = "eth0") -> Instance:
        """The xdplb on that interface, for this process to talk to: its places are files, which namespaces share."""
        return _GatewayInstance(
            interface,
            Path(self.environment["XDPLB_RUNTIME_DIRECTORY"]),
            Path(self.environment["XDPLB_PIN_DIRECTORY"]),
        )

    def xdplb(self, *args: str, check: bool = True, timeout_s: float = 30.0) -> subprocess.CompletedProcess[str]:
        """Runs an xdplb command to its end."""
        return self.run([sys.executable, "-m", "xdplb", *args], check=check, timeout_s=timeout_s)

    def start_xdplb(self, *args: str, ready: str | Callable[[Process], bool] = "", timeout_s: float = 30.0) -> Process:
        """Starts an xdplb command and returns once `ready`: its output has that text, or that condition holds."""
        process = self.popen([sys.executable, "-m", "xdplb", *args], death_signal="TERM")
        if isinstance(ready, str):
            process.wait_for_line(ready, timeout_s)
        else:
            process.wait_until(lambda: ready(process), "it is ready", timeout_s)
        return process


class Laboratory:
    """A context manager; several may exist side by side. The first to open turns SIGTERM and SIGHUP into SystemExit.

    Plain routing works as soon as it is open: the gateway forwards, every default route leads to it. `prepare()` makes
    the backends fit for a forward mode.
    """

    _open: ClassVar[set[Laboratory]] = set()

    def __init__(
        self,
        shape: Shape = Shape.ONE_ARMED,
        *,
        backends: int = 3,
        routed_client: bool = False,
        backend_mtu: int = 1500,
        vips: Sequence[Address | str] = VIPS,
    ) -> None:
        self.topology = Topology(shape, backends, routed_client, backend_mtu)
        self.vips = tuple(ip_address(vip) for vip in vips)
        self._owner = os.getpid()
        self.prefix = remains.new_prefix()
        self.directory = remains.DIRECTORIES / self.prefix
        self.pins = remains.PINS / self.prefix
        self.hosts = {name: self._host(name) for name in self.topology.hosts}
        self.client = self.hosts["client"]
        self.gateway = self._gateway()
        self.hosts["gateway"] = self.gateway
        self.router = self.hosts.get("router")
        self.backends = tuple(self.hosts[name] for name in self.topology.backend_names)

    def _host(self, name: str, kind: type[Host] = Host) -> Host:
        return kind(
            name, remains.NAMESPACES / f"{self.prefix}-{name}", self.directory / name, self.topology.ports(name)
        )

    def _gateway(self) -> Gateway:
        gateway = self._host("gateway", Gateway)
        assert isinstance(gateway, Gateway)
        package = Path(__file__).resolve().parents[2]
        gateway.environment = {
            "XDPLB_RUNTIME_DIRECTORY": str(gateway.directory / "run"),
            "XDPLB_STATE_DIRECTORY": str(gateway.directory / "state"),
            "XDPLB_PIN_DIRECTORY": str(self.pins),
            "XDPLB_CACHE_DIRECTORY": os.environ.get("XDPLB_CACHE_DIRECTORY", str(gateway.directory / "cache")),
            "PYTHONPATH": os.pathsep.join(filter(None, (str(package), os.environ.get("PYTHONPATH", "")))),
        }
        return gateway

    def __enter__(self) -> Self:
        check_able()
        try:
            self._register()
            remove_stale()
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _register(self) -> None:
        """From here on an interruption leads to `close()`: by the `with` block, or else when the interpreter exits."""
        self._open.add(self)
        atexit.register(self.close)
        with uninterrupted():
            remains.claim(self.prefix)
        if threading.current_thread() is threading.main_thread():
            for number in _FATAL:
                if signal.getsignal(number) is signal.SIG_DFL:
                    signal.signal(number, _exit)

    def _build(self) -> None:
        """Signals take effect between its steps only: what a step began to make, it has made."""
        with uninterrupted():
            for host in self.hosts.values():
                host.directory.mkdir(parents=True)
            _mount_bpffs()
        with uninterrupted():
            _ip_batch([f"netns add {host.namespace.name}" for host in self.hosts.values()])
        for step in self.topology.steps(self.prefix):
            with uninterrupted():
                self.hosts[step.host].shell(step.script)
        for neighbour in (self.router or self.client, *self.backends):
            self.gateway.ping(neighbour.address4)
            self.gateway.ping(neighbour.address6)

    def prepare(self, forward: Forward, vips: Sequence[Address | str] | None = None) -> None:
        """Makes the backends fit for a forward mode, after another too: routes for NAT, else the VIPs on their lo."""
        chosen = self.vips if vips is None else tuple(ip_address(vip) for vip in vips)
        for step in self.topology.forward_steps(forward, chosen):
            self.hosts[step.host].shell(step.script)

    def close(self) -> None:
        """Takes everything down; harmless when there is nothing (left). Signals wait until it is done."""
        if os.getpid() != self._owner or self not in self._open:
            return
        try:
            with uninterrupted():
                try:
                    self._stop_processes()
                finally:
                    _dismantle(self.prefix)
                    remains.guard.remove(self.prefix)
                    self._open.discard(self)
                    atexit.unregister(self.close)
        finally:
            if not self._open and threading.current_thread() is threading.main_thread():
                for number in _FATAL:
                    if signal.getsignal(number) is _exit:
                        signal.signal(number, signal.SIG_DFL)

    def remains(self) -> list[str]:
        """What there is of it on this machine, processes by name; nothing once it is closed."""
        running = [process.name for host in self.hosts.values() for process in host.processes if process.running]
        return [*map(str, remains.left(self.prefix)), *running]

    def _stop_processes(self) -> None:
        """All are asked at once, then awaited, the latest first."""
        processes = [process for host in self.hosts.values() for process in host.processes]
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
        for process in reversed(processes):
            process.stop(grace_s=2.0)


def check_able() -> None:
    """NotPrivileged or NotCapable where a laboratory cannot be."""
    if os.geteuid() != 0:
        raise NotPrivileged("a laboratory of network namespaces needs root", "run it with sudo")
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        packages = " ".join(sorted({_TOOLS[tool] for tool in missing}))
        raise NotCapable(f"not installed: {', '.join(missing)}", f"apt-get install {packages}")
    probe = _run(["unshare", "--net", "true"])
    if probe.returncode != 0:
        raise NotCapable(f"cannot make network namespaces: {probe.stderr.strip()}", "in a container: run it privileged")


def remove_stale() -> list[str]:
    """Removes what laboratories of dead processes left behind. Returns their prefixes."""
    stale = remains.stale()
    for prefix in stale:
        with uninterrupted():
            _dismantle(prefix)
    return stale


def _dismantle(prefix: str) -> None:
    remains.dismantle(prefix)
    if left := remains.left(prefix):
        raise XdplbError(f"laboratory {prefix}: {left[0]} could not be removed")


def _mount_bpffs() -> None:
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    if not any(line.split()[1:3] == [str(remains.PINS), "bpf"] for line in mounts):
        mounted = _run(["mount", "-t", "bpf", "bpf", str(remains.PINS)])
        if mounted.returncode != 0:
            raise NotCapable(f"cannot mount a BPF file system on {remains.PINS}: {mounted.stderr.strip()}")


def _ip_batch(lines: Sequence[str]) -> None:
    result = _run(["ip", "-batch", "-"], "".join(f"{line}\n" for line in lines))
    if result.returncode != 0:
        raise NotCapable(f"ip: {result.stderr.strip()}", "in a container: run it privileged")


def _run(args: Sequence[str], input: str = "") -> subprocess.CompletedProcess[str]:
    """In this process's own namespace, out of reach of a terminal's Ctrl-C."""
    return subprocess.run(args, input=input, capture_output=True, text=True, start_new_session=True, check=False)


def _exit(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
