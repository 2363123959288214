"""Measures health checks: how many a second, and what they cost, with real servers on the same machine.

The servers are nginx on the loopback of a network namespace of their own. Checks of many addresses are always due, so
the rate is the most that prober, process and servers manage together. `-steady` is a rate as an operator would have it:
there the cost counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from xdplb.checks.scheduler import Prober
from xdplb.checks.targets import Target
from xdplb.core.health import CheckResult
from xdplb.errors import NotCapable
from xdplb.model import BackendKey, Check, CheckType

ENDPOINTS = 1000
WARM_UP_S, MEASURED_S = 1.0, 4.0
STEADY_PER_S = 1000
_PORT = 8080
_AT_ONCE_S = 0.0001

_CONFIGURATION = """
daemon off; worker_processes 1; error_log /dev/null; pid {directory}/pid;
events {{ worker_connections 8192; multi_accept on; }}
http {{ access_log off; server {{ listen {port} backlog=4096; location / {{ return 200 "ok"; }} }} }}
"""


class _Case(NamedTuple):
    name: str
    type: CheckType
    interval_s: float


CASES = [
    _Case("tcp-most", CheckType.TCP, _AT_ONCE_S),
    _Case("http-most", CheckType.HTTP, _AT_ONCE_S),
    _Case("tcp-steady", CheckType.TCP, ENDPOINTS / STEADY_PER_S),
    _Case("http-steady", CheckType.HTTP, ENDPOINTS / STEADY_PER_S),
]


def measure(machine: dict[str, Any]) -> dict[str, Any]:
    """The JSON of `scripts/bench checks -o json`. Raises NotCapable where there is no nginx."""
    if shutil.which("nginx") is None:
        raise NotCapable("nginx is not installed", "apt install nginx-light")
    program = f"ip link set lo up && exec {sys.executable} -m xdplb.bench.checks"
    done = subprocess.run(["unshare", "--net", "sh", "-c", program], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise NotCapable("the checks could not be measured in a network namespace", "its errors are above")
    return {"machine": machine, "cases": json.loads(done.stdout)}


def show(result: dict[str, Any]) -> Table:
    here = result["machine"]
    table = Table(title=f"health checks of {ENDPOINTS} addresses: {here['cpu']}, {here['cpus']} cores")
    for heading in ("case", "checks/s", "daemon", "its process", "failed"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for case in result["cases"]:
        shares = [f"{100 * case[key]:.0f} % of a core" for key in ("daemon_cores", "process_cores")]
        table.add_row(case["name"], f"{case['checks_per_s']:.0f}", *shares, str(case["failed"]))
    return table


@contextlib.contextmanager
def _serving() -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="xdplb-bench-") as directory:
        configuration = Path(directory) / "nginx.conf"
        configuration.write_text(_CONFIGURATION.format(directory=directory, port=_PORT), encoding="utf-8")
        server = subprocess.Popen(["nginx", "-p", directory, "-c", str(configuration)], stderr=subprocess.DEVNULL)
        try:
            while True:
                with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", _PORT)):
                    break
                time.sleep(0.01)
            yield
        finally:
            server.terminate()
            server.wait()


async def _run(case: _Case) -> dict[str, Any]:
    ended = failed = 0

    def on_result(key: BackendKey, result: CheckResult) -> None:
        nonlocal ended, failed
        ended += 1
        failed += not result.ok

    check = Check(type=case.type, interval_s=case.interval_s, fast_interval_s=case.interval_s)
    prober = Prober(on_result, lambda _: case.interval_s, max_in_flight=512)
    prober.set_targets(
        Target(BackendKey("web", str(n)), ip_address("127.0.1.0") + n, _PORT, check) for n in range(ENDPOINTS)
    )
    running = asyncio.create_task(prober.run())
    await asyncio.sleep(WARM_UP_S)
    before, cost_before, began = (ended, failed), _cores(), time.monotonic()
    await asyncio.sleep(MEASURED_S)
    took = time.monotonic() - began
    daemon, process = ((after - earlier) / took for after, earlier in zip(_cores(), cost_before, strict=True))
    found = {
        "name": case.name,
        "checks_per_s": round((ended - before[0]) / took, 1),
        "failed": failed - before[1],
        "daemon_cores": round(daemon, 3),
        "process_cores": round(process, 3),
    }
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    return found


def _cores() -> tuple[float, float]:
    """Seconds that this process and that of its checks have computed."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    ticks = 0
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii").split():
        fields = Path(f"/proc/{child}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        if b"nginx" not in Path(f"/proc/{child}/cmdline").read_bytes():
            ticks += int(fields[11]) + int(fields[12])
    return usage.ru_utime + usage.ru_stime, ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Inside the namespace: prints the cases as JSON."""
    with _serving():
        json.dump([asyncio.run(_run(case)) for case in CASES], sys.stdout)


if __name__ == "__main__":
    main()
