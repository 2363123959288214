"""Hosts of a laboratory: commands, processes and sockets in a network namespace. None outlives its laboratory.

Commands enter a namespace by `nsenter --net` (`ip netns exec` would mount another /sys, and pinned maps would be gone).
So /sys/class/net still shows the machine's own interfaces in there; only netlink and /proc/net tell of the namespace's.

Every process leads a process group of its own, out of reach of a terminal's Ctrl-C, and gets a death signal: the kernel
ends it when the *thread* that started it dies, be it by kill -9. Start processes from a thread that lasts.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shlex
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from types import FrameType
from typing import IO

from xdplb.errors import XdplbError
from xdplb.lab.network import Port
from xdplb.model import Address

INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_CLONE_NEWNET = 0x40000000
_POLL_S = 0.005
_NOT_YET = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ECONNREFUSED, errno.ENOBUFS)
"""Errors that may pass. ENOBUFS: the neighbour table, one for all namespaces of a machine (gc_thresh3), is full."""
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds back SIGINT, SIGTERM and SIGHUP: what happens inside happens wholly, the signal takes effect afterwards.

    A child that was just forked is not out of a terminal's reach yet and may die of its Ctrl-C; then the signal is what
    the caller sees, with the child's failure as its context.

    Outside the main thread this does nothing, for Python handles signals in the main thread only. SIGINT, which may
    raise anywhere, is the first to be held and the last to be let go, so that no handler is left behind.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []

    def hold(number: int, _frame: FrameType | None) -> None:
        held.append(number)

    handlers = {number: signal.getsignal(number) for number in INTERRUPTIONS}
    try:
        try:
            for number in INTERRUPTIONS:
                if handlers[number] is not None:
                    signal.signal(number, hold)
            yield
        finally:
            for number in reversed(INTERRUPTIONS):
                if handlers[number] is not None:
                    signal.signal(number, handlers[number])
    finally:
        _let_go(held)


def _let_go(held: Sequence[int]) -> None:
    for number in dict.fromkeys(held):
        handler = signal.getsignal(number)
        if callable(handler):
            handler(number, None)
        elif handler == signal.SIG_DFL:
            os.kill(os.getpid(), number)


def await_until(condition: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    """Returns once `condition()` holds, which is asked every few milliseconds; XdplbError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise XdplbError(f"waited {timeout_s:g} s in vain until {what}")
        time.sleep(_POLL_S)


class CommandFailed(XdplbError):
    """A command ended with another exit code than 0, or was too slow. `result` holds its output, if it ended."""

    def __init__(self, message: str, result: subprocess.CompletedProcess[str] | None = None) -> None:
        super().__init__(message)
        self.result = result


class Process:
    """A running command of a host; its output goes to a file. Ends with its laboratory at the latest."""

    def __init__(self, popen: subprocess.Popen[str], name: str, log_file: Path) -> None:
        self._popen = popen
        self.name = name
        self.log_file = log_file
        self._group_ended = False

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    @property
    def stdout(self) -> IO[str]:
        if self._popen.stdout is None:
            raise ValueError(f"the output of {self.name} goes to {self.log_file}")
        return self._popen.stdout

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def wait(self, timeout_s: float = 10.0) -> int:
        """The exit code, negative for a signal as in subprocess; XdplbError if it still runs after `timeout_s`."""
        try:
            return self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise XdplbError(f"{self.name} still runs after {timeout_s:g} s", self._last_words()) from None

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
        """As `await_until`, but gives up, with its last words, once the process has ended."""
        ended = False

        def settled() -> bool:
            nonlocal ended
            ended = not self.running
            return condition() or ended

        try:
            await_until(settled, what, timeout_s)
        except XdplbError as error:
            raise XdplbError(f"{self.name}: {error.message}", self._last_words()) from None
        if ended:
            raise XdplbError(f"{self.name} ended with {self._popen.returncode} before {what}", self._last_words())

    def wait_for_line(self, text: str, timeout_s: float = 10.0) -> None:
        """Waits until the log contains `text`."""
        self.wait_until(lambda: text in self.log(), f"its log says {text!r}", timeout_s)

    def send_signal(self, number: int) -> None:
        """Sends a signal to the process itself, not to its group; nothing happens if it has ended."""
        self._popen.send_signal(number)

    def stop(self, number: int = signal.SIGTERM, grace_s: float = 5.0) -> int:
        """Asks it to end; kills it after `grace_s`, and in any case the rest of its group. Returns the exit code."""
        self.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(grace_s)
        return self.kill()

    def kill(self) -> int:
        """Kills the whole process group at once and returns, when none of it is left, the exit code."""
        if not self._group_ended:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._popen.wait()
            await_until(self._group_is_empty, f"the children of {self.name} ended")
            self._group_ended = True
        return self._popen.wait()

    def _group_is_empty(self) -> bool:
        """Zombies do not count: nobody may reap them where process 1 is no init."""
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return True
        return not any(group == self.pid and state not in "ZX" for state, group in _states_and_groups())

    def _last_words(self) -> str:
        return "\n".join(self.log().splitlines()[-20:])


class Host:
    """A network namespace with a name, addresses and what runs in it. `directory` goes with the laboratory."""

    def __init__(self, name: str, namespace: Path, directory: Path, ports: Sequence[Port]) -> None:
        self.name = name
        self.namespace = namespace
        self.directory = directory
        self.ports = {port.interface: port for port in ports}
        self.environment: dict[str, str] = {}
        self.processes: list[Process] = []

    def __repr__(self) -> str:
        return f"Host({self.namespace.name})"

    @property
    def address4(self) -> IPv4Address:
        """The IPv4 address of eth0."""
        return self.ports["eth0"].address4

    @property
    def address6(self) -> IPv6Address:
        """The IPv6 address of eth0."""
        return self.ports["eth0"].address6

    def address(self, version: int, interface: str = "eth0") -> Address:
        port = self.ports[interface]
        return port.address4 if version == 4 else port.address6

    def run(
        self,
        args: Sequence[str],
        *,
        check: bool = True,
        timeout_s: float = 30.0,
        input: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end and captures its outputs. CommandFailed if it is too slow, or `check` and not 0."""
        with uninterrupted():
            stdin = subprocess.DEVNULL if input is None else subprocess.PIPE
            popen = self._spawn(args, stdin, subprocess.PIPE, subprocess.PIPE, env, "KILL")
        command = f"{self.name}: {shlex.join(args)}"
        try:
            stdout, stderr = popen.communicate(input, timeout_s)
        except subprocess.TimeoutExpired:
            raise CommandFailed(f"{command}: not done after {timeout_s:g} s") from None
        finally:
            if popen.poll() is None:
                os.killpg(popen.pid, signal.SIGKILL)
                popen.communicate()
        result = subprocess.CompletedProcess(list(args), popen.returncode, stdout, stderr)
        if check and popen.returncode != 0:
            raise CommandFailed(f"{command}: exit code {popen.returncode}\n{stdout}{stderr}".rstrip(), result)
        return result

    def shell(self, script: str) -> str:
        """Runs a script by `sh`, up to the first command that fails. Returns its output."""
        return self.run(["sh", "-euc", script]).stdout

    def popen(
        self,
        args: Sequence[str],
        *,
        capture: bool = False,
        env: Mapping[str, str] | None = None,
        death_signal: str = "KILL",
    ) -> Process:
        """Starts a command that the laboratory owns. The caller of `capture` reads, and closes, its `stdout`."""
        name = Path(args[0]).name
        with uninterrupted():
            log_file = self.directory / f"{len(self.processes)}-{name}.log"
            with log_file.open("w") as log:
                stdout = subprocess.PIPE if capture else log
                popen = self._spawn(args, subprocess.DEVNULL, stdout, log, env, death_signal)
            process = Process(popen, f"{name} on {self.name}", log_file)
            self.processes.append(process)
        return process

    def _spawn(
        self,
        args: Sequence[str],
        stdin: int,
        stdout: int | IO[str],
        stderr: int | IO[str],
        env: Mapping[str, str] | None,
        death_signal: str,
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["nsenter", f"--net={self.namespace}", "--", "setpriv", "--pdeathsig", death_signal, "--", *args],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env={**os.environ, **self.environment, **(env or {})},
            text=True,
            errors="replace",
            start_new_session=True,
        )

    def socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """A socket that lives in this host's namespace while the caller stays in its own. The caller closes it."""
        with uninterrupted():
            home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            there = os.open(self.namespace, os.O_RDONLY | os.O_CLOEXEC)
            try:
                _set_network_namespace(there)
                return socket.socket(family, kind, protocol)
            finally:
                _set_network_namespace(home)
                os.close(there)
                os.close(home)

    def accepts(self, address: Address | str, port: int) -> bool:
        """Whether a TCP connection from here to there succeeds within a second."""
        address = ip_address(address)
        with self.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_STREAM) as connection:
            connection.settimeout(1.0)
            return connection.connect_ex((str(address), port)) == 0

    def ping(self, address: Address | str, timeout_s: float = 2.0) -> float:
        """The round-trip time in seconds of the first ICMP echo request, of one every 50 ms, that is answered."""
        address = ip_address(address)
        family, protocol, kind = (
            (socket.AF_INET, socket.IPPROTO_ICMP, 8)
            if address.version == 4
            else (socket.AF_INET6, socket.IPPROTO_ICMPV6, 128)
        )
        deadline = time.monotonic() + timeout_s
        sent: list[float] = []
        with self.socket(family, socket.SOCK_DGRAM, protocol) as echo:
            echo.settimeout(0.05)
            while (now := time.monotonic()) < deadline:
                try:
                    echo.sendto(struct.pack("!BBHHH", kind, 0, 0, 0, len(sent)) + bytes(56), (str(address), 0))
                    sent.append(now)
                    answer = echo.recv(2048)
                    return time.monotonic() - sent[int.from_bytes(answer[6:8], "big")]
                except TimeoutError:
                    continue
                except OSError as error:
                    if error.errno not in _NOT_YET:
                        raise
                    time.sleep(_POLL_S)
        raise XdplbError(f"{self.name}: {address} does not answer ping within {timeout_s:g} s")

    def curl(
        self, url: str, *args: str, check: bool = True, timeout_s: float = 5.0
    ) -> subprocess.CompletedProcess[str]:
        """One request by curl; the body is the result's `stdout`. Servers' certificates are not verified."""
        command = ["curl", "-sS", "-g", "-k", "--noproxy", "*", "--max-time", f"{timeout_s:g}", *args, url]
        return self.run(command, check=check, timeout_s=timeout_s + 5.0)


def _states_and_groups() -> Iterator[tuple[str, int]]:
    """State and process group of every process: fields 3 and 5 of /proc/PID/stat (proc_pid_stat(5))."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _parent, group, *_ = stat.read_text().rpartition(")")[2].split()
            yield state, int(group)


def _set_network_namespace(fd: int) -> None:
    """Moves the calling thread, and no other."""
    if _libc.setns(fd, _CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"setns: {os.strerror(code)}")
