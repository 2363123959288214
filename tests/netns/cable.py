"""A gateway and a backend, each in a network namespace, and one cable between them.

The code under test runs in the gateway."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import subprocess
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from xdplb.lab import remains
from xdplb.model import Address

CLONE_NEWNET = 0x40000000
TIMEOUT_S = 15.0
GATEWAY4, GATEWAY6 = ip_address("10.7.0.1"), ip_address("fd07::1")
BACKEND4, BACKEND6 = ip_address("10.7.0.11"), ip_address("fd07::11")
libc = ctypes.CDLL(None, use_errno=True)


def ip(command: str, stdin: str = "") -> str:
    return subprocess.run(["ip", *command.split()], check=True, capture_output=True, text=True, input=stdin).stdout


@dataclass(frozen=True)
class Lab:
    gateway: str
    backend: str

    def run(self, test: Callable[[], Coroutine[None, None, None]]) -> None:
        """Runs a coroutine in a thread of its own that lives in the gateway's namespace."""
        failure: list[BaseException] = []

        def body() -> None:
            try:
                with Path(f"/run/netns/{self.gateway}").open() as namespace:
                    if libc.setns(namespace.fileno(), CLONE_NEWNET):
                        raise OSError(ctypes.get_errno(), "setns")
                asyncio.run(asyncio.wait_for(test(), 2 * TIMEOUT_S))
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
        if failure:
            raise failure[0]

    def gw(self, command: str, stdin: str = "") -> None:
        ip(f"-n {self.gateway} {command}", stdin)

    def be(self, command: str) -> None:
        ip(f"-n {self.backend} {command}")


@contextlib.contextmanager
def cabled() -> Iterator[Lab]:
    prefix = remains.new_prefix()
    made = Lab(f"{prefix}-gw", f"{prefix}-be")
    with remains.claimed(prefix):
        ip(f"netns add {made.gateway}")
        ip(f"netns add {made.backend}")
        add_cable(made)
        made.gw("link set lo up")
        made.be("link set lo up")
        yield made


def add_cable(lab: Lab) -> None:
    lab.gw(f"link add gw0 type veth peer name be0 netns {lab.backend}")
    lab.gw("link set gw0 up")
    lab.be("link set be0 up")
    for add, addresses in ((lab.gw, (GATEWAY4, GATEWAY6)), (lab.be, (BACKEND4, BACKEND6))):
        device = "gw0" if add == lab.gw else "be0"
        add(f"addr add {addresses[0]}/24 dev {device}")
        add(f"addr add {addresses[1]}/64 dev {device} nodad")


def mac_of(namespace: str, device: str) -> bytes:
    words = ip(f"-n {namespace} -o link show {device}").split()
    return bytes.fromhex(words[words.index("link/ether") + 1].replace(":", ""))


def neighbour_line(lab: Lab, address: Address) -> str:
    return ip(f"-n {lab.gateway} -d neigh show {address}").strip()
