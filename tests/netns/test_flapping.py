"""200 backends come and go at random, checked 1000 times a second: status, counters and the truth agree, on the way and
at the end, and the daemon stays small and quick.

FLAPPING_S says for how long, 10 s by default. Lag and CPU time have a limit only where it is set: what else runs on the
machine counts in both.
"""

from __future__ import annotations

import os
import random
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from stage import VIP, Balancer, at, balancing, service

from xdplb.lab.hosts import Host
from xdplb.lab.laboratory import Laboratory, Shape, await_until
from xdplb.model import Forward

DURATION_S = float(os.environ.get("FLAPPING_S", "10"))
BACKENDS, SERVICES = 200, 4
FIRST = IPv4Address("10.64.0.2")
CHECK = {"type": "tcp", "interval": "200ms", "fast_interval": "200ms", "timeout": "1s", "rise": 1, "fall": 1}
FLAPS_PER_S = 20
LOOK_EVERY_S = 5.0
MOST_LAG_MS, MOST_CORES, MOST_GROWTH_MB = 50.0, 0.25, 10.0

pytestmark = [pytest.mark.usefixtures("able", "bpf_able"), pytest.mark.alone]


class Servers:
    """Those of all backends, on one host. Each hangs up at once; one that is down does not listen."""

    def __init__(self, host: Host, client: IPv4Address) -> None:
        self._host, self._client = host, str(client)
        self._selector = selectors.DefaultSelector()
        self._listening: dict[int, socket.socket] = {}
        self._lock = threading.Lock()
        self._end = threading.Event()
        self.served: Counter[int] = Counter()
        self.checked = 0

    def up(self, number: int) -> None:
        listener = self._host.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((str(FIRST + number), 80))
        listener.listen(128)
        listener.setblocking(False)
        with self._lock:
            self._listening[number] = listener
            self._selector.register(listener, selectors.EVENT_READ, number)

    def down(self, number: int) -> None:
        with self._lock:
            listener = self._listening.pop(number)
            self._selector.unregister(listener)
            self._accept(listener, number)
            listener.close()

    @property
    def alive(self) -> set[int]:
        return set(self._listening)

    @contextmanager
    def serving(self) -> Iterator[None]:
        thread = threading.Thread(target=self._serve)
        thread.start()
        try:
            yield
        finally:
            self._end.set()
            thread.join()
            for number in tuple(self._listening):
                self.down(number)

    def _serve(self) -> None:
        while not self._end.is_set():
            for key, _ in self._selector.select(0.1):
                with self._lock:
                    if key.data in self._listening:
                        self._accept(self._listening[key.data], key.data)

    def _accept(self, listener: socket.socket, number: int) -> None:
        with suppress(BlockingIOError):
            while True:
                connection, (peer, _) = listener.accept()
                connection.close()
                if peer == self._client:
                    self.served[number] += 1
                else:
                    self.checked += 1


def connect(lab: Laboratory, port: int) -> bool:
    """Whether a connection through the service is answered."""
    with lab.client.socket(socket.AF_INET, socket.SOCK_STREAM) as connection:
        connection.settimeout(0.5)
        return connection.connect_ex((str(VIP[4]), port)) == 0


def states(balancer: Balancer) -> dict[int, str]:
    return {int(b["name"][1:]): b["state"] for s in balancer.ask("status")["services"] for b in s["backends"]}


def agrees(balancer: Balancer, servers: Servers) -> bool:
    return {number for number, state in states(balancer).items() if state == "up"} == servers.alive


def computed_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS"))) / 1000


def test_two_hundred_backends_flap_at_random() -> None:
    chance = random.Random(1)
    with Laboratory(Shape.TWO_ARMED, backends=1) as lab:
        lab.prepare(Forward.NAT)
        (host,) = lab.backends
        lab.gateway.shell("ip address add 10.64.0.1/16 dev eth1")
        host.shell("for name in all eth0; do echo 0 >/proc/sys/net/ipv4/conf/$name/arp_ignore; done")
        host.shell("ip route add 10.64.0.1 dev eth0; ip route add local 10.64.0.0/16 dev lo table main")
        servers = Servers(host, lab.client.address(4))
        services = [
            service(
                f"web{part}",
                at(VIP[4], 8000 + part),
                [{"name": f"b{n}", "address": f"{FIRST + n}:80"} for n in range(part, BACKENDS, SERVICES)],
                check=CHECK,
            )
            for part in range(SERVICES)
        ]
        with servers.serving():
            for number in range(BACKENDS):
                servers.up(number)
            with balancing(lab, *services) as balancer:
                await_until(lambda: agrees(balancer, servers), "all are up", 20)
                flap(lab, balancer, servers, chance)


def flap(lab: Laboratory, balancer: Balancer, servers: Servers, chance: random.Random) -> None:
    pid = balancer.process.pid
    time.sleep(10.1)  # the lag of the start is forgotten then
    memory, computed, checked, began = memory_mb(pid), computed_s(pid), servers.checked, time.monotonic()
    lags, asked, refused, look = [], 0, 0, began + LOOK_EVERY_S
    while (now := time.monotonic()) < began + DURATION_S:
        number = chance.randrange(BACKENDS)
        (servers.down if number in servers.alive else servers.up)(number)
        asked += 1
        refused += not connect(lab, 8000 + asked % SERVICES)
        if now >= look:
            await_until(lambda: agrees(balancer, servers), "status says what is", 2)
            lags.append(balancer.ask("status")["loop_lag_ms"])
            look = now + LOOK_EVERY_S
        time.sleep(1 / FLAPS_PER_S)
    took = time.monotonic() - began
    cores = (computed_s(pid) - computed) / took
    checks_per_s = (servers.checked - checked) / took
    await_until(lambda: agrees(balancer, servers), "status says what is, at the end", 2)
    print(
        f"{took:.0f} s: {checks_per_s:.0f} checks a second answered, {cores:.3f} cores, lag {max(lags):.1f} ms, "
        f"memory {memory:.0f} -> {memory_mb(pid):.0f} MB, {refused} of {asked} connections not served"
    )
    for _ in range(100):
        asked += 1
        assert connect(lab, 8000 + asked % SERVICES), "what is up serves"
    counted = {b["name"]: b["new_flows"] for s in balancer.stats()["services"] for b in s["backends"]}
    assert sum(counted.values()) == asked
    wrong = {n: (counted[f"b{n}"], servers.served[n]) for n in range(BACKENDS)}
    assert sum(flows - served for flows, served in wrong.values()) == refused, wrong
    assert all(flows >= served for flows, served in wrong.values()), wrong
    if "FLAPPING_S" in os.environ:
        assert max(lags) < MOST_LAG_MS
        assert cores < MOST_CORES
    assert memory_mb(pid) - memory < MOST_GROWTH_MB
