"""What hosts of a laboratory serve and ask for: web servers, UDP echo servers and a steady load of HTTP requests."""

from __future__ import annotations

import json
import queue
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from xdplb.errors import NotCapable, XdplbError
from xdplb.lab import programs
from xdplb.lab.hosts import Host, Process

BIG_BYTES = 1_000_000
_PROGRAMS = [sys.executable, "-IS", str(Path(programs.__file__).resolve())]


class Service:
    """Something that runs on a host; start it, and again after it ended. A context manager that starts and stops."""

    def __init__(self, host: Host, name: str) -> None:
        self.host = host
        self.name = name
        self._process: Process | None = None

    @property
    def process(self) -> Process:
        if self._process is None:
            raise XdplbError(f"{self.name} was never started")
        return self._process

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.running

    def start(self) -> None:
        """Returns once it is ready."""
        raise NotImplementedError

    def stop(self) -> None:
        """Ends it in its own orderly way."""
        self.process.stop()

    def kill(self) -> None:
        """Ends it, and its children, in the middle of whatever they do."""
        self.process.kill()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()


class WebServer(Service):
    """nginx. Answers `/` with its name, `/big` with BIG_BYTES bytes, and `/healthz` with 200, or 500 after `fail()`."""

    def __init__(
        self, host: Host, name: str | None = None, *, ports: Sequence[int] = (80,), https_ports: Sequence[int] = ()
    ) -> None:
        super().__init__(host, name or host.name)
        self.ports = tuple(ports)
        self.https_ports = tuple(https_ports)
        self.directory = host.directory / f"nginx-{self.name}"
        self._failing = self.directory / "failing"

    @staticmethod
    def check_able() -> None:
        """NotCapable where there is no nginx."""
        if shutil.which("nginx") is None:
            raise NotCapable("nginx is not installed", "apt-get install nginx-light")

    def start(self) -> None:
        self.check_able()
        if self.running:
            raise XdplbError(f"nginx {self.name} is already running")
        for port in (*self.ports, *self.https_ports):
            if self.host.accepts("127.0.0.1", port):
                raise XdplbError(f"nginx {self.name}: port {port} of {self.host.name} is taken")
        self._prepare()
        config = str(self.directory / "nginx.conf")
        # nginx ends its workers on SIGTERM; killed itself, it would leave them behind.
        self._process = self.host.popen(
            ["nginx", "-e", "stderr", "-p", str(self.directory), "-c", config], death_signal="TERM"
        )
        for port in (*self.ports, *self.https_ports):
            for address in ("127.0.0.1", "::1"):
                self._process.wait_until(
                    lambda address=address, port=port: self.host.accepts(address, port),  # type: ignore[misc]
                    f"it accepts connections to port {port}",
                )

    def stop(self) -> None:
        """Lets requests under way finish."""
        self.process.stop(signal.SIGQUIT)

    def fail(self) -> None:
        self._failing.touch()

    def recover(self) -> None:
        self._failing.unlink(missing_ok=True)

    def _prepare(self) -> None:
        self.directory.mkdir(exist_ok=True)
        (self.directory / "big").write_bytes(bytes(range(250)) * (BIG_BYTES // 250))
        if self.https_ports:
            self._make_certificate()
        (self.directory / "nginx.conf").write_text(self._config())

    def _make_certificate(self) -> None:
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        command += ["-keyout", str(self.directory / "key.pem"), "-out", str(self.directory / "certificate.pem")]
        self.host.run([*command, "-subj", f"/CN={self.name}", "-days", "30"])

    def _config(self) -> str:
        here = self.directory
        temporary = "\n".join(f"    {kind}_temp_path {here}/{kind};" for kind in _NGINX_TEMPORARY)
        listen = [f"        listen {port}; listen [::]:{port};" for port in self.ports]
        listen += [f"        listen {port} ssl; listen [::]:{port} ssl;" for port in self.https_ports]
        if self.https_ports:
            listen.append(f"        ssl_certificate {here}/certificate.pem; ssl_certificate_key {here}/key.pem;")
        return _NGINX_CONFIG.format(
            here=here, name=self.name, temporary=temporary, listen="\n".join(listen), failing=self._failing
        )


_NGINX_TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
_NGINX_CONFIG = """\
daemon off;
user root;
worker_processes 1;
pid {here}/nginx.pid;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    default_type text/plain;
    keepalive_timeout 300s;
    keepalive_requests 1000000;
{temporary}
    server {{
{listen}
        location = / {{ return 200 "{name}\\n"; }}
        location = /big {{ alias {here}/big; }}
        location = /healthz {{
            if (-e {failing}) {{ return 500 "failing\\n"; }}
            return 200 "ok\\n";
        }}
    }}
}}
"""


class UdpEcho(Service):
    """Answers every datagram to a port from `first_port` to `last_port` with `NAME:` and its payload."""

    def __init__(self, host: Host, first_port: int, last_port: int | None = None, *, name: str | None = None) -> None:
        super().__init__(host, name or host.name)
        self.first_port = first_port
        self.last_port = first_port if last_port is None else last_port

    def start(self) -> None:
        ports = [str(self.first_port), str(self.last_port)]
        self._process = self.host.popen([*_PROGRAMS, "udp-echo", self.name, *ports])
        self._process.wait_for_line("ready")


@dataclass(frozen=True, slots=True)
class HttpResult:
    """What came of one request. `started_s` is of CLOCK_MONOTONIC, comparable with time.monotonic() of any process.

    `backend` is the body, None after an error; `error` is None, timeout, refused, reset, closed, an errno's
    name, or "status N" for a status other than 200.
    """

    started_s: float
    latency_s: float
    backend: str | None
    status: int | None
    error: str | None


class HttpLoad(Service):
    """A load of HTTP requests from a process of its own; iterate over it, or take results as they come.

    With `rate` (requests a second) and without `keep_alive` it is an open loop: requests start on time, each on a
    connection of its own, however slow the answers are. Otherwise `workers` make one request after the other, each on
    its own connection if `keep_alive`, together not faster than `rate` if there is one.
    """

    def __init__(
        self,
        host: Host,
        url: str,
        *,
        rate: float | None = None,
        workers: int = 1,
        keep_alive: bool = False,
        timeout_s: float = 1.0,
    ) -> None:
        super().__init__(host, f"load of {url}")
        self._args = ["http-load", url, "--timeout", f"{timeout_s:g}", "--workers", str(workers)]
        self._args += ["--rate", f"{rate:g}"] if rate is not None else []
        self._args += ["--keep-alive"] if keep_alive else []
        self._results: queue.SimpleQueue[HttpResult | None] = queue.SimpleQueue()
        self._reader: threading.Thread | None = None

    def start(self) -> None:
        """Returns when the first result is in, which stays to be taken."""
        self._results = queue.SimpleQueue()
        self._process = self.host.popen([*_PROGRAMS, *self._args], capture=True)
        self._reader = threading.Thread(target=_read_results, args=(self._process, self._results), daemon=True)
        self._reader.start()
        self._process.wait_until(lambda: not self._results.empty(), "it made a request")

    def stop(self) -> None:
        super().stop()
        self._join()

    def kill(self) -> None:
        super().kill()
        self._join()

    def _join(self) -> None:
        if self._reader is not None:
            self._reader.join()

    def __iter__(self) -> Iterator[HttpResult]:
        """Results in order of their ends, until the load ends."""
        return iter(self._results.get, None)

    def drain(self) -> list[HttpResult]:
        """The results there are and nobody has taken; does not wait."""
        results = []
        while not self._results.empty():
            result = self._results.get()
            if result is not None:
                results.append(result)
        return results

    def collect_until(
        self, condition: Callable[[Sequence[HttpResult]], bool], what: str, timeout_s: float = 10.0
    ) -> list[HttpResult]:
        """Takes results until `condition` holds for those taken by this call; XdplbError after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        results: list[HttpResult] = []
        while not condition(results):
            try:
                result = self._results.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise XdplbError(f"waited {timeout_s:g} s in vain until {what}", f"last: {results[-3:]}") from None
            if result is None:
                raise XdplbError(f"the {self.name} ended before {what}", self.process.log())
            results.append(result)
        return results


def _read_results(process: Process, results: queue.SimpleQueue[HttpResult | None]) -> None:
    """Runs in its own thread until the process closes its output; None is the end. A killed one may end mid-line."""
    with process.stdout as lines:
        for line in lines:
            if line.endswith("\n"):
                results.put(HttpResult(**json.loads(line)))
    results.put(None)
